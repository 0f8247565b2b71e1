"""Tensor parallelism with sequence parallelism: how a group of ranks shares every sequence and every matrix.

Between attention and MLP each rank holds a part of each sequence; inside them each holds all of it and a part of the
heads or of the inner width (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2):

    x [batch, length / ranks, hidden] -- gather --> [batch, length, hidden] -- own heads --> partial sums -- reduce --> x

What is not cut (norms, routers, embedding) works on other tokens or other heads on each rank, so that its gradient is a
part of a sum over the group, as in data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd, reduce_scatter_tensor_autograd


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
        return all_gather_tensor_autograd(x.contiguous(), 1, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """[batch, length, hidden], a part of a sum over the ranks -> this rank's share of the sum; gradients gather."""
        return reduce_scatter_tensor_autograd(x.contiguous(), "sum", 1, self.group)
