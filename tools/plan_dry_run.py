"""One rank of many, in real memory: the model and the optimiser are built and do a step, with nobody to talk to."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.table import Table

from shards.errors import UserError
from tools.plan_trace import LiveBytes, make_groups, one_of, run_pass
from train.config import ExperimentConfig
from train.layout import make_layout
from train.models import ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize, reduce_gradients
from train.prepare import load_model_config

LENGTH = 16  # tokens of the one window, for each rank that shares it: what is tried does not depend on them


def dry_run_table(config: ExperimentConfig, world_size: int) -> Table:
    """Build rank 0 of `world_size` on this machine's CPU and run a step of one short window, eager.

    Everything is real but the exchanges: what other ranks would send is whatever the memory holds.

    Raises:
        UserError: the optimiser is Muon, whose ranks agree on the owners of matrices at their start.
    """
    if config.training.optimizer == "muon":
        raise UserError("--dry-run: the ranks of Muon ask each other what they hold, and here is one; try adamw")
    eager = {"training": config.training.model_copy(update={"compile": False})}
    config = config.model_copy(update=eager)
    table = Table(title=f"dry run of rank 0 of {world_size}: one short window, eager, in real memory")
    for column in ("done", "seconds", "GiB in tensors", "peak so far", "GiB of the process"):
        table.add_column(column, justify="left" if column == "done" else "right")
    start = time.perf_counter()

    def done(what: str, live: LiveBytes) -> None:
        sizes = (live.now, live.peak, _resident())
        table.add_row(what, f"{time.perf_counter() - start:.1f}", *(f"{size / 2**30:.2f}" for size in sizes))

    with one_of(world_size) as ranks, LiveBytes() as live:
        layout = make_layout(config, ranks)
        make_groups(layout)
        model_config = load_model_config(config)
        with torch.device("meta"):
            model = ModelRegistry.create_model(model_config.model_type, model_config)
        done("nothing yet", live)
        parallelize(model, config, layout, fill=False)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.zero_()
        done(f"model, {layout}", live)
        optimizer = create_optimizer(model, config.training, layout)
        done("optimiser", live)
        model.train()
        run_pass(model, layout, batch_size=1, length=LENGTH * layout.tp)
        reduce_gradients(model, layout)
        done("forward and backward", live)
        optimizer.step(config.training.learning_rate)
        done("update", live)
    return table


def _resident() -> int:
    """Bytes of this process in memory, on Linux."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096
