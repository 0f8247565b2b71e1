"""How the ranks of a run share the work: dp_replicate x dp_shard x tp x pp, and where this rank stands.

Ranks are numbered with the pipeline stage outermost and tensor parallelism innermost, so that those that talk most are
neighbours. All ranks with one data rank see the same windows.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shards.errors import UserError
from train.config import ExperimentConfig
from train.distributed import Ranks

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the four axes, and this rank's place on them."""

    ranks: Ranks
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def data_size(self) -> int:
        """How many shares the global batch has."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """Number of this rank's share."""
        return self.ranks.rank // self.tp % self.data_size

    @property
    def tp_rank(self) -> int:
        """This rank's place among those that share its sequences and matrices."""
        return self.ranks.rank % self.tp

    @property
    def stage(self) -> int:
        """This rank's stage of the pipeline."""
        return self.ranks.rank // (self.data_size * self.tp)

    @property
    def counts(self) -> bool:
        """Whether this rank is the one that counts what all ranks of its data rank know, as the tokens of a batch."""
        return self.tp_rank == 0 and self.stage == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks, with the dimensions `AXES`."""
        sizes = (self.pp, self.dp_replicate, self.dp_shard, self.tp)
        return init_device_mesh(self.ranks.device.type, sizes, mesh_dim_names=AXES)

    @cached_property
    def token_mesh(self) -> DeviceMesh:
        """The same with the ranks of a tensor-parallel group as so many shards: each has tokens of its own."""
        sizes = (self.pp, self.dp_replicate, self.dp_shard * self.tp)
        return init_device_mesh(self.ranks.device.type, sizes, mesh_dim_names=AXES[:3])

    @cached_property
    def stage_mesh(self) -> DeviceMesh:
        """Stages, and the ranks of each."""
        sizes = (self.pp, self.data_size * self.tp)
        return init_device_mesh(self.ranks.device.type, sizes, mesh_dim_names=("pp", "stage"))

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks of this stage; None: all."""
        return None if self.pp == 1 else self.stage_mesh.get_group("stage")

    @cached_property
    def tied_group(self) -> dist.ProcessGroup | None:
        """First and last stage of this rank's pipeline; None without one. All ranks must ask at the same time."""
        if self.pp == 1:
            return None
        last = self.ranks.world_size - self.ranks.world_size // self.pp
        pairs = [dist.new_group([rank, rank + last]) for rank in range(self.ranks.world_size // self.pp)]
        return pairs[self.ranks.rank % len(pairs)]

    def copies(self, parameter: object, *, cut: bool, tied: bool = False) -> int:
        """Ranks of the world that hold each element of a parameter.

        Args:
            parameter: the tensor itself.
            cut: whether tensor parallelism cut it.
            tied: whether the first and the last stage both have it.
        """
        copies = self.data_size * self.tp // (self.tp if cut else 1)
        if isinstance(parameter, DTensor):
            for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
                copies //= size if placement.is_shard() else 1
        return copies * (2 if tied else 1)

    def __str__(self) -> str:
        axes = [f"{name} {getattr(self, name)}" for name in AXES if getattr(self, name) > 1]
        return " x ".join([self.strategy, *axes]) if self.ranks.world_size > 1 else "one process"


def make_layout(config: ExperimentConfig, ranks: Ranks) -> Layout:
    """The layout that an experiment asks for, on the ranks that are here.

    Raises:
        UserError: they do not fit; with what would.
    """
    section, world = config.parallel, ranks.world_size
    replicate, shard, tp, pp = (
        (section.dp_replicate, section.dp_shard, section.tp, section.pp) if section is not None else (None, None, 1, 1)
    )
    strategy = config.strategy
    if world % (tp * pp):
        raise UserError(
            f"parallel: tp {tp} x pp {pp} needs a multiple of {tp * pp} ranks, but {world} are here: start "
            f"{-(-world // (tp * pp)) * tp * pp}, or change parallel.tp and parallel.pp"
        )
    data = world // (tp * pp)
    if strategy == "ddp":
        if shard not in (None, 1):
            raise UserError(f"parallel: ddp keeps the whole model on each rank, dp_shard is 1, not {shard}; use fsdp")
        shard, replicate = 1, data if replicate is None else replicate
    elif strategy == "fsdp":
        if replicate not in (None, 1):
            raise UserError(f"parallel: fsdp has one copy of the model, dp_replicate is 1, not {replicate}; use hsdp")
        replicate, shard = 1, data if shard is None else shard
    elif replicate is None and shard is None:
        raise UserError("parallel: hsdp needs dp_shard (ranks that share one copy of the model) or dp_replicate")
    else:
        replicate = replicate or max(1, data // (shard or 1))
        shard = shard or max(1, data // replicate)
    if replicate * shard != data:
        raise UserError(
            f"parallel: dp_replicate {replicate} x dp_shard {shard} x tp {tp} x pp {pp} = "
            f"{replicate * shard * tp * pp} ranks, but {world} are here; {_fitting(strategy, data, tp, pp)}"
        )
    return Layout(ranks, strategy, pp, replicate, shard, tp)


def _fitting(strategy: str, data: int, tp: int, pp: int) -> str:
    shards = {"ddp": [1], "fsdp": [data]}.get(strategy, [n for n in range(1, data + 1) if data % n == 0])
    pairs = " or ".join(f"{data // n} x {n}" for n in shards)
    return f"with tp {tp} and pp {pp}, dp_replicate x dp_shard can be {pairs}"
