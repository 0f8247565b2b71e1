"""This process among the ranks of a run, under torchrun or alone."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, how many there are, and its device.

    `host_group` carries small numbers between the hosts without waiting for the device; None in a run of one.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """True on the rank that writes what is written once."""
        return self.rank == 0

    def sum_on_host(self, values: Iterable[int]) -> list[int]:
        """Sum of integers over all ranks, element by element."""
        values = list(values)
        if self.host_group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def agree(self, number: int) -> bool:
        """Whether all ranks hold the same number."""
        return self.sum_on_host([number, number**2]) == [number * self.world_size, number**2 * self.world_size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on the device over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_on_host([0])


def start_ranks(backend: str | None) -> Ranks:
    """Join the process group that torchrun describes; alone without it.

    Raises:
        UserError: the backend asked for does not fit this machine.
    """
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not cuda:
        raise UserError(
            "training.backend is nccl, but this machine has no CUDA device; leave it out to get gloo on the CPU "
            "(training.backend=null)"
        )
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if "RANK" not in os.environ:
        return Ranks(0, 1, device, None)
    backend = backend or ("nccl" if cuda else "gloo")
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    host_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device, host_group)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for the next step instead of returning them to the system.

    Otherwise every activation is mapped, zeroed and faulted in anew at each step: a tenth of a CPU step's time.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
