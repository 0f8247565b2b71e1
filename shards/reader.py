"""Reads a dataset directory: one stream of tokens over memory-mapped shards, with document borders and provenance.

Opening compares sizes and 64-byte headers with the manifest and reads no tokens; shards are mapped on first use.
`shards.verify` reads everything.
"""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.format import (
    COPY_AGAIN,
    HEADER_BYTES,
    TOKENIZER,
    Manifest,
    ShardEntry,
    bin_path,
    documents_path,
    idx_path,
    pack_header,
    tokenizer_hash,
    unpack_header,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A document and where it lies in the stream: tokens [start, stop), EOS included."""

    id: str
    source: str
    start: int
    stop: int


class TokenDataset:
    """A finished dataset as one stream of tokens; a stream position is a token's index in it.

    Raises:
        UserError: no manifest, a newer format version, or files whose size or header is not what the manifest says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        for problem in check_files(self.path, self.manifest):
            raise UserError(problem)
        self.tokens: int = self.manifest.tokens
        self.documents: int = self.manifest.documents
        self.fingerprint: str = self.manifest.fingerprint
        self.vocab_size: int = self.manifest.vocab_size
        self.dtype: np.dtype[Any] = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shard_tokens: int = self.manifest.shard_tokens
        self.shards: tuple[ShardEntry, ...] = self.manifest.shards
        self._tokens: dict[int, np.ndarray] = {}
        self._ends: dict[int, np.ndarray] = {}
        _allow_many_files()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.path,)  # a worker process opens the files itself

    def shard(self, index: int) -> np.ndarray:
        """Tokens of one shard: a read-only memory map, opened on first use and kept."""
        if index not in self._tokens:
            self._tokens[index] = map_file(bin_path(self.path, index)).view(self.dtype)
        return self._tokens[index]

    def _shard_ends(self, index: int) -> np.ndarray:
        """Document ends of one shard, uint32, relative to its start; memory-mapped."""
        if index not in self._ends:
            self._ends[index] = map_file(idx_path(self.path, index))[HEADER_BYTES:].view("<u4")
        return self._ends[index]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream: a view inside one shard, a copy across shard borders."""
        self._check_range(start, stop)
        if start == stop:
            return np.empty(0, self.dtype)
        parts = [
            self.shard(index)[max(0, start - index * self.shard_tokens) : stop - index * self.shard_tokens]
            for index in range(start // self.shard_tokens, (stop - 1) // self.shard_tokens + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Stream positions e (int64, rising) where a document ends, start < e <= stop; O(log documents) per shard."""
        self._check_range(start, stop)
        parts = [
            self._shard_ends(index)[first:last] + np.int64(index * self.shard_tokens)
            for index, first, last in self._ends_between(start, stop)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _ends_between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) of the document ends e with start < e <= stop."""
        if start >= stop:
            return
        for index in range(start // self.shard_tokens, (stop - 1) // self.shard_tokens + 1):
            offset, ends = index * self.shard_tokens, self._shard_ends(index)
            # bounds of the array's own type: any other would make searchsorted convert the whole array
            bounds = np.array([max(0, start - offset), min(self.shard_tokens, stop - offset)], dtype=ends.dtype)
            first, last = np.searchsorted(ends, bounds, side="right")
            yield index, int(first), int(last)

    def documents_between(self, start: int, stop: int) -> list[Document]:
        """Every document that overlaps tokens [start, stop), in order.

        Raises:
            UserError: the documents-*.parquet file of a shard is missing or damaged.
        """
        self._check_range(start, stop)
        if start >= stop:
            return []
        # The last document is the one with the first end at or after `stop`; it may lie in a later shard.
        position = stop - 1
        while not len(ends := self.document_ends(position, min(self.tokens, position + self.shard_tokens))):
            position += self.shard_tokens
        found = []
        for index, first, last in self._ends_between(start, int(ends[0])):
            if first == last:
                continue
            offset = index * self.shard_tokens
            stops = self._shard_ends(index)[first:last].tolist()
            for row, end in zip(self._document_rows(index, first, last), stops, strict=True):
                end += offset
                found.append(Document(row["id"], row["source"], end - row["tokens"], end))
        return found

    def _document_rows(self, index: int, first: int, last: int) -> list[dict[str, Any]]:
        """Rows [first, last) of a shard's documents-*.parquet; reads only the row groups that hold them."""
        import pyarrow.parquet as pq  # not at the top: half of the start-up time of a command that needs no documents

        path = documents_path(self.path, index)
        try:
            with pq.ParquetFile(path) as file:
                groups, begins, begin = [], [], 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if begin < last and begin + rows > first:
                        groups.append(group)
                        begins.append(begin)
                    begin += rows
                if begin != self.shards[index].documents:
                    raise ValueError(f"{begin:,} rows, expected {self.shards[index].documents:,}")
                return file.read_row_groups(groups).slice(first - begins[0], last - first).to_pylist()
        except FileNotFoundError:
            raise UserError(f"{path} is missing, it lists the documents; {COPY_AGAIN}") from None
        except ValueError as error:  # pa.ArrowInvalid among them
            raise UserError(f"{path} is damaged ({error}); {COPY_AGAIN}") from None

    def tokenizer_json(self) -> bytes:
        """The tokenizer, byte for byte, checked against the manifest's hash."""
        path = self.path / TOKENIZER
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {COPY_AGAIN}") from None
        if tokenizer_hash(content) != self.manifest.tokenizer_hash:
            raise UserError(f"{path} is not the tokenizer that made this dataset; copy the right one")
        return content

    def close(self) -> None:
        """Drop the memory maps; each is unmapped when the last array over it is gone."""
        self._tokens.clear()
        self._ends.clear()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"{self.path}: tokens [{start:,}, {stop:,}) of a stream of {self.tokens:,}")


def check_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Compare file sizes and index headers with the manifest; yields what is wrong and what to do."""
    width = np.dtype(manifest.dtype).itemsize
    for index, entry in enumerate(manifest.shards):
        stem = f"{directory}/shard-{index:05d}"  # plain strings: Path would cost more than the system calls
        try:
            descriptor = os.open(stem + ".idx", os.O_RDONLY)
            try:
                header = os.pread(descriptor, HEADER_BYTES, 0)
                idx_bytes = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
            bin_bytes = os.stat(stem + ".bin").st_size
        except FileNotFoundError as error:
            yield f"{error.filename} is missing, but dataset.json lists it; {COPY_AGAIN}"
            continue
        if header != pack_header(entry, width):
            yield _explain_header(header, idx_path(directory, index), entry, width)
        for path, size, expected in (
            (stem + ".idx", idx_bytes, HEADER_BYTES + 4 * entry.documents),
            (stem + ".bin", bin_bytes, entry.tokens * width),
        ):
            if size != expected:
                yield f"{path}: {size:,} bytes, but dataset.json says {expected:,}: damaged or foreign; {COPY_AGAIN}"


def _explain_header(header: bytes, path: Path, entry: ShardEntry, width: int) -> str:
    try:
        found = dataclasses.asdict(unpack_header(header, path, width))
    except UserError as error:
        return str(error)
    wrong = [f"{k} {found[k]}, not {v}" for k, v in dataclasses.asdict(entry).items() if found[k] != v]
    return f"{path}: the header disagrees with dataset.json ({'; '.join(wrong)}): from another dataset; {COPY_AGAIN}"


def map_file(path: Path) -> np.ndarray:
    """The bytes of a non-empty file as a read-only uint8 array over a memory map."""
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except (FileNotFoundError, ValueError):  # ValueError: empty
        raise UserError(f"{path} is missing or empty; {COPY_AGAIN}") from None
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise UserError(f"{path}: more shards than files may be open ({limit}); raise `ulimit -n`") from None


def _allow_many_files() -> None:
    """Raise the soft limit on open files: a memory map keeps its file open, and a trillion tokens are 7,450 shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
