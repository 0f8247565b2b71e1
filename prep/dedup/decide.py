"""Between the passes: from the arrays of all parts to the documents that go.

    digests  -> exact copies                                  in memory, 16 bytes per document
    keys     -> edges, one band at a time, bands as tasks     scratch/edges/band-00.npy
    edges    -> candidates                                    scratch/candidates/part-N.npy: rows of each part
                (a pass over the parts that hold any makes their shingles)
    shingles -> verified duplicates                           a memory map
             -> decisions                                     scratch/decisions/part-N.parquet, duplicates.parquet

Documents are numbered through all parts in order, those of the reference first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from prep.arrays import array_length, load_array, read_row, save_array
from prep.dedup.clusters import (
    NOBODY,
    Duplicates,
    candidates,
    cluster_sizes,
    find_edges,
    make_ranks,
    merge_edges,
    resolve,
    settle,
)
from prep.dedup.exact import find_copies
from prep.dedup.passes import DECISIONS, DIGEST_ROWS, DOCUMENTS, read_ids
from prep.dedup.settings import DedupSettings
from prep.executors import Executor
from prep.parts import part_name
from prep.progress import counted
from prep.stages import BINS
from prep.storage import Folder

RANKS, EDGES, DECIDED = "ranks.npy", "edges", "decisions"
CANDIDATES, REFERENCE_CANDIDATES = "candidates", "reference-candidates"
AUDIT = "duplicates.parquet"
AUDIT_COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("keeper", pa.string()),
        ("keeper_source", pa.string()),
        ("similarity", pa.float64()),
        ("method", pa.string()),
        ("cluster_size", pa.int64()),
    ]
)


class PartArrays(NamedTuple):
    """A part of pass 1.

    Attributes:
        folder: of its arrays.
        number: its number there.
        source: of its documents.
        documents: how many it left.
        keys: of the arrays that it made, as its state says; others in the folder are of an earlier run.
    """

    folder: Folder
    number: int
    source: str
    documents: int
    keys: frozenset[str] = frozenset()

    def name(self, key: str) -> str:
        """File of one of its arrays."""
        return f"{part_name(self.number)}.{key}.npy"

    def load(self, key: str) -> np.ndarray:
        """One of its arrays."""
        return load_array(self.folder, self.name(key))

    def load_row(self, key: str, row: int) -> np.ndarray:
        """A row of one of them."""
        return read_row(self.folder, self.name(key), row)

    def length(self, key: str) -> int:
        """Items on the last axis of one of them; 0 if it made none."""
        return array_length(self.folder, self.name(key)) if key in self.keys else 0


@dataclass(frozen=True)
class Corpus:
    """All parts of pass 1, in order: first those of the reference, `reference` of them, then those to deduplicate."""

    parts: tuple[PartArrays, ...]
    reference: int = 0

    def starts(self) -> np.ndarray:
        """Number of the first document of each part, and of all; int64 [parts + 1]."""
        return np.cumsum([0, *(part.documents for part in self.parts)])

    def reference_documents(self) -> int:
        """How many documents the reference has."""
        return sum(part.documents for part in self.parts[: self.reference])

    def load(self, key: str, dtype: type, row: int | None = None, *, reference: bool = True) -> np.ndarray:
        """An array of all documents, [n], or one row of it; without `reference`, of those to deduplicate."""
        parts = self.parts[0 if reference else self.reference :]
        starts = np.cumsum([0, *(part.documents for part in parts)])
        found = np.empty(starts[-1], dtype)
        for part, (begin, end) in zip(parts, pairwise(starts), strict=True):
            if part.documents:
                found[begin:end] = part.load(key) if row is None else part.load_row(key, row)
        return found


@dataclass(frozen=True)
class Band:
    """A task: the edges of one band."""

    corpus: Corpus
    scratch: Folder
    number: int


class Found(NamedTuple):
    """What the decisions were: for the report and the audit table."""

    duplicates: Duplicates
    copies: np.ndarray
    candidates: int
    verified: int


def find_exact(corpus: Corpus, settings: DedupSettings, scratch: Folder) -> tuple[np.ndarray, np.ndarray]:
    """Exact copies; writes the ranks of the documents that are none for the bands.

    Returns:
        keeper among exact copies, int64 [n], itself for a document that is none and for the reference; ranks, uint32.
    """
    reference = corpus.reference_documents()
    best = None if settings.keep == "first" else corpus.load("best", np.float64, reference=False)
    ranks = make_ranks(int(corpus.starts()[-1]), best=best, reference=reference)
    digests = np.empty((DIGEST_ROWS, len(ranks)), np.uint64)
    for row in range(DIGEST_ROWS):
        digests[row] = corpus.load("hashes", np.uint64, row)
    copies = find_copies(digests, ranks)
    if settings.method == "minhash":
        save_array(scratch, RANKS, np.where(copies == np.arange(len(copies)), ranks, NOBODY))
    copies[:reference] = np.arange(reference)
    return copies, ranks


def find_band(band: Band) -> int:
    """Find and write the edges of a band, unless they are there; how many there are. Runs on any worker."""
    folder, name = band.scratch.child(EDGES), f"band-{band.number:02d}.npy"
    if folder.exists(name):
        return len(load_array(folder, name))
    keys = band.corpus.load("hashes", np.uint64, DIGEST_ROWS + band.number)
    edges = find_edges(keys, load_array(band.scratch, RANKS), band.corpus.reference_documents())
    save_array(folder, name, edges)
    return len(edges)


def find_near(
    corpus: Corpus,
    settings: DedupSettings,
    scratch: Folder,
    executor: Executor,
    ranks: np.ndarray,
    shingle: Callable[[Sequence[PartArrays]], Sequence[PartArrays]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Near-duplicates among the documents that are no exact copies.

    Args:
        corpus: pass 1.
        settings: options.
        scratch: a folder for what lies between the passes.
        executor: runs the bands.
        ranks: of `find_exact`.
        shingle: makes the shingles of the documents whose rows `write_candidates` wrote, for the parts that hold any;
            gives the same parts with the folders of these arrays.

    Returns:
        The documents that were candidates, int64 [c], the keeper of each (a position among them) and the similarity to
        it, and how many pairs were verified.
    """
    bands = [Band(corpus, scratch, number) for number in range(settings.bands)]
    for _ in counted("dedup: bands", executor.map(find_band, bands), len(bands)):
        pass
    names = (f"band-{number:02d}.npy" for number in range(settings.bands))
    edges = merge_edges(load_array(scratch.child(EDGES), name) for name in names)
    chosen = candidates(edges)
    by_rank = np.empty(len(ranks), np.uint32)
    by_rank[ranks] = np.arange(len(ranks), dtype=np.uint32)
    documents = by_rank[chosen].astype(np.int64)
    del by_rank
    held = write_candidates(corpus, np.sort(documents), scratch)
    with _joined(shingle(held), scratch.local) as (hashes, sizes):
        order = np.argsort(documents)
        ends = np.empty(len(documents), np.int64)
        begins = np.empty_like(ends)
        ends[order] = np.cumsum(sizes)
        begins[order] = ends[order] - sizes
        keeper, similarity, verified = resolve(edges, chosen, begins, ends, hashes, settings.threshold)
    return documents, keeper, similarity, verified


def find_duplicates(
    corpus: Corpus,
    settings: DedupSettings,
    scratch: Folder,
    executor: Executor,
    shingle: Callable[[Sequence[PartArrays]], Sequence[PartArrays]],
) -> Found:
    """Exact copies and, for the method "minhash", near-duplicates; arguments as for `find_near`."""
    copies, ranks = find_exact(corpus, settings, scratch)
    if settings.method == "exact":
        return Found(Duplicates(copies, np.ones(len(copies))), copies, 0, 0)
    documents, keeper, similarity, verified = find_near(corpus, settings, scratch, executor, ranks, shingle)
    return Found(settle(copies, documents, keeper, similarity), copies, len(documents), verified)


def write_candidates(corpus: Corpus, documents: np.ndarray, scratch: Folder) -> list[PartArrays]:
    """Write the rows of the candidates of each part (documents sorted), and at their end how many documents it has.

    Returns:
        The parts that hold any, with how many.
    """
    held = []
    for position, (begin, end) in enumerate(pairwise(corpus.starts())):
        first, last = np.searchsorted(documents, [begin, end])
        if first < last:
            part = corpus.parts[position]
            folder = scratch.child(CANDIDATES if position >= corpus.reference else REFERENCE_CANDIDATES)
            rows = np.append(documents[first:last] - begin, end - begin)
            save_array(folder, f"{part_name(part.number)}.npy", rows, durable=False)
            held.append(part._replace(documents=int(last - first)))
    return held


def count_removed(corpus: Corpus, keeper: np.ndarray) -> dict[str, list[int]]:
    """For each source, its documents and how many of them go."""
    sources: dict[str, list[int]] = {}
    gone = keeper != np.arange(len(keeper))
    pairs = list(zip(corpus.parts, pairwise(corpus.starts()), strict=True))
    for part, (begin, end) in pairs[corpus.reference :]:
        entry = sources.setdefault(part.source, [0, 0])
        entry[0] += part.documents
        entry[1] += int(gone[begin:end].sum())
    return sources


def write_decisions(corpus: Corpus, found: Found, scratch: Folder, out: Folder, name: str = AUDIT) -> None:
    """Write `decisions/part-N.parquet` for each part, which are not synced, and the audit table.

    Pass 2 must see as many documents in a part as its file says in the metadata, and those that go under their ids.
    """
    keeper, similarity = found.duplicates
    starts = corpus.starts()
    gone = keeper != np.arange(len(keeper))
    sizes = np.bincount(keeper[gone], minlength=0) + 1 if gone.any() else np.zeros(0, np.int64)
    keepers = np.unique(keeper[gone])
    keeper_ids = _take_ids(corpus, keepers)
    keeper_parts = np.searchsorted(starts, keepers, side="right") - 1
    sources = pa.array([part.source for part in corpus.parts], pa.string())
    keeper_sources = sources.take(pa.array(keeper_parts)) if len(keepers) else pa.array([], pa.string())
    with (
        out.create(name) as file,
        pyarrow.parquet.ParquetWriter(file, AUDIT_COLUMNS, compression="zstd") as audit,
    ):
        for part, (begin, end) in list(zip(corpus.parts, pairwise(starts), strict=True))[corpus.reference :]:
            rows = np.flatnonzero(gone[begin:end])
            documents = begin + rows
            places = pa.array(np.searchsorted(keepers, keeper[documents]))
            copied = found.copies[documents]
            near = pa.array((copied == documents) | (keeper[documents] != copied))
            method = pc.if_else(near, "minhash", "exact")
            columns = [keeper_ids.take(places), keeper_sources.take(places), pa.array(similarity[documents])]
            ids = _ids_of(part).take(pa.array(rows)) if len(rows) else pa.array([], pa.string())
            schema = DECISIONS.with_metadata({DOCUMENTS: str(part.documents)})
            decided = pa.table([pa.array(rows), ids, method, *columns], schema=schema)
            with scratch.child(DECIDED).create(f"{part_name(part.number)}.parquet", durable=False) as target:
                pyarrow.parquet.write_table(decided, target, compression="zstd")
            if not len(rows):
                continue
            source = pa.repeat(pa.scalar(part.source), len(rows))
            cluster = pa.array(sizes[keeper[documents]], pa.int64())
            audit.write_table(pa.table([ids, source, *columns, method, cluster], schema=AUDIT_COLUMNS))


def summarise(corpus: Corpus, found: Found, settings: DedupSettings) -> dict[str, Any]:
    """The entry `dedup` of report.json."""
    keeper, similarity = found.duplicates
    gone = keeper != np.arange(len(keeper))
    counts, edges = np.histogram(similarity[gone], bins=BINS, range=(0, 1))
    minhash = settings.method == "minhash"
    return {
        "method": settings.method,
        "threshold": settings.threshold if minhash else 1.0,
        "bands": settings.bands if minhash else None,
        "rows": settings.rows if minhash else None,
        "documents": len(keeper) - corpus.reference_documents(),
        "removed": int(gone.sum()),
        "candidates": found.candidates if minhash else None,
        "verified": found.verified if minhash else None,
        "clusters": {str(size): number for size, number in cluster_sizes(keeper).items()},
        "similarity": {"edges": edges.tolist(), "counts": counts.tolist()} if minhash else None,
    }


@contextmanager
def _joined(parts: Sequence[PartArrays], folder: Path | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The shingles of all candidates, in order, as a memory map of a file that nobody sees; and their numbers."""
    sizes = [part.load("sizes") for part in parts]
    total = sum(int(size.sum()) for size in sizes)
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(part.load("hashes").data)
        file.write(b"\0" * 8)  # an empty file cannot be mapped
        file.flush()
        mapped = np.memmap(file, np.uint64, "r", shape=(total + 1,))
        yield mapped[:total], np.concatenate([np.zeros(0, np.int64), *sizes])
        del mapped


def _ids_of(part: PartArrays) -> pa.Array:
    return read_ids(part.load("ids")).cast(pa.string())


def _take_ids(corpus: Corpus, documents: np.ndarray) -> pa.Array:
    """The ids of documents, sorted."""
    found = [pa.array([], pa.string())]
    for part, (begin, end) in zip(corpus.parts, pairwise(corpus.starts()), strict=True):
        first, last = np.searchsorted(documents, [begin, end])
        if first < last:
            found.append(_ids_of(part).take(pa.array(documents[first:last] - begin)))
    return pa.concat_arrays(found)
