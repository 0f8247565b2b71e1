"""From a model on the meta device to one that trains: compile its blocks, share it among the ranks, fill it.

The order matters: blocks are compiled before they are sharded, so that a compiled graph holds no collective.
`gradient_checkpointing` is part of the model itself.

`ddp` keeps the whole model on each rank and sums the gradients as one flat buffer. `fsdp` keeps a slice of every tensor
(FSDP2). Both sum in a fixed order, without averaging: the loss is already divided by the tokens of the global batch.
"""

from __future__ import annotations

import hashlib
import shutil
import sys

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from train.config import ExperimentConfig
from train.distributed import Ranks
from train.models.transformer import BaseModelForCausalLM


def parallelize(model: BaseModelForCausalLM, config: ExperimentConfig, ranks: Ranks, *, fill: bool = True) -> None:
    """Make a model on the meta device ready to train on `ranks`.

    With `fill` its weights are drawn from the experiment's seed; without, a checkpoint has to set them.
    """
    model.compute_dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
    if config.training.compile and compiler_found(ranks):
        for module in [*model.layers, model.norm]:
            module.compile(fullgraph=True)
        model.loss_kernel = torch.compile(model.loss_kernel, fullgraph=True)
    if config.strategy == "fsdp" and ranks.world_size > 1:
        shard(model, ranks)
    model.to_empty(device=ranks.device)
    if fill:
        initialize(model, config.experiment.seed, ranks)


def compiler_found(ranks: Ranks) -> bool:
    """Whether `torch.compile` can work here; says so where it cannot."""
    if ranks.device.type == "cuda" or shutil.which("g++") or shutil.which("clang++"):
        return True
    if ranks.is_first:
        print("no C++ compiler found: training runs eager, which is slower (apt-get install g++)", file=sys.stderr)
    return False


def shard(model: BaseModelForCausalLM, ranks: Ranks) -> None:
    """Shard every block, then the rest, with FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

    Routers stay whole on every rank: they are small, and FSDP would hand them out in the compute dtype.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    # The model casts its activations itself; the rotary angles must stay float32.
    precision = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = {parameter for experts in model.experts() for parameter in experts.gate.parameters()}
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
        assert isinstance(module, FSDPModule)
        # Sum, never average: gloo has no other reduction that is right on every version.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


@torch.no_grad()
def initialize(model: BaseModelForCausalLM, seed: int, ranks: Ranks) -> None:
    """Fill all parameters, each from (seed, name) alone: the same values at any world size and layout.

    Buffers (the routers' correction biases) are zeros, vectors ones (norms) or zeros (biases); matrices are normal
    with `model.initial_std`, drawn on the CPU.
    """
    for buffer in model.buffers():
        buffer.zero_()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        full = torch.empty(parameter.shape).normal_(0.0, model.initial_std(name), generator=generator)
        if isinstance(parameter, DTensor):
            assert parameter.placements == (Shard(0),)
            slices = full.chunk(ranks.world_size)  # as FSDP2 cuts: the last ranks may have none
            if ranks.rank < len(slices):
                parameter.to_local().copy_(slices[ranks.rank])
        else:
            parameter.copy_(full)


def delay_reduction(model: nn.Module, delay: bool) -> None:
    """With FSDP, gradients of all micro-batches but the last are kept and summed before they are reduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not delay)


@torch.no_grad()
def reduce_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Sum over the ranks the gradients of what is whole on each; FSDP has summed those that are sharded in backward."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if ranks.world_size == 1 or not gradients:
        return
    flat = ranks.sum_(_flatten_dense_tensors(gradients))
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
