"""Reads a whole dataset and lists what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shards.errors import UserError
from shards.format import (
    COPY_AGAIN,
    HEADER_BYTES,
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardEntry,
    bin_path,
    dataset_fingerprint,
    documents_path,
    idx_path,
    tokenizer_hash,
)
from shards.reader import check_files

_CHUNK = 2**24  # tokens hashed at a time


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a full read of a dataset found; `problems` is empty if all is well."""

    path: Path
    shards: int
    tokens: int
    documents: int
    problems: tuple[str, ...]


def verify_dataset(path: str | Path, progress: Callable[[int], object] | None = None) -> Verification:
    """Read every file of a dataset and compare it with the manifest.

    Checked: sizes, headers and checksums; ids below the vocabulary size; document ends that rise, stand behind an EOS
    and reach the end of the stream; documents-*.parquet against the ends and the manifest; tokenizer; fingerprint.

    Args:
        path: the dataset directory (its `val/` is a dataset of its own).
        progress: called with the number of tokens after each chunk.
    """
    path = Path(path)
    try:
        manifest = Manifest.read(path)
    except UserError as error:
        return Verification(path, 0, 0, 0, (str(error),))
    try:
        problems = list(_problems(path, manifest, progress or (lambda tokens: None)))
    except OSError as error:
        problems = [f"{error.filename or path}: cannot be read ({error.strerror or error}); {COPY_AGAIN}"]
    return Verification(path, len(manifest.shards), manifest.tokens, manifest.documents, tuple(problems))


def _problems(path: Path, manifest: Manifest, progress: Callable[[int], object]) -> Iterator[str]:
    if manifest.fingerprint != dataset_fingerprint(manifest.dtype, manifest.tokenizer_hash, manifest.shards):
        yield f"{path}/{MANIFEST}: the fingerprint is not that of its checksums; {COPY_AGAIN}"
    tokenizer = path / TOKENIZER
    try:
        if tokenizer_hash(tokenizer.read_bytes()) != manifest.tokenizer_hash:
            yield f"{tokenizer} is not the tokenizer that made this dataset; copy the right one"
    except FileNotFoundError:
        yield f"{tokenizer} is missing; {COPY_AGAIN}"
    except UserError as error:
        yield f"{tokenizer.parent}/{error}"
    broken = list(check_files(path, manifest))
    if broken:  # sizes decide what the rest would read
        yield from broken
        return
    sources: dict[str, list[int]] = {}
    previous = 0  # stream position where the last document ended
    for index, entry in enumerate(manifest.shards):
        ends = np.fromfile(idx_path(path, index), "<u4", offset=HEADER_BYTES).astype(np.int64)
        yield from _idx_problems(idx_path(path, index), entry, ends)
        yield from _bin_problems(bin_path(path, index), entry, manifest, ends, progress)
        lengths = np.diff(ends + entry.offset, prepend=previous)
        yield from _document_problems(documents_path(path, index), entry, lengths, sources)
        previous += int(lengths.sum())
    if previous != manifest.tokens:
        yield f"{path}: the last document ends at token {previous:,} of {manifest.tokens:,}; {COPY_AGAIN}"
    counted = {name: {"documents": counts[0], "tokens": counts[1]} for name, counts in sources.items()}
    listed = {name: {k: counts.get(k) for k in ("documents", "tokens")} for name, counts in manifest.sources.items()}
    if counted != listed:
        yield f"{path}/{MANIFEST}: sources {listed}, but documents-*.parquet hold {counted}; {COPY_AGAIN}"


def _idx_problems(file: Path, entry: ShardEntry, ends: np.ndarray) -> Iterator[str]:
    if xxhash.xxh3_64_hexdigest(ends.astype("<u4").data) != entry.idx_xxh3:
        yield f"{file}: the checksum differs: bytes have changed since it was written; {COPY_AGAIN}"
    if len(ends) and (ends[0] < 1 or ends[-1] > entry.tokens or (ends[1:] <= ends[:-1]).any()):
        yield f"{file}: document ends do not rise inside the shard; {COPY_AGAIN}"


def _bin_problems(
    file: Path, entry: ShardEntry, manifest: Manifest, ends: np.ndarray, progress: Callable[[int], object]
) -> Iterator[str]:
    checksum, largest, all_end = xxhash.xxh3_64(), 0, True
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    for start in range(0, entry.tokens, _CHUNK):
        # read, not mapped: a failing disk is then an error that can be reported
        tokens = np.fromfile(file, dtype, min(_CHUNK, entry.tokens - start), offset=start * dtype.itemsize)
        checksum.update(tokens.data)
        largest = max(largest, int(tokens.max()))
        last = ends[(ends > start) & (ends <= start + len(tokens))] - start - 1
        all_end = all_end and bool((tokens[last] == manifest.eos_id).all())
        progress(len(tokens))
    if checksum.hexdigest() != entry.bin_xxh3:
        yield f"{file}: the checksum differs: bytes have changed since it was written; {COPY_AGAIN}"
    if largest >= manifest.vocab_size:
        yield f"{file}: token id {largest:,} is not below the vocabulary size {manifest.vocab_size:,}; {COPY_AGAIN}"
    if not all_end:
        yield f"{file}: a document ends without EOS (id {manifest.eos_id}); {COPY_AGAIN}"


def _document_problems(
    file: Path, entry: ShardEntry, lengths: np.ndarray, sources: dict[str, list[int]]
) -> Iterator[str]:
    try:
        table = pq.read_table(file, columns=["id", "source", "tokens"])
    except FileNotFoundError:
        yield f"{file} is missing; {COPY_AGAIN}"
        return
    except (OSError, pa.ArrowException) as error:
        yield f"{file}: cannot be read ({error}); {COPY_AGAIN}"
        return
    if table.num_rows != entry.documents:
        yield f"{file}: {table.num_rows:,} rows, but {entry.documents:,} documents end in the shard; {COPY_AGAIN}"
        return
    wrong = table["tokens"].to_numpy() != lengths
    if wrong.any():
        row = int(np.argmax(wrong))
        yield f"{file}: row {row} says {table['tokens'][row]} tokens, the .idx file {lengths[row]}; {COPY_AGAIN}"
    for group in table.group_by("source").aggregate([("tokens", "count"), ("tokens", "sum")]).to_pylist():
        counts = sources.setdefault(group["source"], [0, 0])
        counts[0] += group["tokens_count"]
        counts[1] += group["tokens_sum"]
