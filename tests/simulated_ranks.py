"""Ranks without processes: what each would hold of a tensor, and a checkpoint as they would write it together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.pieces import Cut, SavePlanner, StoredTensor


@dataclass(frozen=True)
class Grid:
    """Ranks on replicate x shard x tp, numbered with tp innermost."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Place of every rank."""
        return list(itertools.product(range(self.replicate), range(self.shard), range(self.tp)))


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """A process group whose exchanges do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fused_cut(shape: tuple[int, ...], dim: int, parts: list[int], tp: int, rank: int) -> Cut:
    """Cut of a matrix that has `parts` behind one another in a dimension, of each of which a rank keeps its share."""
    starts = itertools.accumulate(parts, initial=0)
    shares = [(start + size // tp * rank, size // tp) for start, size in zip(starts, parts, strict=False)]
    return Cut(shape, dim, tuple((start, start + size) for start, size in shares))


def held(whole: Tensor, grid: Grid, place: tuple[int, int, int], cut: Cut | None) -> tuple[Tensor, Tensor]:
    """What a rank has of a tensor, as a parameter and as a plain tensor: the oracle, by indexing and `torch.chunk`.

    The parameter is a DTensor with more than one shard; call it as the rank.
    """
    _, shard, _ = place
    if cut is not None:
        index = torch.cat([torch.arange(start, stop) for start, stop in cut.blocks])
        whole = whole.index_select(cut.dim, index)
    if grid.shard == 1 and grid.replicate == 1:
        return whole.clone(), whole.clone()
    chunks = whole.chunk(grid.shard)
    rows = chunks[shard].clone() if shard < len(chunks) else whole[:0].clone()
    mesh = init_device_mesh(
        "cpu", (grid.replicate, grid.shard, grid.tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
    )
    placements = [Replicate(), Shard(0)]
    parameter = DTensor.from_local(
        rows,
        mesh["dp_replicate", "dp_shard"],
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return parameter, rows


def write_together(folder: Path, ranks: list[dict[str, StoredTensor]]) -> list[int]:
    """Write what the ranks hold as torch.distributed.checkpoint does from as many processes; bytes of each file."""
    writers = [FileSystemWriter(folder) for _ in ranks]
    planners = [SavePlanner() for _ in ranks]
    plans = []
    for rank, (writer, planner, tensors) in enumerate(zip(writers, planners, ranks, strict=True)):
        planner.set_up_planner(tensors, writer.storage_meta(), rank == 0)
        writer.set_up_storage_writer(rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, contents = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for writer, planner, plan in zip(writers, planners, plans, strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writers[0].finish(contents, results)
    return [sum(result.size_in_bytes for result in written) for written in results]
