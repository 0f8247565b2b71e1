"""Trains tiny models on the ranks of this start, one layout after the other, and keeps losses and first gradients.

torchrun --nproc-per-node 4 tests/layout_runs.py OUT STEPS NAME=family:strategy:replicate:shard:tp:pp ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from family_runs import FAMILIES

from train.config import ExperimentConfig
from train.distributed import Ranks, start_ranks
from train.layout import make_layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize
from train.passes import Passes
from train.pieces import pieces

BATCH, LENGTH, GLOBAL = 2, 16, 8  # windows of a micro-batch, tokens of a window, windows of a step
VARIANTS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "llama with biases": {**FAMILIES["llama"], "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3},
    "llama untied": {**FAMILIES["llama"], "tie_word_embeddings": False},
    "deepseek without experts": {**FAMILIES["deepseek_v2"], "first_k_dense_replace": 2},
}


def experiment(family: str, **parallel: Any) -> ExperimentConfig:
    """A configuration without data."""
    return ExperimentConfig.model_validate(
        {
            # With seed 5 a token of deepseek_v2 stands so near between two experts that rounding decides.
            "experiment": {"name": "layouts", "seed": 6},
            "model": {"config": VARIANTS[family]},
            "data": {"config_path": "unused"},
            "training": {
                "batch_size": BATCH,
                "learning_rate": 3e-3,
                "mixed_precision": "fp32",
                "compile": parallel.pop("compile", False),
                "activation_checkpointing": parallel.pop("recompute", None),
            },
            "checkpointing": {"output_dir": "unused"},
            "parallel": parallel,
        }
    )


def windows(step: int) -> torch.Tensor:
    """Tokens of a step, int64 [GLOBAL, LENGTH + 1]: a sequence that can be learned."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(400, (GLOBAL, 1), generator=generator)
    return (start + 7 * torch.arange(LENGTH + 1) ** 2) % 397


def batches(step: int, rank: int, ranks: int) -> list[SimpleNamespace]:
    """This data rank's micro-batches; some labels do not count, and not equally many on all ranks."""
    tokens = windows(step)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = labels[3, 2:4] = -100
    ids, labels = (whole.chunk(ranks)[rank].split(BATCH) for whole in (tokens[:, :-1], labels))
    return [
        SimpleNamespace(input_ids=a, labels=b, position_ids=None, cu_seqlens=None)
        for a, b in zip(ids, labels, strict=True)
    ]


def train(config: ExperimentConfig, ranks: Ranks, steps: int) -> SimpleNamespace:
    """Losses of all steps, and of the first the gradients as (name, whole shape, slices, values) of this rank."""
    layout = make_layout(config, ranks)
    torch._dynamo.reset()
    with torch.device("meta"):
        model: BaseModelForCausalLM = ModelRegistry.create_model(
            config.model.config["model_type"], ModelRegistry.parse_config(config.model.config, "test")
        )
    model.train()
    parallelize(model, config, layout)
    optimizer = create_optimizer(model, config.training, layout)
    passes = Passes(model, layout, batch_size=BATCH, length=LENGTH)
    tokens = GLOBAL * LENGTH - 7  # labels that count
    losses, norms, gradients = [], [], []
    for step in range(1, steps + 1):
        loss = torch.zeros(())
        for output in passes.train(batches(step, layout.data_rank, layout.data_size), tokens):
            loss += output.loss / tokens
        losses.append(ranks.sum_(loss).item())
        if step == 1:
            gradients = [
                (name, model.whole_shapes[name], piece.slices(), piece.tensor.clone())
                for name, parameter in model.named_parameters()
                for piece in pieces(parameter.grad, model.cuts.get(name))
            ]
        norm, _ = optimizer.step(config.training.learning_rate)
        norms.append(norm.item())
    ids = windows(0)[:BATCH, :-1]
    validation = passes.token_losses(input_ids=ids, labels=windows(0)[:BATCH, 1:])
    total = torch.zeros(()) if validation is None else validation.sum()
    total = ranks.sum_(total) / layout.data_size
    return SimpleNamespace(losses=losses, norms=norms, gradients=gradients, validation=total.item())


def main() -> None:
    """Run every layout that is asked for; the first rank writes OUT/NAME.pt."""
    out, steps, ranks = Path(sys.argv[1]), int(sys.argv[2]), start_ranks("gloo")
    for argument in sys.argv[3:]:
        name, _, text = argument.partition("=")
        family, strategy, *sizes, options = text.split(":")
        replicate, shard, tp, pp = map(int, sizes)
        extra = {"compile": "compile" in options, "recompute": options.removeprefix("compile").strip("+") or None}
        layout = {"strategy": strategy, "dp_replicate": replicate, "dp_shard": shard, "tp": tp, "pp": pp}
        found = train(experiment(family, **layout, **extra), ranks, steps)
        gathered: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(gathered, found.gradients)
        if ranks.is_first:
            whole: dict[str, torch.Tensor] = {}
            for parameter, shape, place, values in (entry for entries in gathered for entry in entries):
                whole.setdefault(parameter, torch.full(shape, torch.nan))[place] = values
            torch.save({**vars(found), "gradients": whole}, out / f"{name}.pt")


if __name__ == "__main__":
    main()
