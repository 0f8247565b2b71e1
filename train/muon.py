"""Muon on sharded parameters: momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024).

    momentum <- mu momentum + (1 - mu) gradient
    direction = mu momentum + (1 - mu) gradient                                (Nesterov)
    weights <- weights - rate (decay weights + 0.2 sqrt(max(rows, columns)) orthogonal(direction))

The factor 0.2 sqrt(max(rows, columns)) gives the update the size of one of AdamW, so that AdamW's learning rate and
weight decay fit (Moonlight, arXiv 2502.16982, section 2.2).

It is for the matrices of the blocks; embedding, head, norms, biases and routers are left to AdamW. Parameters that hold
several matrices (queries, keys and values; gate and up; the experts) are treated as these.

Orthogonalising needs whole matrices. Each has an owner among the ranks of the stage, which gathers the direction
from those that hold it, works, and hands the update back (`train/owners.py`); everything else is done in place.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from train.adamw import local
from train.config import TrainingConfig
from train.layout import Layout
from train.models.base_config import BaseModelConfig
from train.models.transformer import BaseModelForCausalLM
from train.owners import Block, Exchange, box_of, make_groups, share_tables
from train.pieces import Piece, pieces, whole_shape

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial (Jordan et al. 2024)
ITERATIONS = 5
GROUP_BYTES = 2**28  # of a buffer of the exchange


class Muon:
    """Muon for the matrices of the blocks.

    `momentum` holds the running mean of the gradients by parameter name, laid out (sharded) as the parameter is, in the
    dtype that `optimizer_state_dtype` says.

    Attributes:
        dtype: in which matrices travel and are orthogonalised: bf16 on GPUs, as its error is far below that of five
            iterations; float32 on CPUs.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], model: BaseModelForCausalLM, config: TrainingConfig, layout: Layout
    ) -> None:
        """All ranks of a stage have to call it together: they tell each other what they hold."""
        self.config, self.parameters, self.cuts = config, parameters, model.cuts
        self.device = layout.ranks.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        state_dtype = torch.bfloat16 if config.optimizer_state_dtype == "bf16" else torch.float32
        self.momentum = {name: torch.zeros_like(p, dtype=state_dtype) for name, p in parameters.items()}
        size = layout.data_size * layout.tp
        table = {name: [box_of(piece) for piece in self._pieces(name, p)] for name, p in parameters.items()}
        tables = share_tables(table, size, layout.stage_group)
        shapes = {name: whole_shape(p, self.cuts.get(name)) for name, p in parameters.items()}
        blocks = [block for name in shapes for block in make_blocks(name, shapes[name], model.config, size)]
        self._exchanges = [
            Exchange(group, tables, layout.ranks.rank % size, layout.stage_group)
            for group in make_groups(blocks, tables, GROUP_BYTES // self.dtype.itemsize)
        ]

    def _pieces(self, name: str, tensor: Tensor) -> list[Piece]:
        return pieces(tensor, self.cuts.get(name))

    @torch.no_grad()
    def update(self, learning_rate: float, skipped: Tensor) -> None:
        """Update all parameters, unless the step is skipped (1.0; float32 [] on the device).

        All ranks of a stage have to call it together. The gradients are overwritten.
        """
        kept = 1.0 - skipped
        for exchange in self._exchanges:
            directions = {name: self._pieces(name, self._direct(name, skipped)) for name in exchange.names}
            batches = [orthogonalize(batch) for batch in exchange.gather(directions, self.dtype, self.device)]
            weights = [local(self.parameters[name]) for name in exchange.names]
            torch._foreach_mul_(weights, 1.0 - learning_rate * self.config.weight_decay * kept)
            held = {name: self._pieces(name, self.parameters[name]) for name in exchange.names}
            for block, piece, place, update in exchange.hand_back(batches, self.dtype, self.device):
                rate = learning_rate * 0.2 * math.sqrt(max(block.shape[-2:]))
                held[block.name][piece].tensor[place].sub_(update.float() * (rate * kept))

    def _direct(self, name: str, skipped: Tensor) -> Tensor:
        """Take the gradient into the momentum; returns the direction, in the memory of the gradient."""
        gradient, stored = self.parameters[name].grad, local(self.momentum[name])
        assert gradient is not None, f"{name} has no gradient"
        values, momentum = local(gradient), stored.float()
        # With the momentum itself for a gradient nothing changes, and nothing is left that is not finite.
        values.copy_(torch.where(skipped > 0, momentum, values))
        momentum.lerp_(values, 1.0 - self.config.muon_momentum)
        if stored.dtype != momentum.dtype:
            stored.copy_(momentum)
        values.lerp_(momentum, self.config.muon_momentum)
        return gradient

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state as the tensors themselves: loading writes into them."""
        return {"momentum": self.momentum}


def is_matrix_of_block(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is one for Muon."""
    return name.startswith("layers.") and parameter.ndim >= 2 and not name.endswith(".mlp.gate.weight")


def make_blocks(name: str, shape: tuple[int, ...], config: BaseModelConfig, size: int) -> list[Block]:
    """The matrices that a parameter of the whole shape `shape` consists of.

    The experts of a parameter are divided into as many stacks as there are ranks that can work on them, `size`.
    """
    rows = [shape[-2]]
    if name.endswith(".self_attn.qkv_proj.weight"):
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        rows = [number * config.head_dim for number in heads]
    elif name.endswith((".gate_up_proj.weight", ".gate_up_proj")):
        rows = [shape[-2] // 2] * 2
    ends = list(itertools.accumulate(rows))
    assert ends[-1] == shape[-2], (name, shape, rows)
    columns = (0, shape[-1])
    if len(shape) == 2:
        return [Block(name, ((end - count, end), columns)) for count, end in zip(rows, ends, strict=True)]
    step = -(-shape[0] // size)
    stacks = [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    return [
        Block(name, (stack, (end - count, end), columns))
        for stack in stacks
        for count, end in zip(rows, ends, strict=True)
    ]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iterations X <- a X + (b X X^T + c (X X^T)^2) X on X / |X|, in the dtype of X.

    They bring the singular values close to 1 (0.7 to 1.2) and leave the singular vectors as they are.

    Args:
        matrices: [matrices, rows, columns].

    Returns:
        the same shape.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp_min(1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
