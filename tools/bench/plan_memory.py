"""Planned memory of a training step against the memory that real steps take on this machine's CPU.

`python -m tools.bench plan-memory`

Measured is the peak of the resident set of a new process over steps, less what the same process has once it has freed
the model: libraries and compiled code. It is measured twice: with a mapping for each tensor, so that what is freed is
gone, and with glibc as the trainer sets it (`keep_freed_memory`), where blocks kept for the next step, and gaps between
them, count as well. GPUs have an allocator of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
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

MAPPED = "MALLOC_MMAP_THRESHOLD_"  # of glibc: larger blocks get a mapping of their own
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


def measure(config: ExperimentConfig, length: int) -> int:
    """Peak bytes of two steps on random ids, once everything has run and is compiled."""
    if MAPPED not in os.environ:
        keep_freed_memory()
    run_steps(config, length)
    peak = status("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return peak - status("VmRSS")


def run_steps(config: ExperimentConfig, length: int) -> None:
    """A step, and two more after which the process's peak is theirs."""
    layout = make_layout(config, Ranks(0, 1, torch.device("cpu"), None))
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(str(config.model.config_path))
    parallelize(model, config, layout)
    optimizer = create_optimizer(model, config.training, layout)
    for number in range(3):
        if number == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of compiling
        ids = torch.randint(model.config.vocab_size, (config.training.batch_size, length + 1))
        output = model(ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), reduction="sum")
        output.objective.backward()
        del output
        optimizer.step(1e-4)


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

    print(f"{'':<48}{'of it':>12}{'':>12}{'measured,':>20}{'measured,':>20}")
    print(f"{'model':<24}{'batch':>10}  {'recomputed':<12}{'activations':>12}{'planned':>12}{'mapped':>20}{'kept':>20}")
    for model, batch_size, length in CASES:
        for mode in modes:
            config = experiment(model, batch_size, arguments.precision, mode, not arguments.eager)
            with one_of(1) as ranks:
                planned = step_memory(config, ranks, length, 1, kernel="sdpa")
            options = ["--precision", arguments.precision, "--mode", mode, *(["--eager"] if arguments.eager else [])]
            command = [sys.executable, "-m", "tools.bench", "plan-memory", *options]
            command += ["--measure", model, str(batch_size), str(length)]
            figures = f"{planned.activations / 1e6:>9,.0f} MB{planned.peak / 1e6:>9,.0f} MB"
            for setting in ({MAPPED: "65536"}, {}):
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **setting})
                measured = json.loads(done.stdout)
                figures += f"{measured / 1e6:>9,.0f} MB {planned.peak / measured:>7.3f}"
            name, batch = model.removeprefix("configs/model/"), f"{batch_size} x {length}"
            print(f"{name:<24}{batch:>10}  {mode:<12}{figures}", flush=True)


if __name__ == "__main__":
    main()
