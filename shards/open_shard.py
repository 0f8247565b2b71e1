"""The shard that is being written: three append-only files under temporary names.

    shard-00003.bin.tmp        tokens
    shard-00003.idx.tmp        room for the header, then document ends
    documents-00003.rows.tmp   Arrow stream of id, source, tokens

Nothing else is kept, so a checkpoint is three fsyncs and a few numbers, and resuming cuts the files back to these.
A full shard is published at once: Parquet written in one go, header filled in, files renamed. When a run is killed
after that and resumed from an earlier checkpoint, the published files are taken back and cut like open ones.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shards.errors import UserError
from shards.files import publish, write_atomic
from shards.format import HEADER_BYTES, ShardEntry, bin_path, documents_path, idx_path, pack_header

ROWS = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("source", pa.large_string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
_ROW_GROUP = 2**14  # small groups: `explain` reads one, not the whole file


class OpenShard:
    """The three growing files of the shard that is being filled."""

    EMPTY: ClassVar[dict[str, Any]] = {"tokens": 0, "documents": 0}

    def __init__(self, directory: Path, index: int, token_bytes: int, state: dict[str, Any]) -> None:
        """Open shard `index` and cut its files back to `state`; the empty state starts it anew."""
        self.tokens: int = state["tokens"]
        self.documents: int = state["documents"]
        self._token_bytes = token_bytes
        self._paths = [bin_path(directory, index), idx_path(directory, index), documents_path(directory, index)]
        for path in self._paths[:2]:
            if path.exists():  # published after the checkpoint: take it back
                os.replace(path, _temporary(path))
        self._bin = _GrowingFile(_temporary(self._paths[0]), 0, self.tokens * token_bytes)
        self._idx = _GrowingFile(_temporary(self._paths[1]), HEADER_BYTES, 4 * self.documents)
        for name, file in (("bin_xxh3", self._bin), ("idx_xxh3", self._idx)):
            if name in state and file.hash.hexdigest() != state[name]:
                raise UserError(f"{file.path} has changed since the checkpoint: remove {directory} and start again")
        rows_path = directory / f"documents-{index:05d}.rows.tmp"
        self._rows = _GrowingFile(rows_path, 0, _cut_rows(rows_path, self._paths[2], self.documents))
        if not self.documents:
            self._rows.write(ROWS.serialize())
        self._paths[2].unlink(missing_ok=True)

    def write(self, tokens: np.ndarray, ends: np.ndarray, rows: pa.RecordBatch) -> None:
        """Append tokens and the documents that end in them; `ends` are relative to the first of these tokens."""
        self._bin.write(tokens)
        self._idx.write((ends + self.tokens).astype("<u4"))
        if rows.num_rows:
            self._rows.write(rows.serialize())
        self.tokens += len(tokens)
        self.documents += rows.num_rows

    def sync(self) -> None:
        for file in (self._bin, self._idx, self._rows):
            os.fsync(file.file)

    def state(self) -> dict[str, Any]:
        checksums = {"bin_xxh3": self._bin.hash.hexdigest(), "idx_xxh3": self._idx.hash.hexdigest()}
        return {"tokens": self.tokens, "documents": self.documents, **checksums}

    def publish(self, offset: int) -> ShardEntry:
        """Give the shard's files their names, complete; `offset` is the stream position of its first token."""
        checksums = self._bin.hash.hexdigest(), self._idx.hash.hexdigest()
        entry = ShardEntry(self.tokens, self.documents, offset, *checksums)
        os.pwrite(self._idx.file.fileno(), pack_header(entry, self._token_bytes), 0)
        self.close()
        bin_file, idx_file, documents = self._paths
        # One call on unchunked columns: pages and row groups do not depend on how the rows arrived.
        table = pa.Table.from_batches(_read_rows(self._rows.path, self.documents), ROWS).combine_chunks()
        pq.write_table(
            table,
            _temporary(documents),
            compression="zstd",
            row_group_size=_ROW_GROUP,
            use_dictionary=["source"],
            store_schema=False,
        )
        for path in (documents, idx_file, bin_file):
            publish(_temporary(path), path)
        self._rows.path.unlink()
        return entry

    def discard(self) -> None:
        self.close()
        for file in (self._bin, self._idx, self._rows):
            file.path.unlink()

    def close(self) -> None:
        for file in (self._bin, self._idx, self._rows):
            file.file.close()


class _GrowingFile:
    """An append-only file and the xxh3-64 of what follows its header."""

    def __init__(self, path: Path, header: int, length: int) -> None:
        """Open or create `path` and cut it to `header + length` bytes."""
        self.path = path
        self.hash = xxhash.xxh3_64()
        self.file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        if length and self.file.seek(0, os.SEEK_END) < header + length:
            raise UserError(f"{path} is shorter than at the checkpoint: remove {path.parent} and start again")
        self.file.truncate(header + length)
        self.file.seek(header)
        while chunk := self.file.read(2**24):
            self.hash.update(chunk)

    def write(self, data: Any) -> None:
        """Append a contiguous buffer."""
        view = memoryview(data).cast("B")
        self.hash.update(view)
        try:
            while view:  # a disk that fills up takes a part first
                view = view[self.file.write(view) :]
        except OSError as error:
            error.filename = str(self.path)
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _read_rows(path: Path, count: int) -> list[pa.RecordBatch]:
    """The first `count` rows of an Arrow stream whose end may be torn."""
    batches: list[pa.RecordBatch] = []
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        while count > 0:
            batches.append(stream.read_next_batch())
            count -= batches[-1].num_rows
    return batches


def _cut_rows(path: Path, parquet: Path, count: int) -> int:
    """Make `path` an Arrow stream of the shard's first `count` rows, taken from itself or from the published table.

    Returns its length in bytes, 0 if there are no rows to keep.
    """
    if not count:
        return 0
    try:
        if path.exists():
            batches = _read_rows(path, count)
        else:
            batches = pq.read_table(parquet).slice(0, count).cast(ROWS).to_batches()
    except (FileNotFoundError, StopIteration, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and start again") from None
    if sum(batch.num_rows for batch in batches) != count:
        raise UserError(f"{path} has fewer rows than at the checkpoint: remove {path.parent} and start again")
    content = b"".join([ROWS.serialize(), *(batch.serialize() for batch in batches)])
    write_atomic(path, content)
    return len(content)
