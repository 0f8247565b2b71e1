"""One rank of many, in real memory: the model and the optimiser are built and do a step, with nobody to talk to."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from shards.errors import UserError
from tools.plan_trace import LiveBytes, make_groups, one_of, run_pass
from train.config import ExperimentConfig
from train.layout import make_layout
from train.models import ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize, reduce_gradients
from train.prepare import load_model_config

LENGTH = 2  # tokens of the window, for each rank that shares it: memory is the point, and CPUs without bf16 are slow


def dry_run(config: ExperimentConfig, world_size: int) -> None:
    """Build rank 0 of `world_size` on this machine's CPU, run a step of one short window, print what it takes.

    Everything is real but the exchanges: what other ranks would send is whatever the memory holds. Blocks run eager.

    Raises:
        UserError: the optimiser is Muon, whose ranks agree on the owners of matrices at their start.
    """
    if config.training.optimizer == "muon":
        raise UserError("--dry-run: the ranks of Muon ask each other what they hold, and here is one; try adamw")
    eager = {"training": config.training.model_copy(update={"compile": False})}
    config = config.model_copy(update=eager)
    start, before = time.perf_counter(), _resident()
    print(f"dry run of rank 0 of {world_size}, GiB")
    print(f"  {'done':<40}{'seconds':>10}{'in tensors':>12}{'their peak':>12}{'process':>10}")

    def done(what: str) -> None:
        gib = "".join(f"{size / 2**30:>{width}.2f}" for size, width in sizes())
        print(f"  {what:<40}{time.perf_counter() - start:>10.1f}{gib}", flush=True)

    def sizes() -> list[tuple[int, int]]:
        return [(live.now, 12), (live.peak, 12), (_resident() - before, 10)]

    with one_of(world_size) as ranks, LiveBytes() as live:
        layout = make_layout(config, ranks)
        make_groups(layout)
        model_config = load_model_config(config)
        with torch.device("meta"):
            model = ModelRegistry.create_model(model_config.model_type, model_config)
        parallelize(model, config, layout, fill=False)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.zero_()
        done(f"weights ({layout})")
        optimizer = create_optimizer(model, config.training, layout)
        done("optimiser's state")
        model.train()
        model.register_forward_hook(lambda *_: done("forward"))
        run_pass(model, layout, batch_size=1, length=LENGTH * layout.tp)
        reduce_gradients(model, layout)
        done("backward, gradients exchanged")
        optimizer.step(config.training.learning_rate)
        done("update")


def _resident() -> int:
    """Bytes of this process in memory, on Linux."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096
