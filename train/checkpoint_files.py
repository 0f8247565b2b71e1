"""The files of a checkpoint: written by all ranks from a copy in their host memory, read back, and read again later."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from xxhash import xxh3_64

from train.pieces import LoadPlanner, Piece, SavePlanner, StoredTensor

T = TypeVar("T")
WEIGHTS = "model."  # how the names of weights begin
Key = tuple[str, tuple[int, ...]]  # a piece: name of the tensor, and where it begins in it
EXIT_SECONDS = 120  # that a process waits at its end for what its background threads do


def piece_sizes(tensors: dict[str, StoredTensor]) -> dict[Key, int]:
    """Bytes of every piece that this rank holds."""
    return {(name, part.offsets): part.tensor.nbytes for name, tensor in tensors.items() for part in tensor.parts}


def choose_writers(tables: list[dict[Key, int]]) -> dict[Key, int]:
    """The rank that writes each piece, one of those that hold it; all have about as much to write.

    First go the weights, so that these alone are shared evenly too; of them and of the rest first what the fewest ranks
    hold, then the largest, each to the one that has least to write so far.

    Args:
        tables: of every rank, what it holds (see `piece_sizes`).
    """
    holders: dict[Key, list[int]] = {}
    for rank, table in enumerate(tables):
        for key in table:
            holders.setdefault(key, []).append(rank)

    def order(key: Key) -> tuple[bool, int, int, Key]:
        return not key[0].startswith(WEIGHTS), len(holders[key]), -tables[holders[key][0]][key], key

    writers, loads = {}, [0] * len(tables)
    for key in sorted(holders, key=order):
        writers[key] = writer = min(holders[key], key=loads.__getitem__)
        loads[writer] += tables[writer][key]
    return writers


def own_pieces(tensors: dict[str, StoredTensor], writes: dict[Key, bool]) -> dict[str, StoredTensor]:
    """Of the pieces that this rank holds those that it writes, as `writes` says of every one."""
    found = {}
    for name, tensor in tensors.items():
        if parts := [part for part in tensor.parts if writes[name, part.offsets]]:
            found[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, parts)
    return found


def all_finite(tensors: dict[str, StoredTensor]) -> bool:
    """Whether all weights are."""
    weights = [part.tensor for name, tensor in tensors.items() if name.startswith(WEIGHTS) for part in tensor.parts]
    return all(bool(torch.stack(torch.aminmax(weight)).isfinite().all()) for weight in weights)


class HostMemory:
    """Memory on the host that tensors are copied to, kept from one copy to the next; page-locked beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = np.empty(0, np.uint8)
        self._unlock: weakref.finalize | None = None

    def reserve(self, tensors: dict[str, StoredTensor]) -> None:
        """Make room for tensors, which for page-locked memory takes a while."""
        size = sum(_aligned(part.tensor.nbytes) for tensor in tensors.values() for part in tensor.parts)
        if size <= self._memory.nbytes:
            return
        if self._unlock is not None:
            self._unlock()
        self._memory = np.empty(size, np.uint8)  # numpy asks for huge pages, which are faster to get
        self._memory.fill(0)  # now, not at the first copy
        if self._device.type == "cuda":  # PyTorch's own page-locked memory is rounded up to a power of two
            runtime, address = torch.cuda.cudart(), self._memory.ctypes.data
            with torch.cuda.device(self._device):  # a thread begins with the first GPU
                torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
            self._unlock = weakref.finalize(self, runtime.cudaHostUnregister, address)
            self._unlock.atexit = False

    def copy(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The same tensors in this memory, which the next copy overwrites."""
        self.reserve(tensors)
        offset, copies = 0, {}
        for name, tensor in tensors.items():
            parts = []
            for part in tensor.parts:
                # Each with a storage of its own: the writer would copy a slice of a larger one once more.
                host = torch.frombuffer(self._memory, dtype=tensor.dtype, count=part.tensor.numel(), offset=offset)
                parts.append(Piece(part.offsets, host.view(part.tensor.shape)))
                if self._device.type == "cuda":
                    parts[-1].tensor.copy_(part.tensor, non_blocking=True)
                else:  # by one thread, at memory's rate: PyTorch's copy waits for threads on busy cores, 4x as long
                    source = part.tensor.contiguous().view(-1).view(torch.uint8).numpy()
                    np.copyto(self._memory[offset : offset + len(source)], source)
                offset += _aligned(part.tensor.nbytes)
            copies[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, parts)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies


def _aligned(size: int) -> int:
    """Rounded up to a cache line."""
    return -(-size // 64) * 64


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread that does not keep a process from ending: it may be waiting for a rank that hangs.

    A process that ends waits for it for at most `EXIT_SECONDS`: one that ends while a thread frees tensors is aborted.
    """
    future: Future[T] = Future()

    def work() -> None:
        nonlocal function, arguments
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del function, arguments  # the tensors
        atexit.unregister(ending)

    thread = threading.Thread(target=work, name="checkpoint", daemon=True)
    ending = partial(thread.join, EXIT_SECONDS)
    atexit.register(ending)
    thread.start()
    return future


class RankError(Exception):
    """What went wrong on one of the ranks, known to all."""


def together(function: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Call a function on all ranks of a group (None: on this one) and hand out all results, or fail on all alike.

    Raises:
        RankError: with the reason of the first rank that failed.
    """
    results: list[Any] = [None] * (1 if group is None else group.size())
    try:
        mine: tuple[T | None, str | None] = function(), None
    except (Exception, CheckpointException) as error:  # the latter derives from BaseException
        mine = None, reason(error)
    if group is None:
        results = [mine]
    else:
        dist.all_gather_object(results, mine, group=group)
    if failed := [text for _, text in results if text is not None]:
        raise RankError(failed[0])
    return [value for value, _ in results]


def reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, RankError):
        return str(error)
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def write_tensors(
    folder: Path, tensors: dict[str, StoredTensor], group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Write tensors into a folder from all ranks of a group, each its pieces, and read the files back.

    Returns:
        `{"bytes", "xxh3"}` of every file, by name.

    Raises:
        RankError, CheckpointException: on all ranks, where one could not write, or read something else than it wrote.
    """
    writer = FileSystemWriter(folder, overwrite=False, per_thread_copy_ahead=0)  # 0: no stream of a GPU in this thread
    writer.fs = files = _HashedFiles()
    dcp.save(tensors, storage_writer=writer, planner=SavePlanner(), no_dist=group is None, process_group=group)

    def read_back() -> dict[str, dict[str, Any]]:
        for name, written in files.written.items():
            if (found := describe_file(folder / name)) != written:
                raise OSError(f"{name} was read back as {found} after writing {written}")
        return files.written

    return {name: entry for written in together(read_back, group) for name, entry in written.items()}


class _HashedFiles(FileSystem):
    """The file system, with a record of what was written to each file."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = _HashedStream(stream)
            yield hashed
            if not stream.closed:  # dcp syncs the table of contents before the last of it has left the buffer
                stream.flush()
                os.fsync(stream.fileno())
        # The table of contents gets its name when it is complete.
        self.written[Path(path).name.removesuffix(".tmp")] = hashed.describe()


class _HashedStream:
    """A stream that hashes what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash, self._bytes = stream, xxh3_64(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def describe(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "xxh3": self._hash.hexdigest()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and xxh3-64 of a file, read from the disk as far as the system allows."""
    digest, buffer, size = xxh3_64(), memoryview(bytearray(2**22)), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # forget what is still in memory of it
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "xxh3": digest.hexdigest()}


def find_damage(folder: Path, files: dict[str, dict[str, Any]], group: dist.ProcessGroup | None) -> str | None:
    """What is wrong with the files that `write_tensors` described, if anything; each rank reads its share of them."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())

    def look() -> str | None:
        for name in sorted(files)[rank::size]:
            try:
                if describe_file(folder / name) != files[name]:
                    return f"{name} is not as it was written"
            except OSError as error:
                return reason(error)
        return None

    return next(filter(None, together(look, group)), None)


def read_tensors(folder: Path, tensors: dict[str, StoredTensor], group: dist.ProcessGroup | None) -> None:
    """Read this rank's pieces of stored tensors into their memory; all ranks of a group must call it."""
    dcp.load(
        tensors,
        storage_reader=FileSystemReader(folder),
        planner=LoadPlanner(),
        no_dist=group is None,
        process_group=group,
    )


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a folder that `write_tensors` wrote."""
    contents = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in contents.items() if isinstance(entry, TensorStorageMetadata)}
