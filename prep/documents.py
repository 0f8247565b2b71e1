"""What readers give: blocks of the input, and the documents in them as Arrow batches (`id`, `text`, `source`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

BLOCK_BYTES = 4 << 20
MAX_DOCUMENT_BYTES = 1 << 30
MIN_ROWS = 1_000  # before that many rows a share of bad ones says little
EXCERPT_BYTES = 200


class Columns(NamedTuple):
    """Which columns hold the text and the id; without `id`, a column named `id` is used where there is one."""

    text: str = "text"
    id: str | None = None


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
    """The rest of a file cannot be read."""


@dataclass(frozen=True)
class Input:
    """One file: `name` stands in the ids that it gives to its documents, `source` in their provenance."""

    path: Path
    name: str
    source: str
    kind: Literal["rows", "parquet", "text"]
    size: int


@dataclass
class Documents:
    """What a block holds: `batch` has the string columns id, text, source, no text is empty; `rows` counts all rows."""

    batch: pa.RecordBatch
    rows: int = 0
    empty: int = 0
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """A part of the input that is parsed at once, by `load`, in any thread.

    Attributes:
        load: reads the documents.
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


def make_documents(item: Input, ids: pa.Array, texts: pa.Array) -> Documents:
    """Documents from whole columns, no nulls in them; empty texts are dropped and counted."""
    rows = len(texts)
    filled = pc.greater(pc.binary_length(texts), 0)
    if (empty := rows - (filled.true_count)) > 0:
        ids, texts = ids.filter(filled), texts.filter(filled)
    sources = pa.repeat(pa.scalar(item.source), len(texts))
    batch = pa.RecordBatch.from_arrays([ids, texts, sources], names=["id", "text", "source"])
    return Documents(batch, rows=rows, empty=empty)


class RowCollector:
    """Builds a block row by row, where whole columns do not do: bad rows are set aside with their reason."""

    def __init__(self, item: Input) -> None:
        self.item = item
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.rows = 0
        self.rejected: list[Rejected] = []

    def add(self, identity: str, text: str) -> None:
        """Take a document."""
        self.rows += 1
        self.ids.append(identity)
        self.texts.append(text)

    def reject(self, row: int, reason: str, raw: bytes) -> None:
        """Set a row aside."""
        self.rows += 1
        excerpt = raw[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")
        self.rejected.append(Rejected(str(self.item.path), row, reason, excerpt))

    def documents(self) -> Documents:
        """The block."""
        documents = make_documents(self.item, pa.array(self.ids, pa.string()), pa.array(self.texts, pa.string()))
        documents.rows, documents.rejected = self.rows, self.rejected
        return documents
