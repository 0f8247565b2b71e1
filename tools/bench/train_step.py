"""Training step on this machine as a share of its own rate of matrix products, in the same precision.

`python -m tools.bench train-step`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from train.config import ExperimentConfig
from train.distributed import start_ranks
from train.flops import flops_per_token
from train.layout import make_layout
from train.models import ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize


def best_of(repeats: int, work: Callable[[], object], device: torch.device) -> float:
    """Shortest time of `work` in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a [4096, 512] x [512, 1536] product, best of 20 after a warm-up."""
    a = torch.randn(4096, 512, dtype=dtype, device=device)
    b = torch.randn(512, 1536, dtype=dtype, device=device)
    best_of(3, lambda: a @ b, device)
    return 2 * 4096 * 512 * 1536 / best_of(20, lambda: a @ b, device)


def main() -> None:
    """Measure the matrix product, the step, and the product again; print the ratio."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench train-step", description=__doc__)
    parser.add_argument("--model", default="configs/model/llama/29m.yaml", help="model file")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=10, help="measured steps; the best counts")
    parser.add_argument(
        "--precision",
        choices=["bf16", "fp32"],
        default="bf16",
        help="of the step and of the product; take fp32 on a processor without bf16 instructions",
    )
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()

    config = ExperimentConfig.model_validate(
        {
            "experiment": {"name": "bench"},
            "model": {"type": "llama", "config_path": arguments.model},
            "data": {"config_path": "unused"},
            "training": {
                "batch_size": arguments.batch_size,
                "compile": not arguments.eager,
                "mixed_precision": arguments.precision,
            },
            "checkpointing": {"output_dir": "unused"},
        }
    )
    ranks = start_ranks(None)
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(arguments.model)
    layout = make_layout(config, ranks)
    parallelize(model, config, layout)
    optimizer = create_optimizer(model, config.training, layout)
    ids = torch.randint(model.config.vocab_size, (arguments.batch_size, arguments.length + 1), device=ranks.device)
    tokens = arguments.batch_size * arguments.length

    def step() -> None:
        loss = model(ids[:, :-1], labels=ids[:, 1:], reduction="sum").loss
        (loss / tokens).backward()
        optimizer.step(1e-4)

    best_of(3, step, ranks.device)
    dtype = model.compute_dtype
    before = matmul_rate(ranks.device, dtype)
    seconds = best_of(arguments.steps, step, ranks.device)
    peak = max(before, matmul_rate(ranks.device, dtype))
    rate = flops_per_token(model, arguments.length) * tokens / seconds
    table = Table("figure", "value", title=f"training step, {model.get_num_params():,} parameters, {ranks.device}")
    table.add_row("step", f"{seconds * 1e3:.0f} ms, {tokens / seconds:,.0f} tokens/s")
    table.add_row("step rate", f"{rate / 1e9:,.0f} GFLOP/s")
    table.add_row(f"{arguments.precision} matmul 4096 x 512 x 1536", f"{peak / 1e9:,.0f} GFLOP/s")
    table.add_row("ratio", f"{rate / peak:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
