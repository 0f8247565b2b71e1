"""AdamW against Muon on the demo's data: validation loss after the same number of tokens, both at their best rate.

`python -m tools.bench optimizers --out FOLDER`, after `make demo`

A small llama is trained by `train/pretrain.py` from the same weights on the same batches. The grid of learning rates
of each optimiser grows by factors of two until its best rate is not the smallest or the largest tried.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.errors import UserError
from tools.demo import DATA, EXPERIMENT, precision
from train.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
MODEL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
WINDOWS, LENGTH = 8, 128  # of a step
RATES = (2e-3, 4e-3, 8e-3)  # that a grid begins with
COLOURS = {"adamw": "#4477aa", "muon": "#ee6677"}

Curve = list[tuple[int, float]]  # tokens, validation loss


def train(folder: Path, optimizer: str, rate: float, steps: int) -> Curve:
    """Train one model, unless the folder has the finished run; returns the validation curve."""
    run = folder / f"{optimizer}-{rate:g}"
    if not (run / "results.json").exists():
        fields = {
            **{f"model.overrides.{name}": value for name, value in MODEL.items()},
            "data.max_seq_length": LENGTH,
            "evaluation.max_tokens": 2**14,
            "training.batch_size": WINDOWS,
            "training.optimizer": optimizer,
            "training.learning_rate": rate,
            "training.max_steps": steps,
            "training.warmup_steps": steps // 20,
            "training.decay_steps": steps // 4,
            "training.compile": "false",
            "checkpointing.output_dir": run.resolve(),
            "checkpointing.save_steps": steps,
            "logging.eval_steps": steps // 10,
            "logging.use_tensorboard": "false",
        }
        overrides = [f"{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "train/pretrain.py", "--config", EXPERIMENT, *overrides, *precision()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"training in {run} failed:\n{done.stdout}{done.stderr}")
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]


def tune(folder: Path, optimizer: str, steps: int, console: Console) -> dict[float, Curve]:
    """Curves by learning rate; the best is neither the smallest nor the largest."""
    curves: dict[float, Curve] = {}
    wanted = list(RATES)
    while wanted:
        for rate in wanted:
            with console.status(f"{optimizer} at {rate:g}"):
                curves[rate] = train(folder, optimizer, rate, steps)
        best = best_rate(curves)
        wanted = [rate for rate in (best / 2, best * 2) if rate not in curves]
    return curves


def best_rate(curves: dict[float, Curve]) -> float:
    """The learning rate with the lowest loss at the end."""
    return min(curves, key=lambda rate: curves[rate][-1][1])


def tokens_to_reach(curve: Curve, loss: float) -> float:
    """Tokens after which a curve is at a loss, between its points along straight lines; infinite if it never is."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return float("inf")


def plot(found: dict[str, dict[float, Curve]], path: Path) -> None:
    """All curves, the best of each optimiser strong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    for optimizer, curves in found.items():
        for rate, curve in sorted(curves.items()):
            best = rate == best_rate(curves)
            tokens, losses = zip(*curve[1:], strict=True)  # without the first, before any step
            axes.plot(
                tokens,
                losses,
                "o-" if best else "-",
                color=COLOURS[optimizer],
                markersize=3,
                linewidth=1.6 if best else 0.6,
                alpha=1.0 if best else 0.5,
                label=f"{optimizer}, best rate {rate:g}" if best else None,
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss, nats per token")
    axes.set_title("AdamW and Muon on the demo's data; thin: other learning rates")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Train the grids, print the table, draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench optimizers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and optimizers.png")
    parser.add_argument("--steps", type=int, default=300, help=f"of {WINDOWS} windows of {LENGTH} tokens each")
    arguments = parser.parse_args()
    if not (ROOT / DATA / "code" / "dataset.json").exists():
        raise UserError(f"{ROOT / DATA}: the demo's data is not there; `make demo` makes it")
    console = Console()
    found = {optimizer: tune(arguments.out, optimizer, arguments.steps, console) for optimizer in COLOURS}
    table = Table("learning rate", *found, title=f"validation loss after {arguments.steps * WINDOWS * LENGTH:,} tokens")
    for rate in sorted({rate for curves in found.values() for rate in curves}):
        cells = [f"{curves[rate][-1][1]:.4f}" if rate in curves else "" for curves in found.values()]
        table.add_row(f"{rate:g}", *cells)
    console.print(table)
    adamw, muon = (curves[best_rate(curves)] for curves in found.values())
    reached = tokens_to_reach(muon, adamw[-1][1])
    console.print(f"Muon is at AdamW's last loss after {reached:,.0f} tokens, {reached / adamw[-1][0]:.2f} of AdamW's")
    plot(found, arguments.out / "optimizers.png")
    console.print(f"curves: {arguments.out / 'optimizers.png'}")


if __name__ == "__main__":
    main()
