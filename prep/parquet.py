"""Parquet files as blocks of documents.

A row group of moderate size is one block that is read where it is loaded, in any process; a larger one is read here and
cut into blocks of about 4 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from prep.arrow_columns import batch_documents, bounded, find_key, wanted_columns
from prep.documents import BLOCK_BYTES, BrokenInput, Columns, Documents, Input, Piece
from prep.storage import is_remote, open_input, raise_if_unreachable
from shards.errors import UserError

MAX_BATCH_ROWS = 1 << 16
WHOLE_GROUP_BYTES = 64 << 20  # of the wanted columns, uncompressed: such a row group is read where its block is loaded


def check_parquet(item: Input, columns: Columns) -> dict[str, pa.DataType]:
    """The columns of a file and their types.

    Raises:
        UserError: not a Parquet file, or a column that is missing or of a wrong type; names the columns found.
    """
    types = _types(_open(item))
    find_key(item, types, columns)
    return types


def parquet_blocks(
    item: Input, columns: Columns, schema: pa.Schema, start: int, whole_group_bytes: int = WHOLE_GROUP_BYTES
) -> Iterator[Piece]:
    """Blocks of a file that begin at row `start` or later; row groups before it are not read.

    Raises:
        BrokenInput: a row group that cannot be read; what lies in whole blocks is found when those are loaded.
    """
    file = _open(item)
    types = _types(file)
    key = find_key(item, types, columns)
    wanted = wanted_columns(types, columns, key)
    total = max(file.metadata.num_rows, 1)
    row = 0
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        if row + metadata.num_rows <= start or not metadata.num_rows:
            row += metadata.num_rows
            continue
        stored = (metadata.column(index) for index in range(metadata.num_columns))
        size = sum(column.total_uncompressed_size for column in stored if column.path_in_schema in wanted)
        if size <= whole_group_bytes and row >= start:
            load_group = partial(_load_group, item, columns, key, schema, group, row)
            row += metadata.num_rows
            yield Piece(load_group, size, row, item.size * row // total)
            continue
        batch_rows = max(1, min(MAX_BATCH_ROWS, metadata.num_rows * BLOCK_BYTES // max(size, 1)))
        try:
            for whole in file.iter_batches(batch_rows, row_groups=[group], columns=wanted, use_threads=False):
                for batch in bounded(whole):
                    first, row = row, row + batch.num_rows
                    if first >= start:
                        load = partial(_load_batch, batch, item, columns, key, schema, first)
                        yield Piece(load, batch.nbytes, row, item.size * row // total)
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(item.path, error)
            raise BrokenInput(f"row group {group} cannot be read ({error})") from None


def _load_group(item: Input, columns: Columns, key: str | None, schema: pa.Schema, group: int, first: int) -> Documents:
    """A whole row group.

    Raises:
        BrokenInput: it cannot be read.
    """
    try:
        file = _open(item, _metadata(item))
        wanted = wanted_columns(_types(file), columns, key)
        table = file.read_row_group(group, columns=wanted, use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise_if_unreachable(item.path, error)
        raise BrokenInput(
            f"{item.path}: row group {group} (from row {first + 1:,} on) cannot be read ({error})"
        ) from None
    batches = table.to_batches()
    if len(batches) > 1:  # a dictionary of few long texts may stand for more than 2 GB
        raise UserError(
            f"{item.path}: row group {group} holds more than 2 GB of text; write the file with smaller row groups"
        )
    return _load_batch(batches[0], item, columns, key, schema, first)


def _load_batch(
    batch: pa.RecordBatch, item: Input, columns: Columns, key: str | None, schema: pa.Schema, first: int
) -> Documents:
    return batch_documents(
        batch, item, columns, key, schema, np.arange(first + 1, first + 1 + batch.num_rows, dtype=np.int64)
    )


def _types(file: pyarrow.parquet.ParquetFile) -> dict[str, pa.DataType]:
    return {column.name: column.type for column in file.schema_arrow}


def _open(item: Input, metadata: pyarrow.parquet.FileMetaData | None = None) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(
            open_input(item.path), metadata=metadata, pre_buffer=is_remote(item.path), memory_map=False
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise_if_unreachable(item.path, error)
        raise UserError(f"{item.path}: not a readable Parquet file: {error}") from None


@lru_cache(maxsize=16)
def _metadata(item: Input) -> pyarrow.parquet.FileMetaData:
    """A process loads many row groups of one file: its footer is read once."""
    return _open(item).metadata
