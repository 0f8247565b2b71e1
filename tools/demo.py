"""The whole way in a few minutes: real text, a tokenizer, a recipe, a mixture, a trained model, samples.

`make demo`, or `python -m tools.demo`. Every step is a command that is printed before it runs; a step whose result is
there is skipped.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.errors import run_command
from shards.files import write_atomic
from tools.demo_corpus import collect

DATA = Path("data/demo")
RUN = Path("experiments/demo")
RECIPE = "configs/data/recipes/demo.yaml"
MIXTURE = "configs/data/demo.yaml"
EXPERIMENT = "configs/experiments/active/demo.yaml"
SOURCES = ("code", "prose")
PROMPTS = ("import os\n", "def __init__(self", "class Config", "Returns", "This function", "Parameters\n----------\n")
SAMPLE_TOKENS = 120

console = Console(highlight=False)


def main() -> None:
    """Run all steps and say what they made."""
    start = time.perf_counter()
    # On a busy machine threads that spin while they wait halve the speed of training; on a quiet one it costs nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.chdir(Path(__file__).parent.parent)
    console.rule("[bold]1. real text: this Python installation")
    collect_text()
    raw = [str(DATA / "raw" / f"{source}.jsonl.zst") for source in SOURCES]
    tokenizer = DATA / "tokenizer.json"
    console.rule("[bold]2. a tokenizer")
    if tokenizer.exists():
        console.print(f"{tokenizer} is there")
    else:
        sample = ["--vocab-size", "4096", "--sample-bytes", "20000000"]
        run_tool("minigpt-prep", "train-tokenizer", *raw, *sample, "--out", str(tokenizer))
    console.rule("[bold]3. a recipe: filters, masking, deduplication, token shards")
    run_tool("minigpt-prep", "run", RECIPE)
    console.rule("[bold]4. the mixture")
    run_tool(
        "minigpt-mix", "inspect", MIXTURE, "--seq-len", "256", "--tokens", "2457600", "--html", str(DATA / "mix.html")
    )
    console.rule("[bold]5. pretraining")
    if not (RUN / "results.json").exists():
        run_tool("python", "train/pretrain.py", "--config", EXPERIMENT, *precision())
    else:
        console.print(f"{RUN / 'results.json'} is there")
    console.rule("[bold]6. samples")
    samples = RUN / "samples.txt"
    if not samples.exists() or samples.stat().st_mtime < (RUN / "results.json").stat().st_mtime:
        write_samples(samples)
    console.print(samples.read_text(encoding="utf-8"), markup=False)
    console.rule(f"[bold]done in {(time.perf_counter() - start) / 60:.1f} minutes")
    summarise()


def collect_text() -> None:
    """Write the raw corpora unless they are there."""
    if all((DATA / "raw" / f"{source}.jsonl.zst").exists() for source in SOURCES):
        console.print(f"{DATA / 'raw'} is there")
        return
    with console.status("reading the standard library and the installed packages"):
        sizes = collect(DATA / "raw")
    for source, size in sizes.items():
        console.print(f"{DATA / 'raw' / source}.jsonl.zst  {size / 1e6:.0f} MB of text")


def run_tool(program: str, *arguments: str) -> None:
    """Print a command and run it from this environment; its failure ends the demo."""
    console.print(f"$ {shlex.join([program, *arguments])}", style="bold cyan", soft_wrap=True)
    path = Path(sys.executable) if program == "python" else Path(sys.executable).with_name(program)
    done = subprocess.run([str(path), *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def precision() -> list[str]:
    """What to add to the training's command where bf16 is slow."""
    import torch

    from train.hardware import multiplies_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [] if multiplies_bf16(device) else ["training.mixed_precision=fp32"]


def write_samples(path: Path) -> None:
    """Continue a few openings of code and of prose."""
    from tools.generate import continue_prompts

    texts = continue_prompts(RUN, list(PROMPTS), max_new_tokens=SAMPLE_TOKENS, temperature=0.6, top_k=30)
    border = "\n" + "─" * 80 + "\n"
    write_atomic(path, border.join(text.rstrip() for text in texts) + "\n")


def summarise() -> None:
    """Print the figures, the files and the next commands."""
    results = json.loads((RUN / "results.json").read_text())
    figures, files = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    figures.add_row("[bold]validation", "[bold]before", "[bold]after")
    figures.add_row("loss, nats per token", f"{results['initial_val_loss']:.3f}", f"{results['val_loss']:.3f}")
    figures.add_row("bits per byte", f"{results['initial_val_bpb']:.3f}", f"{results['val_bpb']:.3f}")
    console.print(figures)
    console.print()
    for what, where in [
        ("tokenizer", DATA / "tokenizer.json"),
        ("clean documents", DATA / "documents"),
        ("what was removed, and why", DATA / "report.html"),
        ("token shards", f"{DATA}/code, {DATA}/prose"),
        ("picture of the mixture", DATA / "mix.html"),
        ("run folder", RUN),
        ("loss curve", RUN / "loss.png"),
        ("metrics", RUN / "metrics.jsonl"),
        ("samples", RUN / "samples.txt"),
    ]:
        files.add_row(what, f"[green]{where}")
    console.print(files)
    console.print(
        "\n[bold]next[/bold] (after . .venv/bin/activate)\n"
        f"  minigpt-generate {RUN} --prompt 'def main('               # more text\n"
        f"  minigpt-mix show {MIXTURE} --seq-len 256 --step 1 --batch-size 16   # what the model saw\n"
        f"  python train/pretrain.py --config {EXPERIMENT} training.max_steps=2000   # train on from here\n"
        f"  minigpt-prep sample {DATA} --rejected                   # what the recipe removed, and why\n"
        "  minigpt-prep run --help                                         # your own text",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    run_command(main)
