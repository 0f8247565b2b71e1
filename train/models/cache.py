"""The key/value cache of generation: what the layers keep of the tokens seen so far.

The slot of a token is its position, in every row and layer. So rows may have different lengths, nothing is ever padded
on the left, and a slot beyond the end of its row holds leftovers that the model's mask (slots <= position of the query)
hides. What is kept is up to the layer: keys and values, or latent states, any tensors [batch, length, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """States [batch, capacity, ...] per layer, allocated with the first states, in their dtype and on their device.

    The pass of the model sets `length` before its layers write. Rows leave and are repeated with `select`, and enter
    with `join`, which is how a batch of requests of different lengths is kept full.

    Attributes:
        batch: rows in use.
        capacity: slots of a row.
        length: slots in use by the longest row.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        self.length = 0
        self._layers: dict[
            int, tuple[Tensor, ...]
        ] = {}  # [rows >= batch, capacity, ...]: rows that left stay allocated

    def update(self, layer: int, position_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Write the states of new tokens and return those of all tokens of a layer.

        Args:
            layer: index of the layer.
            position_ids: int64 [batch, length], consecutive in each row. Rows that are one expanded row (stride 0), and
                a single row, are taken to end at `self.length`: their slots are one slice, written without an index.
            states: tensors [batch, length, ...], in the same order at each call.

        Returns:
            For each of the states a view [batch, self.length, ...] of the cache.
        """
        batch, length = position_ids.shape
        assert batch == self.batch, (batch, self.batch)
        assert length <= self.length <= self.capacity, (length, self.length, self.capacity)
        kept = self._layers.get(layer)
        if kept is None:
            # Zeros, not empty memory: a weight of 0 on a hidden slot does not hide a NaN in its value.
            kept = tuple(state.new_zeros(batch, self.capacity, *state.shape[2:]) for state in states)
            self._layers[layer] = kept
        if batch == 1 or position_ids.stride(0) == 0:
            start = self.length - length
            for slots, state in zip(kept, states, strict=True):
                slots[:batch, start : self.length] = state
        else:
            rows = torch.arange(batch, device=position_ids.device)[:, None]
            for slots, state in zip(kept, states, strict=True):
                slots[rows, position_ids] = state
        return tuple(slots[:batch, : self.length] for slots in kept)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row that is named twice is copied.

        Only rows that change their place are moved, so the cheapest way to drop a row is to put the last in its place.
        """
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        for layer, kept in self._layers.items():
            if len(rows) > len(kept[0]):
                kept = self._layers[layer] = tuple(_resized(slots, len(rows), self.capacity) for slots in kept)
            if moves:
                to, source = torch.tensor(moves, device=kept[0].device).unbind(1)
                for slots in kept:
                    slots[to, : self.length] = slots[source, : self.length]
        self.batch = len(rows)

    def join(self, other: KeyValueCache) -> None:
        """Append the rows of another cache of the same model behind the rows of this one, enlarged where needed."""
        batch = self.batch + other.batch
        self.length = max(self.length, other.length)
        self.reserve(max(self.capacity, self.length))
        for layer, added in other._layers.items():
            kept = self._layers.get(layer) or tuple(slots[:0] for slots in added)
            if len(kept[0]) < batch or kept[0].shape[1] < self.capacity:
                kept = self._layers[layer] = tuple(_resized(slots, batch, self.capacity) for slots in kept)
            for slots, rows in zip(kept, added, strict=True):
                slots[self.batch : batch, : other.length] = rows[: other.batch, : other.length]
        self.batch = batch

    def reserve(self, capacity: int) -> None:
        """Make room for rows of this many slots."""
        if capacity > self.capacity:
            self.capacity = capacity
            for layer, kept in self._layers.items():
                self._layers[layer] = tuple(_resized(slots, len(slots), capacity) for slots in kept)


def _resized(slots: Tensor, rows: int, capacity: int) -> Tensor:
    """A copy in a tensor of [rows, capacity, ...], zero where there was nothing."""
    larger = slots.new_zeros(rows, capacity, *slots.shape[2:])
    keep_rows, keep_slots = min(rows, slots.shape[0]), min(capacity, slots.shape[1])
    larger[:keep_rows, :keep_slots] = slots[:keep_rows, :keep_slots]
    return larger
