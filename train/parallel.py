"""From a model on the meta device to one that trains: cut it, compile its blocks, shard it among the ranks, fill it.

The order matters. Stages and tensor parallelism decide which parameters a rank has at all; activation checkpointing is
inside a block, so that the compiler sees it; blocks are compiled before they are sharded, so that a compiled graph
holds no collective of FSDP.

`ddp` keeps the whole model on each data rank and sums the gradients as one flat buffer. `fsdp` keeps a slice of every
tensor (FSDP2), `hsdp` the same in each of several copies. All sum in a fixed order, without averaging: the loss is
already divided by the tokens of the global batch.
"""

from __future__ import annotations

import hashlib
import shutil
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from train.config import ExperimentConfig
from train.distributed import Ranks
from train.layout import Layout
from train.models.transformer import BaseModelForCausalLM, DecoderBlock
from train.pieces import pieces, whole_shape
from train.pipeline import keep_stage
from train.tensor_parallel import cut_matrices


def parallelize(model: BaseModelForCausalLM, config: ExperimentConfig, layout: Layout, *, fill: bool = True) -> None:
    """Make a model on the meta device ready to train on the ranks of a layout.

    With `fill` its weights are drawn from the experiment's seed; without, a checkpoint has to set them.

    Raises:
        UserError: the model cannot be cut so.
    """
    model.compute_dtype = torch.bfloat16 if config.training.mixed_precision == "bf16" else torch.float32
    if layout.pp > 1:
        keep_stage(model, layout)
    if layout.tp > 1:
        cut_matrices(model, layout)
    if (recompute := config.training.activation_checkpointing) is not None:
        for block in model.layers.children():
            assert isinstance(block, DecoderBlock)
            block.recompute = recompute
    if config.training.compile and compiler_found(layout.ranks):
        for module in [*model.layers.children(), *([] if model.norm is None else [model.norm])]:
            module.compile(fullgraph=True)
        model.loss_kernel = torch.compile(model.loss_kernel, fullgraph=True)
    if layout.strategy != "ddp":
        shard(model, layout)
    model.to_empty(device=layout.ranks.device)
    if fill:
        initialize(model, config.experiment.seed)


def compiler_found(ranks: Ranks) -> bool:
    """Whether `torch.compile` can work here; says so where it cannot."""
    if ranks.device.type == "cuda" or shutil.which("g++") or shutil.which("clang++"):
        return True
    if ranks.is_first:
        print("no C++ compiler found: training runs eager, which is slower (apt-get install g++)", file=sys.stderr)
    return False


def shard(model: BaseModelForCausalLM, layout: Layout) -> None:
    """Shard every block, then the rest, with FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

    Routers stay whole on every rank: they are small, and FSDP would hand them out in the compute dtype. With tensor
    parallelism so does what it does not cut in a block (norms, down projections of latent attention), while embedding,
    norm and head are sharded over its group as well: there each of its ranks has tokens of its own, like a data rank.
    """
    # The model casts its activations itself; the rotary angles must stay float32.
    precision = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    in_blocks = dict(model.layers.named_parameters(prefix="layers"))
    whole = {parameter for experts in model.experts() for parameter in experts.gate.parameters()}
    if layout.tp > 1:
        whole |= {parameter for name, parameter in in_blocks.items() if name not in model.cuts}
    groups: list[tuple[nn.Module, DeviceMesh]] = []
    if layout.dp_shard > 1:
        groups += [(block, _shard_mesh(layout.mesh, layout)) for block in model.layers.children()]
    else:
        whole |= set(in_blocks.values())
    if layout.dp_shard * layout.tp > 1:
        groups.append((model, _shard_mesh(layout.token_mesh, layout)))
    for module, mesh in groups:
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
        assert isinstance(module, FSDPModule)
        # Sum, never average: gloo has no other reduction that is right on every version.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def _shard_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    return mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]


@torch.no_grad()
def initialize(model: BaseModelForCausalLM, seed: int) -> None:
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
        cut = model.cuts.get(name)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        whole = torch.empty(whole_shape(parameter, cut)).normal_(0.0, model.initial_std(name), generator=generator)
        for piece in pieces(parameter, cut):
            piece.tensor.copy_(whole[piece.slices()])


def delay_reduction(model: nn.Module, delay: bool) -> None:
    """With FSDP, gradients of all micro-batches but the last are kept and summed before they are reduced."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not delay)


@torch.no_grad()
def reduce_gradients(model: BaseModelForCausalLM, layout: Layout) -> None:
    """Sum over the ranks the gradients of what FSDP has not sharded, and those of an embedding tied across stages."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain = {name: grad for name, grad in gradients.items() if not isinstance(grad, DTensor)}
    if layout.data_size * layout.tp > 1:
        _sum_flat([grad for name, grad in plain.items() if name not in model.cuts], layout.stage_group)
    if layout.dp_replicate > 1:
        _sum_flat([grad for name, grad in plain.items() if name in model.cuts], layout.mesh.get_group("dp_replicate"))
    if layout.tied_group is not None and model.tied_across_stages:
        tied = gradients["embed_tokens.weight"]
        dist.all_reduce(tied.to_local() if isinstance(tied, DTensor) else tied, group=layout.tied_group)


def _sum_flat(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum tensors over a group in one exchange, in place."""
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
