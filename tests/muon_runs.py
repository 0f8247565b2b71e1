"""A program that updates the same models by the same gradients in several layouts, and compares with one rank.

torchrun --nproc-per-node 2 tests/muon_runs.py FAMILY/OPTIMIZER/STRATEGY/SHARD/TP/PP ...
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from family_runs import FAMILIES

from train import muon
from train.config import ExperimentConfig
from train.distributed import Ranks, start_ranks
from train.layout import Layout, make_layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.optim import Optimizer, create_optimizer
from train.parallel import parallelize
from train.pieces import pieces

STEPS = 4
SKIPPED = 2  # the step whose gradient is not finite, on one rank
RATE = 0.01


def build(fields: dict, config: ExperimentConfig, ranks: Ranks) -> tuple[BaseModelForCausalLM, Optimizer, Layout]:
    """The model and its optimiser in the layout that the experiment asks for."""
    layout = make_layout(config, ranks)
    parsed = ModelRegistry.parse_config(fields, "test")
    with torch.device("meta"):
        model = ModelRegistry.create_model(parsed.model_type, parsed)
    parallelize(model, config, layout)
    return model, create_optimizer(model, config.training, layout), layout


def update(model: BaseModelForCausalLM, optimizer: Optimizer, step: int) -> tuple[float, float]:
    """One step by gradients that each rank takes its part of; returns their norm and whether it was skipped."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + list(model.whole_shapes).index(name))
        whole = torch.randn(model.whole_shapes[name], generator=generator)
        if step == SKIPPED and name == "layers.1.self_attn.o_proj.weight":
            whole[-1, -1] = torch.nan
        parameter.grad = torch.zeros_like(parameter)
        for piece in pieces(parameter.grad, model.cuts.get(name)):
            piece.tensor.copy_(whole[piece.slices()])
    norm, skipped = optimizer.step(RATE)
    return norm.item(), skipped.item()


def compare(run: str, ranks: Ranks) -> str:
    """Largest relative difference of a parameter or state of the optimiser from that of one rank."""
    family, optimizer, strategy, shard, tp, pp = run.split("/")
    sizes = {"strategy": strategy, "dp_shard": int(shard), "tp": int(tp), "pp": int(pp)}
    fields = {
        "experiment": {"name": run},
        "model": {"config": FAMILIES[family]},
        "data": {"config_path": "unused"},
        "training": {
            "batch_size": 1,
            "optimizer": optimizer,
            "mixed_precision": "fp32",
            "compile": False,
            "grad_clip": 1.0,
            "weight_decay": 0.5,
        },
        "checkpointing": {"output_dir": "unused"},
    }
    alone = ExperimentConfig.model_validate(fields)
    config = ExperimentConfig.model_validate({**fields, "parallel": sizes})
    model, ours, layout = build(FAMILIES[family], config, ranks)
    whole, theirs, _ = build(FAMILIES[family], alone, Ranks(0, 1, ranks.device, None))
    for step in range(STEPS):
        norm, skipped = update(model, ours, step)
        expected = update(whole, theirs, step)
        assert skipped == expected[1] == (step == SKIPPED), (step, skipped, expected)
        assert skipped or abs(norm / expected[0] - 1) < 1e-6, (step, norm, expected)
    reference = {"weights": dict(whole.named_parameters()), **theirs.state_dict()}
    worst = 0.0
    for kind, tensors in {"weights": dict(model.named_parameters()), **ours.state_dict()}.items():
        for name, tensor in tensors.items():
            full = reference[kind][name].detach()
            cut = model.cuts.get(name) if full.shape == model.whole_shapes.get(name) else None
            for piece in pieces(tensor, cut):
                difference = (piece.tensor - full[piece.slices()]).abs().max() / full.abs().max().clamp_min(1e-30)
                worst = max(worst, difference.item())
    assert worst < 1e-5, (run, worst)
    return f"{layout}: {worst:.1e}"


def main() -> None:
    """Compare every run of the command line; one line each."""
    warnings.simplefilter("ignore")
    muon.GROUP_BYTES = 4 * 3000  # several groups in a tiny model
    ranks = start_ranks("gloo")
    for run in sys.argv[1:]:
        line = compare(run, ranks)
        if ranks.is_first:
            print(run, line, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
