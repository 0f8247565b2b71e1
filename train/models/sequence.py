"""Tensor parallelism with sequence parallelism: how a group of ranks shares every sequence and every matrix.

Between attention and MLP each rank holds a part of each sequence; inside them each holds all of it and a part of the
heads or of the inner width (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2):

    x [batch, length / ranks, hidden] - gather --> [batch, length, hidden] -- own heads --> partial sums -- reduce --> x

What is not cut (norms, routers, embedding) works on other tokens or other heads on each rank, so that its gradient is a
part of a sum over the group, as in data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceShare:
    """This rank's share of every sequence.

    `group` is the name of the process group: compiled code takes names.
    """

    group: str
    size: int
    rank: int

    def take(self, x: Tensor) -> Tensor:
        """[batch, length, …] -> this rank's [batch, length / size, …]."""
        return x.chunk(self.size, dim=1)[self.rank].contiguous()

    def place(self, x: Tensor) -> Tensor:
        """[batch, length / size] -> [batch, length] with zeros where other ranks have their share."""
        whole = x.new_zeros(x.shape[0], self.size, x.shape[1])
        whole[:, self.rank] = x
        return whole.flatten(1)

    def gather(self, x: Tensor) -> Tensor:
        """[batch, length / size, hidden] -> [batch, length, hidden]; its gradient is reduced."""
        return _Gather.apply(x, self.size, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """[batch, length, hidden], a part of a sum over the ranks -> this rank's share of the sum; gradients gather."""
        return _Reduce.apply(x, self.size, self.group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return gather(x, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad, ctx.size, ctx.group), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return reduce_scatter(x, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather(grad, ctx.size, ctx.group), None, None


# The operators behind PyTorch's functional collectives, which compiled code takes as they are.


def gather(x: Tensor, size: int, group: str) -> Tensor:
    """The shares [batch, length / size, hidden] of all ranks, one behind the other along the length."""
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    parts = torch.ops._c10d_functional.wait_tensor(parts)
    return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """This rank's share of the length of the sum over the ranks of [batch, length, hidden]."""
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    part = torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", size, group)
    return torch.ops._c10d_functional.wait_tensor(part)
