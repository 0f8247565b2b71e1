"""Tensor parallelism: each rank of a group keeps a part of the heads and of the inner width of every block.

Whole heads and whole inner units are cut, so a block works as it is, on fewer of them; `models.sequence` has what
happens between the ranks. Fused matrices are cut in each of their parts: a rank's `qkv_proj` holds its query, key and
value heads.
"""

from __future__ import annotations

import torch
from torch import nn

from shards.errors import UserError
from train.layout import Layout
from train.models.attention import Attention
from train.models.linear import Linear, SwiGLU
from train.models.mla import LatentAttention
from train.models.moe import Experts
from train.models.sequence import SequenceShare
from train.models.transformer import BaseModelForCausalLM, DecoderBlock
from train.pieces import Cut


def cut_matrices(model: BaseModelForCausalLM, layout: Layout) -> None:
    """Leave this rank its part of a model on the meta device.

    Raises:
        UserError: the group is too large for the heads or the widths of the model.
    """
    model.share = SequenceShare(layout.mesh.get_group("tp").group_name, layout.tp, layout.tp_rank)
    cutter = _Cutter(model, layout)
    for name, module in model.named_modules():
        if isinstance(module, DecoderBlock):
            module.share = model.share
        elif isinstance(module, Attention):
            rows = [heads * module.head_dim for heads in module.heads]
            cutter.linear(f"{name}.qkv_proj", module.qkv_proj, rows, units=module.heads, what="attention heads")
            cutter.inputs(f"{name}.o_proj", module.o_proj)
            module.heads = [heads // layout.tp for heads in module.heads]
        elif isinstance(module, LatentAttention):
            queries = ("q_proj", module.q_proj) if module.q_lora_rank is None else ("q_b_proj", module.q_b_proj)
            for part, linear in (queries, ("kv_b_proj", module.kv_b_proj)):
                rows = [linear.out_features]
                cutter.linear(f"{name}.{part}", linear, rows, units=[module.num_heads], what="attention heads")
            cutter.inputs(f"{name}.o_proj", module.o_proj)
            module.num_heads //= layout.tp
        elif isinstance(module, SwiGLU):
            width = module.down_proj.in_features
            cutter.linear(f"{name}.gate_up_proj", module.gate_up_proj, [width] * 2, units=[width], what="inner width")
            cutter.inputs(f"{name}.down_proj", module.down_proj)
        elif isinstance(module, Experts):
            width = module.down_proj.shape[2]
            cutter.check([width], f"the inner width of the experts ({width})")
            cutter.parameter(f"{name}.gate_up_proj", module, "gate_up_proj", 1, [width] * 2)
            cutter.parameter(f"{name}.down_proj", module, "down_proj", 2, [width])


class _Cutter:
    """Replaces parameters by this rank's part and notes in `model.cuts` what it is."""

    def __init__(self, model: BaseModelForCausalLM, layout: Layout) -> None:
        self.cuts, self.size, self.rank = model.cuts, layout.tp, layout.tp_rank

    def check(self, units: list[int], what: str) -> None:
        """Refuse what cannot be divided."""
        if any(unit % self.size for unit in units):
            fitting = [n for n in range(1, min(units) + 1) if not any(unit % n for unit in units)]
            sizes = ", ".join(map(str, fitting[-8:]))
            raise UserError(f"parallel.tp {self.size} does not divide {what}; {sizes} would")

    def linear(self, name: str, module: Linear, parts: list[int], *, units: list[int], what: str) -> None:
        """Cut the outputs of a linear layer that consists of `parts` (rows each)."""
        self.check(units, f"the {what} of {name} ({', '.join(map(str, units))})")
        self.parameter(f"{name}.weight", module, "weight", 0, parts)
        if module.bias is not None:
            self.parameter(f"{name}.bias", module, "bias", 0, parts)

    def inputs(self, name: str, module: Linear) -> None:
        """Cut the inputs of a linear layer; its bias stays whole, and each rank of the group adds its share of it."""
        self.parameter(f"{name}.weight", module, "weight", 1, [module.in_features])
        module.bias_share = 1.0 / self.size

    def parameter(self, name: str, module: nn.Module, attribute: str, dim: int, parts: list[int]) -> None:
        """Cut dimension `dim`, which consists of `parts`, in each of them."""
        whole = getattr(module, attribute)
        blocks, begin = [], 0
        for part in parts:
            size = part // self.size
            blocks.append((begin + self.rank * size, begin + (self.rank + 1) * size))
            begin += part
        cut = Cut(tuple(whole.shape), dim, tuple(blocks))
        self.cuts[name] = cut
        setattr(module, attribute, nn.Parameter(torch.empty(cut.local_shape, dtype=whole.dtype, device="meta")))
