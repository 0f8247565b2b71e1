"""The weights in a checkpoint, one tensor at a time: for work on a model that need not be in memory as a whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shards.errors import UserError
from shards.files import sync_directory, write_atomic
from train.run_state import RunState

_PREFIX = "model."


class _Reader(FileSystemReader):
    """Reads the table of contents once, not for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class StoredWeights:
    """The model's tensors in a checkpoint, whatever layout and world size wrote it.

    Attributes:
        shapes: of every parameter and persistent buffer, by name.

    Raises:
        UserError: there is no checkpoint here, or it is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        RunState.read(checkpoint)
        self.checkpoint = checkpoint
        self._reader = _Reader(checkpoint)
        try:
            contents = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # whatever unpickling raises
            raise self._damaged(error) from error
        self._entries = {
            key.removeprefix(_PREFIX): entry
            for key, entry in contents.items()
            if key.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, whole, in the dtype in which it rests."""
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({"model": {name: tensor}}, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            raise self._damaged(error) from error
        return tensor

    def _damaged(self, error: BaseException) -> UserError:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return UserError(f"{self.checkpoint}: the checkpoint cannot be read ({reason}); take another of the run's")


class _Planner(DefaultSavePlanner):
    """Asks for a tensor when it is about to be written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn.removeprefix(_PREFIX))


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], origin: str
) -> Path:
    """Write a checkpoint of step 0 that holds weights only, one float32 tensor in memory at a time.

    Args:
        folder: of the checkpoints; the new one is `step-00000000` in it, complete or absent.
        shapes: of the tensors, by our names.
        read: gives a tensor by its name.
        origin: what the weights were made from, kept in `state.json`.

    Returns:
        the checkpoint.
    """
    final = folder / "step-00000000"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    dcp.save(
        {"model": model},
        # A file for each tensor: the writer holds on to all that goes into one.
        storage_writer=FileSystemWriter(temporary, overwrite=False, single_file_per_rank=False),
        planner=_Planner(read),
        no_dist=True,
    )
    state = RunState(0, 0, plan="", past={}, position={}, identity={}, world_size=1, origin=origin, resumable=False)
    write_atomic(temporary / "state.json", json.dumps(dataclasses.asdict(state), indent=1))
    os.replace(temporary, final)
    sync_directory(folder)
    return final
