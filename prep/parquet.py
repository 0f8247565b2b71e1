"""Parquet files as blocks of documents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.parquet

from prep.documents import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    BrokenInput,
    Columns,
    Documents,
    Input,
    Piece,
    RowCollector,
    make_documents,
)
from shards.errors import UserError

MAX_BATCH_ROWS = 1 << 16
MAX_BATCH_BYTES = 256 << 20


def open_parquet(item: Input, columns: Columns) -> tuple[pyarrow.parquet.ParquetFile, str | None]:
    """Open a file and find its id column (None: documents are named by file and row).

    Raises:
        UserError: not a Parquet file, or a column that is missing or of a wrong type; names the columns found.
    """
    try:
        file = pyarrow.parquet.ParquetFile(item.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{item.path}: not a readable Parquet file: {error}") from None
    types = {column.name: column.type for column in file.schema_arrow}
    found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    for name, option in ((columns.text, "--text-column"), (columns.id, "--id-column")):
        if name is not None and name not in types:
            raise UserError(f"{item.path}: no column '{name}'; columns found: {found}. Name one with {option}")
    if not _is_text(types[columns.text]):
        raise UserError(
            f"{item.path}: column '{columns.text}' holds {types[columns.text]}, not text; columns found: {found}. "
            f"Name the text with --text-column"
        )
    key = columns.id or ("id" if "id" in types else None)
    if key and not (_is_text(types[key]) or pa.types.is_integer(types[key])):
        if columns.id:
            raise UserError(f"{item.path}: column '{key}' holds {types[key]}; an id is text or a whole number")
        key = None
    return file, key


def parquet_blocks(item: Input, columns: Columns, start: int) -> Iterator[Piece]:
    """Blocks of a file that begin at row `start` or later; row groups before it are not read.

    Raises:
        BrokenInput: a row group that cannot be read.
    """
    file, key = open_parquet(item, columns)
    wanted = list(dict.fromkeys([columns.text, *([key] if key else [])]))
    total = max(file.metadata.num_rows, 1)
    row = 0
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        if row + metadata.num_rows <= start:
            row += metadata.num_rows
            continue
        stored = (metadata.column(index) for index in range(metadata.num_columns))
        size = sum(column.total_uncompressed_size for column in stored if column.path_in_schema in wanted)
        batch_rows = max(1, min(MAX_BATCH_ROWS, metadata.num_rows * BLOCK_BYTES // max(size, 1)))
        try:
            for whole in file.iter_batches(batch_rows, row_groups=[group], columns=wanted, use_threads=False):
                for batch in _bounded(whole):
                    first, row = row, row + batch.num_rows
                    if first >= start:
                        load = partial(_documents, batch, item, columns, key, first)
                        yield Piece(load, batch.nbytes, row, item.size * row // total)
        except (pa.ArrowException, OSError) as error:
            raise BrokenInput(f"row group {group} cannot be read ({error})") from None


def _bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch, halved until each part is small or one row: rows may be far larger than the mean of their group."""
    if batch.nbytes <= MAX_BATCH_BYTES or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _bounded(batch.slice(0, half))
    yield from _bounded(batch.slice(half))


def _documents(batch: pa.RecordBatch, item: Input, columns: Columns, key: str | None, first: int) -> Documents:
    rows = RowCollector(item)
    if batch.num_rows == 1 and not _is_dictionary(batch) and batch.nbytes > MAX_DOCUMENT_BYTES:
        rows.reject(first + 1, f"{batch.nbytes:,} bytes; no document is larger than {MAX_DOCUMENT_BYTES:,} bytes", b"")
        return rows.documents()
    try:
        texts = batch.column(columns.text).cast(pa.string())
        ids = batch.column(key).cast(pa.string()) if key else None
    except pa.ArrowException as error:  # a dictionary of few long texts may stand for more than 2 GB
        raise UserError(
            f"{item.path}: rows {first + 1:,} to {first + batch.num_rows:,} cannot be taken as text ({error}); "
            f"write the file again with smaller row groups"
        ) from None
    if ids is None:
        ids = pa.array([f"{item.name}:{row}" for row in range(first + 1, first + 1 + len(texts))], pa.string())
    try:
        texts.validate(full=True)
        ids.validate(full=True)
        if not texts.null_count and not ids.null_count:
            return make_documents(item, ids, texts)
    except pa.ArrowInvalid:
        pass
    pairs = zip(ids.cast(pa.binary()).to_pylist(), texts.cast(pa.binary()).to_pylist(), strict=True)
    for number, (identity, text) in enumerate(pairs, first + 1):
        if text is None:
            rows.reject(number, f"column '{columns.text}' is null", b"")
            continue
        try:
            rows.add(identity.decode() if identity is not None else f"{item.name}:{number}", text.decode())
        except UnicodeDecodeError as error:
            rows.reject(number, f"not UTF-8 ({error.reason} at byte {error.start:,})", text)
    return rows.documents()


def _is_dictionary(batch: pa.RecordBatch) -> bool:
    return any(pa.types.is_dictionary(kind) for kind in batch.schema.types)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
