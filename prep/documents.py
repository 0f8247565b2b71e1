"""What readers give: blocks of the input, and the documents in them as Arrow batches (`id`, `text`, `source`, …)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK_BYTES = 4 << 20
MAX_DOCUMENT_BYTES = 1 << 30
MIN_ROWS = 1_000  # before that many rows a share of bad ones says little
EXCERPT_BYTES = 200
DOCUMENT = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])
Kind = Literal["rows", "parquet", "csv", "arrow", "text"]


class Columns(NamedTuple):
    """Which columns hold the text and the id, and which others to `keep`.

    Without `id`, a column named `id` is used where there is one, and else documents are named by file and row.
    """

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()


class Position(NamedTuple):
    """A place in the input: the number of the file, and the row in it (both from 0)."""

    input: int = 0
    row: int = 0


START = Position()


class Rejected(NamedTuple):
    """A row that is not a document: its file, its row (in JSON the line; from 1), why, and how it begins."""

    file: str
    row: int
    reason: str
    excerpt: str


class BrokenInput(Exception):
    """A part of a file, or its rest, cannot be read."""


@dataclass(frozen=True)
class Input:
    """One file.

    Attributes:
        path: a local path or an address.
        name: stands in the ids that it gives to its documents.
        source: stands in their provenance.
        kind: how it is read.
        size: bytes.
        modified: when it was changed, in nanoseconds.
    """

    path: str
    name: str
    source: str
    kind: Kind
    size: int
    modified: int = 0


@dataclass
class Documents:
    """What a block holds: `batch` has the columns of DOCUMENT and those to keep, no empty text; `rows` counts all."""

    batch: pa.RecordBatch
    rows: int = 0
    empty: int = 0
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """A part of the input that is parsed at once, by `load`, in any thread or process (blocks pickle).

    Attributes:
        load: reads the documents; raises BrokenInput where they cannot be read. The blocks behind it can be.
        size: bytes of text in it, roughly.
        end: the position behind it, where another run can go on.
        consumed: bytes of all files, as they lie on the disk, up to its end.
        broken: why the rest of its file cannot be read, if so.
    """

    load: Callable[[], Documents]
    size: int
    end: Position
    consumed: int
    broken: str | None = None


class Piece(NamedTuple):
    """A block of one file: `row` is the row behind it, `consumed` the bytes of this file up to its end."""

    load: Callable[[], Documents]
    size: int
    row: int
    consumed: int


def too_many_bad(bad: int, rows: int, share: float) -> bool:
    """Whether more than a share of the rows is bad, where there are enough rows to tell."""
    return rows >= MIN_ROWS and bad > share * rows


def make_documents(
    item: Input, ids: pa.Array, texts: pa.Array, kept: Sequence[pa.Array], schema: pa.Schema
) -> Documents:
    """Documents from whole columns.

    Args:
        item: the file.
        ids: strings, no nulls.
        texts: strings, no nulls; empty ones are dropped and counted.
        kept: the columns to keep, of their types in `schema`.
        schema: of the batch.
    """
    rows = len(texts)
    filled = pc.greater(pc.binary_length(texts), 0)
    columns = [ids, texts, pa.repeat(pa.scalar(item.source), rows), *kept]
    if (empty := rows - filled.true_count) > 0:
        columns = [column.filter(filled) for column in columns]
    return Documents(pa.RecordBatch.from_arrays(columns, schema=schema), rows=rows, empty=empty)


def row_ids(item: Input, numbers: np.ndarray) -> pa.Array:
    """Ids of documents that have none: `FILE:ROW` for row numbers, [rows]."""
    return pc.binary_join_element_wise(f"{item.name}:", pa.array(numbers).cast(pa.string()), "")


def excerpt(raw: bytes) -> str:
    """How a bad row begins."""
    return raw[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")


class RowCollector:
    """Builds a block row by row, where whole columns do not do: bad rows are set aside with their reason."""

    def __init__(self, item: Input, schema: pa.Schema = DOCUMENT) -> None:
        self.item, self.schema = item, schema
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.kept: list[Sequence[Any]] = []
        self.rows = 0
        self.rejected: list[Rejected] = []

    def add(self, identity: str, text: str, kept: Sequence[Any] | None = None) -> None:
        """Take a document, with the values of the columns to keep; None: it has none of them."""
        self.rows += 1
        self.ids.append(identity)
        self.texts.append(text)
        self.kept.append(kept if kept is not None else (None,) * (len(self.schema) - len(DOCUMENT)))

    def reject(self, row: int, reason: str, raw: bytes) -> None:
        """Set a row aside."""
        self.rows += 1
        self.rejected.append(Rejected(self.item.path, row, reason, excerpt(raw)))

    def documents(self) -> Documents:
        """The block."""
        fields = list(self.schema)[len(DOCUMENT) :]
        kept = [pa.array([row[index] for row in self.kept], field.type) for index, field in enumerate(fields)]
        ids, texts = pa.array(self.ids, pa.string()), pa.array(self.texts, pa.string())
        documents = make_documents(self.item, ids, texts, kept, self.schema)
        documents.rows, documents.rejected = self.rows, self.rejected
        return documents
