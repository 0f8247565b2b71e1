"""Between the passes that hash paragraphs or lines and that cut them: which units are repeats of an earlier one.

Units are numbered through all parts in order. They are worked through in partitions by the upper bits of their hashes,
as tasks, so that memory has a bound: PARTITION_UNITS units at a time, NEED_UNIT bytes each.

    scratch/repeats/partition-000.npy    numbers of the repeated units, int64, sorted
    scratch/cuts/part-00000.npy          for each unit of the part, whether it is a repeat, bool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from prep.dedup.arrays import array_length, load_array, part_stem, save_array
from prep.dedup.explain import megabytes, need_units
from prep.dedup.paragraphs import find_repeats
from prep.executors import Executor
from prep.storage import Folder

PARTITION_UNITS = 1 << 24
REPEATS, CUTS = "repeats", "cuts"


class Partition(NamedTuple):
    """A task: the repeats among the hashes whose upper `bits` bits are `number`."""

    units: Folder
    parts: tuple[int, ...]
    scratch: Folder
    bits: int
    number: int

    @property
    def name(self) -> str:
        """File of its repeats."""
        return f"partition-{self.number:03d}.npy"


def find_partition(task: Partition) -> int:
    """Find and write the repeats of a partition, unless they are there; how many there are. Runs on any worker."""
    folder = task.scratch.child(REPEATS)
    if folder.exists(task.name):
        return array_length(folder, task.name)
    hashes, positions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    begin = 0
    for part in task.parts:
        name = f"{part_stem(part)}.hashes.npy"
        if not array_length(task.units, name):
            continue
        found = load_array(task.units, name)
        chosen = (
            np.flatnonzero(found >> np.uint64(64 - task.bits) == task.number) if task.bits else np.arange(len(found))
        )
        hashes.append(found[chosen])
        positions.append(begin + chosen)
        begin += len(found)
    repeats = find_repeats(np.concatenate(hashes), np.concatenate(positions))
    save_array(folder, task.name, repeats)
    return len(repeats)


def find_cuts(
    units: Folder,
    parts: Sequence[int],
    scratch: Folder,
    executor: Executor,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write `cuts/part-N.npy` for each part that has units.

    Args:
        units: the arrays of `UnitHashes`.
        parts: numbers of the parts, in order.
        scratch: a folder for what lies between the passes.
        executor: runs the partitions.
        say: takes a line for the user: what will be needed.

    Returns:
        How many units are repeats.
    """
    lengths = [array_length(units, f"{part_stem(part)}.hashes.npy") for part in parts]
    starts = np.cumsum([0, *lengths])
    wanted = need_units(int(starts[-1]), PARTITION_UNITS, executor.workers)
    say(f"{starts[-1]:,} units: needs about {megabytes(wanted.memory)} of memory, {megabytes(wanted.disk)} of disk")
    bits = 0
    while starts[-1] >> bits > PARTITION_UNITS:
        bits += 1
    tasks = [Partition(units, tuple(parts), scratch, bits, number) for number in range(1 << bits)]
    total = sum(executor.map(find_partition, tasks))
    found = [load_array(scratch.child(REPEATS), task.name) for task in tasks]
    for part, (begin, end) in zip(parts, pairwise(starts), strict=True):
        repeated = np.zeros(end - begin, np.bool_)
        for repeats in found:
            first, last = np.searchsorted(repeats, [begin, end])
            repeated[repeats[first:last] - begin] = True
        save_array(scratch.child(CUTS), f"{part_stem(part)}.npy", repeated, durable=False)
    return total
