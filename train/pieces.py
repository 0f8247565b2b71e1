"""Which part of a whole tensor a rank holds, whatever the layout, and checkpoints of whole tensors made of such parts.

Tensor parallelism leaves blocks of one dimension (`Cut`), FSDP a range of the rows of what is left. Together they are a
few rectangles of the whole tensor (`Piece`). A checkpoint stores whole tensors by their pieces, so what one layout
wrote any other can read, and one process too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Cut:
    """What tensor parallelism leaves on a rank: `blocks` (start, stop) of dimension `dim`, one behind the other."""

    shape: tuple[int, ...]  # of the whole tensor
    dim: int
    blocks: tuple[tuple[int, int], ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what is left."""
        size = sum(stop - start for start, stop in self.blocks)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Piece:
    """A rectangle of a whole tensor: where it begins, and a view of the memory that holds it."""

    offsets: tuple[int, ...]
    tensor: Tensor

    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.tensor.shape, strict=True))


def row_range(tensor: Tensor) -> tuple[int, int]:
    """Rows (start, stop) of a tensor that this rank holds: a slice of an FSDP tensor, all of a plain one."""
    start, stop = 0, tensor.shape[0] if tensor.ndim else 1
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                continue
            assert placement == Shard(0), placement
            # As torch.chunk and FSDP2 cut: the last ranks may have none.
            size = -(-(stop - start) // tensor.device_mesh.size(dim))
            begin = min(start + size * tensor.device_mesh.get_local_rank(dim), stop)
            start, stop = begin, min(begin + size, stop)
    return start, stop


def whole_shape(tensor: Tensor, cut: Cut | None) -> tuple[int, ...]:
    """Shape of the tensor that `tensor` is a part of."""
    return cut.shape if cut is not None else tuple(tensor.shape)


def pieces(tensor: Tensor, cut: Cut | None = None, like: Tensor | None = None) -> list[Piece]:
    """The pieces of a tensor that this rank holds; without the empty ones.

    Args:
        tensor: a parameter, or one that is laid out like it.
        cut: what tensor parallelism left of the parameter.
        like: the parameter, where `tensor` is a plain tensor with the shape of what this rank has of it.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local = local.detach()
    if local.ndim == 0:
        return [Piece((), local)]
    first, last = row_range(tensor if like is None else like)
    if cut is None:
        return [Piece((first, *[0] * (local.ndim - 1)), local)] if last > first else []
    found, position = [], 0  # of the block in the cut dimension of the tensor that FSDP cut into rows
    for start, stop in cut.blocks:
        begin, end = position, position + stop - start
        position = end
        offsets = [first, *[0] * (local.ndim - 1)]
        if cut.dim == 0:
            begin, end = max(begin, first), min(end, last)
            offsets[0] = start + begin - (position - (stop - start))
            view = local[begin - first : max(end, begin) - first]
        else:
            offsets[cut.dim] = start
            view = local.narrow(cut.dim, begin, end - begin)
        if view.numel():
            found.append(Piece(tuple(offsets), view))
    return found


class StoredTensor:
    """A whole tensor that the ranks hold in pieces, in the form in which torch.distributed.checkpoint takes it.

    Ranks that hold the same piece say so by its offsets: it is written once, by the one that has least to write.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, parts: list[Piece]) -> None:
        self.shape, self.dtype, self.parts = torch.Size(shape), dtype, parts

    @classmethod
    def of(cls, tensor: Tensor, cut: Cut | None = None, like: Tensor | None = None) -> StoredTensor:
        """Of a tensor as `pieces` takes it; shares its memory."""
        return cls(whole_shape(tensor if like is None else like, cut), tensor.dtype, pieces(tensor, cut, like))

    def size(self) -> torch.Size:
        """Shape of the whole."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(part.offsets), part.tensor.shape) for part in self.parts]

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part.tensor for part in self.parts if torch.Size(part.offsets) == index.offset)


class SavePlanner(DefaultSavePlanner):
    """Plans the writing of a flat dictionary of `StoredTensor`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """Plans the reading into a flat dictionary of `StoredTensor`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default replaces what is no tensor of PyTorch's own by None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
