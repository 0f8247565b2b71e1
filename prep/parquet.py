"""Parquet files as blocks of documents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.parquet

from prep.documents import BLOCK_BYTES, BrokenInput, Columns, Documents, Input, Piece, RowCollector, make_documents
from shards.errors import UserError

MAX_BATCH_ROWS = 1 << 16


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
            for batch in file.iter_batches(batch_rows, row_groups=[group], columns=wanted, use_threads=False):
                first, row = row, row + batch.num_rows
                if first >= start:
                    load = partial(_documents, batch, item, columns, key, first)
                    yield Piece(load, batch.nbytes, row, item.size * row // total)
        except (pa.ArrowInvalid, OSError) as error:
            raise BrokenInput(f"row group {group} cannot be read ({error})") from None


def _documents(batch: pa.RecordBatch, item: Input, columns: Columns, key: str | None, first: int) -> Documents:
    texts = batch.column(columns.text).cast(pa.string())
    if key:
        ids = batch.column(key).cast(pa.string())
    else:
        ids = pa.array([f"{item.name}:{row}" for row in range(first + 1, first + 1 + len(texts))], pa.string())
    try:
        texts.validate(full=True)
        ids.validate(full=True)
        if not texts.null_count and not ids.null_count:
            return make_documents(item, ids, texts)
    except pa.ArrowInvalid:
        pass
    rows = RowCollector(item)
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


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
