"""Between the passes that hash paragraphs or lines and that cut them: which units are repeats of an earlier one.

Units are numbered through all parts in order, those of the reference first. They are worked through in partitions by
the upper bits of their hashes, as tasks, so that memory has a bound: PARTITION_UNITS units at a time, NEED_UNIT bytes
each. Where there are several partitions, the hashes of each part are grouped by them first, so that a partition reads
its own alone.

    scratch/groups/part-00000.npy        borders of the groups, hashes and numbers in the part by group; uint64
    scratch/repeats/partition-000.npy    numbers of the repeated units, int64, sorted
    scratch/cuts/part-00000.npy          for each unit of the part, whether it is a repeat, bool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from prep.arrays import load_array, open_array, save_array
from prep.dedup.decide import PartArrays
from prep.dedup.explain import PARTITION_UNITS, megabytes, need_units
from prep.dedup.paragraphs import find_repeats
from prep.executors import Executor
from prep.parts import part_name
from prep.progress import counted
from prep.storage import Folder

GROUPS, REPEATS, CUTS = "groups", "repeats", "cuts"


class Grouping(NamedTuple):
    """A task: group the unit hashes of the part at `position` by their upper `bits` bits."""

    part: PartArrays
    position: int
    scratch: Folder
    bits: int


class Partition(NamedTuple):
    """A task: the repeats among the hashes whose upper `bits` bits are `number`.

    Attributes:
        parts: those that have units.
        starts: number of the first unit of each.
        scratch: a folder for what lies between the passes.
        bits: 0: all hashes are one partition.
        number: of the partition.
    """

    parts: tuple[PartArrays, ...]
    starts: tuple[int, ...]
    scratch: Folder
    bits: int
    number: int

    @property
    def name(self) -> str:
        """File of its repeats."""
        return f"partition-{self.number:03d}.npy"


def group_units(task: Grouping) -> None:
    """Group the hashes of a part, unless that is done. Runs on any worker."""
    folder, name = task.scratch.child(GROUPS), _group_name(task.position)
    if folder.exists(name):
        return
    hashes = task.part.load("hashes")
    numbers = (hashes >> np.uint64(64 - task.bits)).astype(np.int64)
    order = np.argsort(numbers, kind="stable")
    borders = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=1 << task.bits))])
    save_array(folder, name, np.concatenate([borders.astype(np.uint64), hashes[order], order.astype(np.uint64)]))


def find_partition(task: Partition) -> None:
    """Find and write the repeats of a partition, unless they are there. Runs on any worker."""
    folder = task.scratch.child(REPEATS)
    if folder.exists(task.name):
        return
    hashes, positions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for position, (part, start) in enumerate(zip(task.parts, task.starts, strict=True)):
        found, places = _read_group(task, position) if task.bits else _read_all(part)
        hashes.append(found)
        positions.append(start + places)
    joined = np.concatenate(hashes)
    del hashes  # the arrays are large
    places = np.concatenate(positions)
    del positions
    save_array(folder, task.name, find_repeats(joined, places))


def find_cuts(
    parts: Sequence[PartArrays],
    reference: int,
    scratch: Folder,
    executor: Executor,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write `cuts/part-N.npy` for each part that is not of the reference; they are not synced.

    Args:
        parts: of `UnitHashes`, in order, those of the reference first.
        reference: how many parts are the reference: nothing of it is cut.
        scratch: a folder for what lies between the passes.
        executor: runs the partitions.
        say: takes a line for the user: what will be needed.

    Returns:
        How many units are repeats.
    """
    starts = np.cumsum([0, *(part.length("hashes") for part in parts)])
    total, own = int(starts[-1]), int(starts[reference])
    wanted = need_units(total, PARTITION_UNITS, executor.workers)
    say(f"{total:,} units: needs about {megabytes(wanted.memory)} of memory, {megabytes(wanted.disk)} of disk")
    bits = 0
    while total >> bits > PARTITION_UNITS:
        bits += 1
    some = [position for position, (begin, end) in enumerate(pairwise(starts)) if begin < end]
    held, firsts = tuple(parts[position] for position in some), tuple(int(starts[position]) for position in some)
    if bits:
        groupings = [Grouping(part, position, scratch, bits) for position, part in enumerate(held)]
        for _ in counted("dedup: grouping", executor.map(group_units, groupings), len(groupings)):
            pass
    tasks = [Partition(held, firsts, scratch, bits, number) for number in range(1 << bits)]
    for _ in counted("dedup: repeats", executor.map(find_partition, tasks), len(tasks)):
        pass
    found = [load_array(scratch.child(REPEATS), task.name) for task in tasks]
    for part, (begin, end) in list(zip(parts, pairwise(starts), strict=True))[reference:]:
        repeated = np.zeros(end - begin, np.bool_)
        for repeats in found:
            first, last = np.searchsorted(repeats, [begin, end])
            repeated[repeats[first:last] - begin] = True
        save_array(scratch.child(CUTS), f"{part_name(part.number)}.npy", repeated, durable=False)
    return sum(len(repeats) - int(np.searchsorted(repeats, own)) for repeats in found)


def _read_all(part: PartArrays) -> tuple[np.ndarray, np.ndarray]:
    hashes = part.load("hashes")
    return hashes, np.arange(len(hashes))


def _read_group(task: Partition, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of a partition in the part at `position`, and their numbers in it."""
    behind = (1 << task.bits) + 1
    with open_array(task.scratch.child(GROUPS), _group_name(position)) as read:
        first, last = (int(border) for border in read(task.number, task.number + 2))
        units = int(read(behind - 1, behind)[0])
        hashes = read(behind + first, behind + last)
        return hashes, read(behind + units + first, behind + units + last).astype(np.int64)


def _group_name(position: int) -> str:
    """By its place among the parts that have units: the reference counts its parts from 0 as well."""
    return f"{part_name(position)}.npy"
