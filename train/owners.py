"""Whole matrices on the ranks that own them, out of the pieces that the ranks of a stage hold, and back.

An optimiser that works on whole matrices gives each one an owner. All ranks know what every rank holds (a `Table` of
boxes), so that the routes are worked out once, and a step needs one all-to-all of flat buffers to the owners and one
back to all ranks that hold a part, replicas included. What several ranks hold is sent by the owner itself if it is one
of them, or else by any. Parameters are exchanged in groups, so that no buffer is larger than a limit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.pieces import Piece

Box = tuple[tuple[int, int], ...]  # (start, stop) in every dimension of a whole parameter
Table = dict[str, list[Box]]  # what a rank holds of each parameter, in the order of `pieces`


@dataclass(frozen=True)
class Block:
    """A matrix of a parameter, or a stack of some of its matrices along dimension 0, that has one owner."""

    name: str
    box: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] or [matrices, rows, columns]."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def count(self) -> int:
        """Matrices in it."""
        return math.prod(self.shape[:-2])

    @property
    def cost(self) -> int:
        """Multiplications of a product of its matrices with their own transposes."""
        return math.prod(self.shape) * min(self.shape[-2:])


class Part(NamedTuple):
    """Of block number `block` the part `box`; `piece` is the number of the piece that has it on this rank."""

    block: int
    box: Box
    piece: int


def box_of(piece: Piece) -> Box:
    """Where a piece lies in its parameter."""
    return tuple((part.start, part.stop) for part in piece.slices())


def share_tables(table: Table, size: int, group: dist.ProcessGroup | None) -> list[Table]:
    """The tables of all `size` ranks of a group."""
    tables = [table] * size
    if size > 1:
        dist.all_gather_object(tables, table, group=group)
    return tables


def make_groups(blocks: list[Block], tables: list[Table], limit: int) -> list[list[Block]]:
    """Groups of blocks, of which a rank holds and, on average, owns at most `limit` elements, or one parameter."""
    by_name: dict[str, list[Block]] = {}
    for block in blocks:
        by_name.setdefault(block.name, []).append(block)
    groups: list[list[Block]] = []
    totals: list[int] = []  # of the last group: elements on each rank, and its owners' mean
    for name, of_name in by_name.items():
        more = [sum(map(volume, table[name])) for table in tables]
        more.append(sum(volume(block.box) for block in of_name) // len(tables))
        summed = [a + b for a, b in zip(totals, more, strict=True)] if groups else more
        if not groups or max(summed) > limit:
            groups.append([])
            summed = more
        groups[-1] += of_name
        totals = summed
    return groups


def choose_owners(blocks: list[Block], size: int) -> list[int]:
    """The owner of each block: the costliest first, each to the rank that has least to do."""
    loads = [(0, rank) for rank in range(size)]
    owners = [0] * len(blocks)
    for number in sorted(range(len(blocks)), key=lambda number: -blocks[number].cost):
        load, owners[number] = heapq.heappop(loads)
        heapq.heappush(loads, (load + blocks[number].cost, owners[number]))
    return owners


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(stop - start for start, stop in box)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in a tensor that holds `outer`."""
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(box, outer, strict=True))


def find_holders(block: Block, tables: list[Table]) -> dict[Box, dict[int, int]]:
    """The parts in which ranks hold a block: for each the ranks that hold it, and the number of their piece."""
    holders: dict[Box, dict[int, int]] = {}
    for rank, table in enumerate(tables):
        for piece, held in enumerate(table[block.name]):
            box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block.box, held, strict=True))
            if all(start < stop for start, stop in box):
                holders.setdefault(box, {})[rank] = piece
    assert sum(map(volume, holders)) == volume(block.box), f"{block.name}: the ranks do not hold all of it once"
    return holders


class _Leg:
    """Parts on their way, the ones of each rank together: a flat buffer and how it is shared among the ranks."""

    def __init__(self, parts: list[list[Part]]) -> None:
        """`parts`: by the rank that they go to or come from."""
        self.sizes = [sum(volume(part.box) for part in of_rank) for of_rank in parts]
        self.parts = [part for of_rank in parts for part in of_rank]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts in the buffer, in their shapes."""
        shapes = [[stop - start for start, stop in part.box] for part in self.parts]
        return [
            values.view(shape) for values, shape in zip(flat.split(list(map(math.prod, shapes))), shapes, strict=True)
        ]


class Exchange:
    """The routes of one group of parameters, and the two exchanges of a step.

    Attributes:
        names: the parameters.
        batches: shape of a matrix, and how many of this shape the rank owns.
    """

    def __init__(self, blocks: list[Block], tables: list[Table], rank: int, group: dist.ProcessGroup | None) -> None:
        """`rank` is this rank's place in `group`, in whose order the `tables` are."""
        self.blocks, self._table, self._group = blocks, tables[rank], group
        self.names = list(dict.fromkeys(block.name for block in blocks))
        self.batches: dict[tuple[int, ...], int] = {}
        self._places: dict[int, int] = {}  # where in its batch a block begins that this rank owns
        self._scattered = False  # whether any rank holds a part that its owner does not
        leaving: list[list[Part]] = [[] for _ in tables]  # to each rank
        arriving: list[list[Part]] = [[] for _ in tables]  # from each rank
        returned: list[list[Part]] = [[] for _ in tables]
        received: list[list[Part]] = [[] for _ in tables]
        for number, owner in enumerate(choose_owners(blocks, len(tables))):
            block = blocks[number]
            if owner == rank:
                shape = block.shape[-2:]
                self._places[number] = self.batches.get(shape, 0)
                self.batches[shape] = self._places[number] + block.count
            for box, holders in find_holders(block, tables).items():
                # Of replicas now this one sends, now that.
                source = owner if owner in holders else list(holders)[number % len(holders)]
                self._scattered |= source != owner
                part = Part(number, box, holders.get(rank, -1))
                if source == rank:
                    leaving[owner].append(part)
                if owner == rank:
                    arriving[source].append(part)
                    for holder in holders:
                        returned[holder].append(part)
                if rank in holders:
                    received[owner].append(part)
        self._leaving, self._arriving = _Leg(leaving), _Leg(arriving)
        self._returned, self._received = _Leg(returned), _Leg(received)

    def gather(self, pieces: dict[str, list[Piece]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Send this rank's pieces of every parameter to the owners.

        Returns:
            the matrices that this rank owns, [matrices, rows, columns] of each shape in `batches`, in `dtype`.
        """
        flat = torch.empty(sum(self._leaving.sizes), dtype=dtype, device=device)
        for part, values in zip(self._leaving.parts, self._leaving.views(flat), strict=True):
            values.copy_(pieces[self.blocks[part.block].name][part.piece].tensor[self._in_piece(part)])
        if self._scattered:
            flat = self._send(flat, self._leaving, self._arriving)
        batches = [flat.new_empty(count, *shape) for shape, count in self.batches.items()]
        for part, values in zip(self._arriving.parts, self._arriving.views(flat), strict=True):
            self._in_batch(part, batches).copy_(values)
        return batches

    def hand_back(
        self, batches: list[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[Block, int, tuple[slice, ...], Tensor]]:
        """Send what became of the batches to all ranks that hold a part of it.

        Yields:
            of all that this rank holds: the block, the number of the piece, where in the piece, and the values.
        """
        flat = torch.empty(sum(self._returned.sizes), dtype=dtype, device=device)
        for part, values in zip(self._returned.parts, self._returned.views(flat), strict=True):
            values.copy_(self._in_batch(part, batches))
        flat = self._send(flat, self._returned, self._received)
        for part, values in zip(self._received.parts, self._received.views(flat), strict=True):
            yield self.blocks[part.block], part.piece, self._in_piece(part), values

    def _send(self, flat: Tensor, leaving: _Leg, arriving: _Leg) -> Tensor:
        if len(leaving.sizes) == 1:
            return flat
        received = flat.new_empty(sum(arriving.sizes))
        dist.all_to_all_single(received, flat, arriving.sizes, leaving.sizes, group=self._group)
        return received

    def _in_piece(self, part: Part) -> tuple[slice, ...]:
        return within(part.box, self._table[self.blocks[part.block].name][part.piece])

    def _in_batch(self, part: Part, batches: list[Tensor]) -> Tensor:
        block, start = self.blocks[part.block], self._places[part.block]
        batch = batches[list(self.batches).index(block.shape[-2:])][start : start + block.count]
        return batch.view(block.shape)[within(part.box, block.box)]
