"""How long a checkpoint keeps training: saved in the background against waited for, by turns.

`python -m tools.bench checkpoint`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from operator import truediv
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.distributed import start_ranks
from train.layout import make_layout
from train.models import ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize
from train.run_state import RunState

MODEL = {  # 95 M parameters
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Save by turns in both ways into a temporary folder; print the medians and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench checkpoint", description=__doc__)
    parser.add_argument("--folder", help="on the disk that is meant; by default the system's temporary one")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.turns)


def measure(run: Path, turns: int) -> None:
    """Save a model and AdamW's state of it `turns` times each way."""
    config = ExperimentConfig.model_validate(
        {
            "experiment": {"name": "bench"},
            "model": {"type": "llama", "config": MODEL},
            "data": {"config_path": "unused"},
            "training": {"batch_size": 1, "compile": False},
            "checkpointing": {"output_dir": str(run), "save_total_limit": 1},
        }
    )
    ranks = start_ranks(None)
    with torch.device("meta"):
        model = ModelRegistry.create_model("llama", ModelRegistry.parse_config(MODEL, "model"))
    layout = make_layout(config, ranks)
    parallelize(model, config, layout)
    optimizer = create_optimizer(model, config.training, layout)
    said: list[str] = []
    checkpoints = Checkpoints(run, config.checkpointing, layout, said.append)
    checkpoints.reserve(model, optimizer)
    checkpoints.wait()
    blocked, durable, waited = [], [], []
    for turn in range(turns):
        start = time.perf_counter()
        blocked.append(checkpoints.save(_state(2 * turn + 1), model, optimizer))
        checkpoints.wait()
        durable.append(time.perf_counter() - start)
        waited.append(checkpoints.save(_state(2 * turn + 2), model, optimizer, wait=True))
    size = sum(path.stat().st_size for path in checkpoints.all()[-1].iterdir())
    table = Table(
        "save",
        "training waits",
        "on the disk after",
        title=f"{model.get_num_params():,} parameters, {size / 1e9:.2f} GB, {ranks.device}, medians of {turns} turns",
    )
    kept, there, whole = map(statistics.median, (blocked, durable, waited))
    table.add_row("in the background", f"{kept * 1e3:.0f} ms", f"{there:.2f} s")
    table.add_row("waited for", f"{whole:.2f} s", f"{whole:.2f} s")
    table.add_row("ratio", f"{kept / whole:.1%} (worst turn {max(map(truediv, blocked, waited)):.1%})", "")
    Console().print(table)


def _state(step: int) -> RunState:
    return RunState(step, step, plan="", past={}, position={}, identity={}, world_size=1)


if __name__ == "__main__":
    main()
