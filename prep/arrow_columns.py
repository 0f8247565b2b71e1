"""Documents from batches of columns, as Parquet, Arrow and CSV files give them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.documents import (
    DOCUMENT,
    MAX_DOCUMENT_BYTES,
    Columns,
    Documents,
    Input,
    Rejected,
    RowCollector,
    excerpt,
    make_documents,
    row_ids,
)
from shards.errors import UserError

MAX_BATCH_BYTES = 256 << 20


def find_key(item: Input, types: dict[str, pa.DataType], columns: Columns) -> str | None:
    """The id column of a file with such columns; None: documents are named by file and row.

    Raises:
        UserError: a column that is missing or of a wrong type; names the columns found.
    """
    found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    for name, option in ((columns.text, "--text-column"), (columns.id, "--id-column")):
        if name is not None and name not in types:
            raise UserError(f"{item.path}: no column '{name}'; columns found: {found}. Name one with {option}")
    if not is_text(types[columns.text]):
        raise UserError(
            f"{item.path}: column '{columns.text}' holds {types[columns.text]}, not text; columns found: {found}. "
            f"Name the text with --text-column"
        )
    key = columns.id or ("id" if "id" in types else None)
    if key and not (is_text(types[key]) or pa.types.is_integer(types[key])):
        if columns.id:
            raise UserError(f"{item.path}: column '{key}' holds {types[key]}; an id is text or a whole number")
        key = None
    return key


def wanted_columns(types: dict[str, pa.DataType], columns: Columns, key: str | None) -> list[str]:
    """The columns of a file that are read."""
    return [name for name in dict.fromkeys([columns.text, *([key] if key else []), *columns.keep]) if name in types]


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch, halved until each part is small or one row: rows may be far larger than the mean of their group."""
    if batch.nbytes <= MAX_BATCH_BYTES or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from bounded(batch.slice(0, half))
    yield from bounded(batch.slice(half))


def batch_documents(
    batch: pa.RecordBatch, item: Input, columns: Columns, key: str | None, schema: pa.Schema, numbers: np.ndarray
) -> Documents:
    """Documents from a batch; rows whose values are no text, or do not fit their type, are set aside.

    Args:
        batch: the columns as the file has them.
        item: the file.
        columns: which of them are text and id.
        key: the id column, from `find_key`.
        schema: of the documents.
        numbers: of the rows, [rows]; from 1.

    Raises:
        UserError: more than 2 GB of text.
    """
    if batch.num_rows == 1 and not _is_dictionary(batch) and batch.nbytes > MAX_DOCUMENT_BYTES:
        rows = RowCollector(item, schema)
        reason = f"{batch.nbytes:,} bytes; no document is larger than {MAX_DOCUMENT_BYTES:,} bytes"
        rows.reject(int(numbers[0]), reason, b"")
        return rows.documents()
    kept = list(schema)[len(DOCUMENT) :]
    have = set(batch.schema.names)
    bad: dict[int, str] = {}
    try:
        texts = batch.column(columns.text).cast(pa.string())
        ids = batch.column(key).cast(pa.string()) if key else None
        values = [_kept(batch.column(field.name), field, bad) if field.name in have else None for field in kept]
    except pa.ArrowException as error:  # a dictionary of few long texts may stand for more than 2 GB
        raise UserError(
            f"{item.path}: rows {numbers[0]:,} to {numbers[-1]:,} cannot be taken as text ({error}); "
            f"write the file again with smaller row groups"
        ) from None
    arrays = [
        column if column is not None else pa.nulls(len(texts), field.type)
        for column, field in zip(values, kept, strict=True)
    ]
    named = [(columns.text, texts), *([(key or "", ids)] if ids is not None else [])]
    named += [(field.name, array) for field, array in zip(kept, arrays, strict=True) if pa.types.is_string(field.type)]
    for name, column in named:
        _check_text(name, column, bad)
    if texts.null_count:
        for row in np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False)).tolist():
            bad[row] = f"column '{columns.text}' is null"
    if ids is None:
        ids = row_ids(item, numbers)
    elif ids.null_count:
        ids = pc.coalesce(ids, row_ids(item, numbers))
    if not bad:
        return make_documents(item, ids, texts, arrays, schema)
    good = np.ones(len(texts), bool)
    good[list(bad)] = False
    mask = pa.array(good)
    documents = make_documents(item, ids.filter(mask), texts.filter(mask), [a.filter(mask) for a in arrays], schema)
    documents.rows = len(texts)
    raw = texts.cast(pa.binary())
    for row in sorted(bad):
        documents.rejected.append(Rejected(item.path, int(numbers[row]), bad[row], excerpt(raw[row].as_py() or b"")))
    return documents


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _kept(column: pa.Array, field: pa.Field, bad: dict[int, str]) -> pa.Array:
    """A column to keep in its settled type; values that do not fit become null and their rows bad."""
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid:
        values = []
        for row, value in enumerate(column):
            try:
                values.append(value.cast(field.type).as_py())
            except pa.ArrowInvalid:
                values.append(None)
                bad[row] = f"column '{field.name}' holds {value.as_py()!r}, not {field.type}"
        return pa.array(values, field.type)


def _check_text(name: str, column: pa.Array, bad: dict[int, str]) -> None:
    """Find the rows that are not UTF-8: pyarrow does not check where a file only claims to hold text."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                if value is not None:
                    value.decode()
            except UnicodeDecodeError as error:
                bad[row] = f"column '{name}': not UTF-8 ({error.reason} at byte {error.start:,})"


def _is_dictionary(batch: pa.RecordBatch) -> bool:
    return any(pa.types.is_dictionary(kind) for kind in batch.schema.types)
