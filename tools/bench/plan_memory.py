"""Planned memory of a training step against the memory that real steps take on this machine's CPU.

`python -m tools.bench plan-memory`

Measured is the peak of the resident set over steps of a new process, less what the same process has once it has freed
model and gradients: libraries and compiled code. Blocks that glibc keeps between tensors count as used.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from train.config import ExperimentConfig
from train.distributed import Ranks, keep_freed_memory
from train.layout import make_layout
from train.models import ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize

CASES = [  # model file, batch size, length
    ("configs/model/minimind/26m.yaml", 8, 512),
    ("configs/model/llama/29m.yaml", 16, 256),
    ("configs/model/minimind/104m.yaml", 4, 512),
]


def experiment(model: str, batch_size: int, precision: str, mode: str, compiled: bool) -> ExperimentConfig:
    """One process that trains a model file."""
    return ExperimentConfig.model_validate(
        {
            "experiment": {"name": "bench"},
            "model": {"config_path": model},
            "data": {"config_path": "unused"},
            "training": {
                "batch_size": batch_size,
                "mixed_precision": precision,
                "activation_checkpointing": mode,
                "compile": compiled,
            },
            "checkpointing": {"output_dir": "unused"},
        }
    )


def status(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(config: ExperimentConfig, length: int, steps: int) -> None:
    """Some steps of a new model on random ids."""
    layout = make_layout(config, Ranks(0, 1, torch.device("cpu"), None))
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(str(config.model.config_path))
    parallelize(model, config, layout)
    optimizer = create_optimizer(model, config.training, layout)
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (config.training.batch_size, length + 1))
        output = model(ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), reduction="sum")
        output.objective.backward()
        del output
        optimizer.step(1e-4)


def measure(config: ExperimentConfig, length: int) -> int:
    """Peak bytes of three steps, once everything has run and is compiled."""
    keep_freed_memory()
    train(config, length, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    train(config, length, 3)
    return status("VmHWM") - base


def main() -> None:
    """Print planned and measured bytes of every case."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench plan-memory", description=__doc__)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--mode", choices=("none", "selective", "full"), action="append", help="default: all three")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "BATCH", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    modes = arguments.mode or ["none", "selective", "full"]
    if arguments.measure is not None:
        model, batch_size, length = arguments.measure
        config = experiment(model, int(batch_size), arguments.precision, modes[0], not arguments.eager)
        print(json.dumps(measure(config, int(length))))
        return
    from tools.plan_trace import one_of, step_memory

    print(
        f"{'model':<24}{'batch':>10}  {'recomputed':<12}{'activations':>12}{'planned':>12}{'measured':>12}{'ratio':>8}"
    )
    for model, batch_size, length in CASES:
        for mode in modes:
            config = experiment(model, batch_size, arguments.precision, mode, not arguments.eager)
            with one_of(1) as ranks:
                planned = step_memory(config, ranks, length, 1, kernel="sdpa")
            options = ["--precision", arguments.precision, "--mode", mode, *(["--eager"] if arguments.eager else [])]
            command = [sys.executable, "-m", "tools.bench", "plan-memory", *options]
            done = subprocess.run(
                [*command, "--measure", model, str(batch_size), str(length)], stdout=subprocess.PIPE, check=True
            )
            measured = json.loads(done.stdout)
            figures = "".join(f"{b / 1e6:>9,.0f} MB" for b in (planned.activations, planned.peak, measured))
            name, batch = model.removeprefix("configs/model/"), f"{batch_size} x {length}"
            print(f"{name:<24}{batch:>10}  {mode:<12}{figures}{planned.peak / measured:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
