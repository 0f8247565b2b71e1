"""Writes a dataset directory: documents are appended in input order, files are complete or absent.

The bytes of the output depend only on the documents, not on how they were batched or how often the run was interrupted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import UserError
from shards.files import sync_directory, write_atomic
from shards.format import (
    DEFAULT_SHARD_TOKENS,
    FORMAT_VERSION,
    HEADER_BYTES,
    MANIFEST,
    MAX_SHARD_TOKENS,
    TOKENIZER,
    Manifest,
    ShardEntry,
    bin_path,
    dataset_fingerprint,
    documents_path,
    idx_path,
    token_dtype,
    tokenizer_hash,
    unpack_header,
)
from shards.open_shard import ROWS, OpenShard

_OWN_FILE = re.compile(r"(?:shard|documents)-(\d{5,})\.(?:bin|idx|rows|parquet)(?:\.tmp)*")
_COUNTS = ("documents", "tokens", "text_bytes")


class DatasetWriter:
    """One dataset directory under construction.

    Args:
        directory: made if absent; unfinished shard files in it are removed.
        tokenizer_json: the tokenizer, kept byte for byte.
        vocab_size: all ids are below it; up to 65,536 they are stored as uint16, else as uint32.
        eos_id: the id that ends every document.
        bos_id: the id that begins every document, if there is one.
        shard_tokens: tokens in every shard but the last.
        state: what `checkpoint` returned; see `resume`.

    Raises:
        UserError: the directory holds a finished dataset, or a setting is out of range.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer_json: bytes,
        vocab_size: int,
        eos_id: int,
        bos_id: int | None = None,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
            raise UserError(f"shard_tokens: {shard_tokens:,} is not between 1 and {MAX_SHARD_TOKENS:,}")
        for name, value in (("eos_id", eos_id), ("bos_id", bos_id)):
            if value is not None and not 0 <= value < vocab_size:
                raise UserError(f"{name}: {value} is not an id of the vocabulary (0 … {vocab_size - 1:,})")
        self.directory = Path(directory)
        self.dtype = token_dtype(vocab_size)
        self._tokenizer_json = tokenizer_json
        self._settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "bos_id": bos_id,
            "tokenizer_hash": tokenizer_hash(tokenizer_json),
            "shard_tokens": shard_tokens,
        }
        self.vocab_size, self.eos_id, self.shard_tokens = vocab_size, eos_id, shard_tokens
        self._failed = False
        if (self.directory / MANIFEST).exists():
            raise UserError(f"{self.directory} holds a finished dataset; remove it or choose another output directory")
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open(state or {"settings": self._settings, "shards": 0, "open": OpenShard.EMPTY, "sources": {}})

    @classmethod
    def resume(cls, directory: Path, state: dict[str, Any], **same_arguments: Any) -> DatasetWriter:
        """Cut the directory back to a checkpoint and go on from there; keyword arguments as for the constructor.

        Raises:
            UserError: other settings than at the checkpoint, or files that the checkpoint needs are gone or damaged.
        """
        return cls(directory, **same_arguments, state=state)

    def _open(self, state: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if state["settings"][name] != value:
                raise UserError(
                    f"{self.directory} was begun with {name} = {state['settings'][name]}, not {value}: "
                    "use the same settings to go on, or remove the directory to start again"
                )
        self._shards = [self._finished_shard(index) for index in range(state["shards"])]
        self._sources: dict[str, list[int]] = {name: list(counts) for name, counts in state["sources"].items()}
        for entry in os.scandir(self.directory):
            match = _OWN_FILE.fullmatch(entry.name)
            if match and int(match[1]) > state["shards"]:
                os.unlink(entry.path)
        self._shard = OpenShard(self.directory, state["shards"], self.dtype.itemsize, state["open"])

    def _finished_shard(self, index: int) -> ShardEntry:
        """What a shard that was finished before the checkpoint holds, read back from its header."""
        path = idx_path(self.directory, index)
        try:
            with path.open("rb") as file:
                entry = unpack_header(file.read(HEADER_BYTES), path, self.dtype.itemsize)
            bin_bytes = bin_path(self.directory, index).stat().st_size
            documents_path(self.directory, index).stat()
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing: remove {self.directory} and start again") from None
        if (
            (entry.tokens, entry.offset) != (self.shard_tokens, index * self.shard_tokens)
            or bin_bytes != entry.tokens * self.dtype.itemsize
            or path.stat().st_size != HEADER_BYTES + 4 * entry.documents
        ):
            raise UserError(f"{path} or its .bin is damaged: remove {self.directory} and start again")
        return entry

    @property
    def shards_finished(self) -> int:
        """Shards whose files are complete and on disk."""
        return len(self._shards)

    @property
    def tokens(self) -> int:
        """Tokens appended so far."""
        return len(self._shards) * self.shard_tokens + self._shard.tokens

    @property
    def documents(self) -> int:
        """Documents appended so far."""
        return sum(counts[0] for counts in self._sources.values())

    def append(
        self, tokens: np.ndarray, ends: np.ndarray, ids: pa.Array, sources: pa.Array, text_bytes: np.ndarray
    ) -> None:
        """Append whole documents.

        Args:
            tokens: [n] uint16 or uint32, the documents one after the other, EOS included.
            ends: [d] int64, where each document ends in `tokens`; `ends[-1] == n`.
            ids: [d] strings.
            sources: [d] strings.
            text_bytes: [d] UTF-8 bytes of each document's text.

        Raises:
            UserError: an id that is not below `vocab_size`, or the disk is full.
            ValueError: arrays that do not fit together, or a document that does not end with EOS.
        """
        tokens, ends = np.ascontiguousarray(tokens), np.asarray(ends, dtype=np.int64)
        if not len(tokens) and not len(ends):
            return
        lengths = np.diff(ends, prepend=0)
        self._check(tokens, ends, lengths, (ids, sources, text_bytes))
        tokens = tokens.astype(self.dtype, copy=False)
        rows = pa.RecordBatch.from_arrays([_strings(ids), _strings(sources), pa.array(lengths)], schema=ROWS)
        with self._writing():
            start = first = 0
            while start < len(tokens):
                stop = min(len(tokens), start + self.shard_tokens - self._shard.tokens)
                last = int(np.searchsorted(ends, stop, side="right"))
                self._shard.write(tokens[start:stop], ends[first:last] - start, rows.slice(first, last - first))
                if self._shard.tokens == self.shard_tokens:
                    self._finish_shard()
                start, first = stop, last
            self._count(rows.column("source"), lengths, text_bytes)

    def _check(self, tokens: np.ndarray, ends: np.ndarray, lengths: np.ndarray, columns: tuple[Any, ...]) -> None:
        if tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"tokens are {tokens.dtype}, expected uint16 or uint32")
        if any(len(column) != len(ends) for column in columns):
            raise ValueError(f"{len(ends)} documents, but columns of {[len(column) for column in columns]}")
        if not len(ends) or ends[-1] != len(tokens) or lengths.min() < 1:
            raise ValueError(f"ends must rise strictly up to the number of tokens, {len(tokens)}")
        if self.vocab_size <= np.iinfo(tokens.dtype).max and (largest := int(tokens.max())) >= self.vocab_size:
            raise UserError(
                f"{self.directory}: token id {largest:,} is not below the vocabulary size {self.vocab_size:,}: "
                "the tokenizer and its vocabulary size disagree"
            )
        if (tokens[ends - 1] != self.eos_id).any():
            row = int(np.argmax(tokens[ends - 1] != self.eos_id))
            raise ValueError(f"document {columns[0][row]} ends with {tokens[ends[row] - 1]}, not EOS ({self.eos_id})")

    def _count(self, sources: pa.Array, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        encoded = sources.dictionary_encode()
        codes = encoded.indices.to_numpy()
        documents = np.bincount(codes)
        # float64 sums are exact here: no batch holds 2^53 tokens or bytes
        tokens = np.bincount(codes, weights=lengths)
        size = np.bincount(codes, weights=text_bytes)
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            counts = self._sources.setdefault(name, [0, 0, 0])
            for column, sums in enumerate((documents, tokens, size)):
                counts[column] += int(sums[code])

    def _finish_shard(self) -> None:
        self._shards.append(self._shard.publish(offset=len(self._shards) * self.shard_tokens))
        self._shard = OpenShard(self.directory, len(self._shards), self.dtype.itemsize, OpenShard.EMPTY)

    def checkpoint(self) -> dict[str, Any]:
        """Make everything appended so far survive a crash; returns the JSON-able state that `resume` takes."""
        with self._writing():
            self._shard.sync()
            sync_directory(self.directory)
        return {
            "settings": self._settings,
            "shards": len(self._shards),
            "open": self._shard.state(),
            "sources": {name: list(counts) for name, counts in self._sources.items()},
        }

    def finish(self, *, backend: str, recipe: dict[str, Any]) -> Manifest:
        """Write the last shard, tokenizer.json and, last, dataset.json.

        Args:
            backend: the library that encoded the text.
            recipe: how the dataset was made, as JSON.

        Raises:
            UserError: no document was appended, or the disk is full.
        """
        if not self.documents:
            raise UserError(f"{self.directory}: no document to write: the input is empty or all of it was left out")
        with self._writing():
            if self._shard.tokens:
                self._finish_shard()
            self._shard.discard()
            write_atomic(self.directory / TOKENIZER, self._tokenizer_json)
            manifest = self._manifest(backend, recipe)
            manifest.write(self.directory)
        return manifest

    def _manifest(self, backend: str, recipe: dict[str, Any]) -> Manifest:
        sources = {name: dict(zip(_COUNTS, counts, strict=True)) for name, counts in sorted(self._sources.items())}
        return Manifest(
            format_version=FORMAT_VERSION,
            dtype=self.dtype.name,
            **self._settings,
            tokens=sum(entry.tokens for entry in self._shards),
            documents=self.documents,
            text_bytes=sum(counts["text_bytes"] for counts in sources.values()),
            sources=sources,
            backend=backend,
            recipe=recipe,
            fingerprint=dataset_fingerprint(self.dtype.name, self._settings["tokenizer_hash"], self._shards),
            shards=tuple(self._shards),
        )

    def close(self) -> None:
        """Let go of the open files without finishing; the last checkpoint can be resumed."""
        self._shard.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """After a write that failed half-way the files are no longer what the counters say: only a resume may go on."""
        if self._failed:
            raise RuntimeError(f"{self.directory}: an earlier write failed; resume from the last checkpoint")
        self._failed = True
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or self.directory}: cannot be written ({error.strerror or error}); "
                "once that is mended, run the same command again: it goes on from the last checkpoint"
            ) from error
        self._failed = False


def _strings(column: pa.Array) -> pa.Array:
    if column.null_count:
        raise ValueError("ids and sources must not be null")
    return column.cast(pa.large_string())
