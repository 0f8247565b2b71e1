"""This process among the ranks of a run, under torchrun or alone."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from shards.errors import UserError

START_TIMEOUT = timedelta(hours=1)  # of an exchange until the first step is over: ranks load and compile unevenly
STEP_TIMEOUT = timedelta(minutes=10)  # then: a dead network or rank ends the run, and torchrun starts it again
BACKGROUND_TIMEOUT = timedelta(hours=12)  # of an exchange beside training: ranks wait for the slowest disk
_BACKGROUND = "beside training"  # description of such a group
GARBAGE_STEPS = 100  # between two collections of garbage


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

    def background_group(self) -> dist.ProcessGroup | None:
        """A new group of all ranks for a thread beside training, whose exchanges may take hours; None in a run of one.

        All ranks must call it together.
        """
        if self.host_group is None:
            return None
        return dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT, group_desc=_BACKGROUND)


def start_ranks(backend: str | None, run_path: Path | None = None) -> Ranks:
    """Join the process group that torchrun describes; alone without it.

    With NCCL, every rank records its last exchanges and writes them to `RUN/logs/flight/` when one times out
    (`torchfrtrace --prefix rank- RUN/logs/flight` reads them).

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
    if backend == "nccl" and run_path is not None:
        _record_exchanges(run_path / "logs" / "flight")
    dist.init_process_group(backend, timeout=START_TIMEOUT, device_id=device if backend == "nccl" else None)
    host_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=START_TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, host_group)


def shorten_timeouts(timeout: timedelta = STEP_TIMEOUT) -> None:
    """Let exchanges of every group that training waits for fail after `timeout`: to be called after the first step."""
    for group in process_groups():
        if group.group_desc != _BACKGROUND:
            _set_pg_timeout(timeout, group)


def process_groups() -> list[dist.ProcessGroup]:
    """All groups that this rank belongs to; none in a run of one."""
    return list(dist.distributed_c10d._world.pg_map)


def _record_exchanges(folder: Path) -> None:
    """Turn PyTorch's flight recorder on, where the environment does not say otherwise.

    The names are those of torch 2.11 to 2.13 (FlightRecorder.hpp, ProcessGroupNCCL.hpp), the second of a pair an
    older one that is still read. The folder may be made later: it is needed at the time of a dump.
    """
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",  # exchanges
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder.absolute() / "rank-"),  # + rank
    }
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def freeze_garbage_collector() -> None:
    """From here on Python looks for cyclic garbage only in `collect_garbage`: to be called after the first step.

    By itself it does so at any moment on any rank, through all objects that torch, the model and the compiler made:
    about 500 ms, for which the other ranks wait (nanochat, base_train.py). What lives now, lives as long as the run
    and is not looked at again, which makes every later collection a matter of microseconds.
    """
    gc.unfreeze()  # what an earlier run of this process froze
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_garbage(step: int) -> None:
    """Collect cyclic garbage every `GARBAGE_STEPS` steps, on all ranks at the same step; after the freezing above."""
    if step % GARBAGE_STEPS == 0:
        gc.collect()


def thaw_garbage_collector() -> None:
    """Undo `freeze_garbage_collector`, at the end of the run."""
    gc.unfreeze()
    gc.enable()


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
