"""Datasets as Hugging Face's `save_to_disk` leaves them: Arrow streams (`data-*.arrow`), which are mapped, not read.

A folder with `state.json` is a dataset, which names its files in order; one with `dataset_dict.json` holds a dataset in
a subfolder for each split. A block is a range of rows, found again by the place of its first message in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.ipc

from prep.arrow_columns import batch_documents, bounded, find_key, wanted_columns
from prep.documents import BLOCK_BYTES, BrokenInput, Columns, Documents, Input, Piece
from prep.storage import Folder, is_remote, open_input, raise_if_unreachable
from shards.errors import UserError

STATE, SPLITS, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
MAX_BATCH_ROWS = 1 << 16
_MAGIC = b"ARROW1"
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}  # the same layout, and no UTF-8 to check


def dataset_files(folder: Folder) -> list[str] | None:
    """Names of the files of a saved dataset in order; None: the folder is none.

    Raises:
        UserError: it holds several splits (names them), or rows that were chosen without being written.
    """
    splits = folder.read(SPLITS)
    if splits is not None:
        try:
            names = orjson.loads(splits)["splits"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{folder.path(SPLITS)}: damaged; save the dataset again") from None
        if len(names) != 1:
            listed = ", ".join(folder.path(name) for name in names)
            raise UserError(f"{folder}: holds {len(names)} splits of a dataset; give one by name: {listed}")
        inner = dataset_files(folder.child(names[0]))
        return [f"{names[0]}/{name}" for name in inner or []]
    content = folder.read(STATE)
    if content is None:
        return None
    try:
        state = orjson.loads(content)
        if not isinstance(state, dict) or "_data_files" not in state:
            return None  # some other program's state.json
        files = [entry["filename"] for entry in state["_data_files"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: was saved with its rows in another order; save it after dataset.flatten_indices()")
    return files


def check_arrow(item: Input, columns: Columns) -> dict[str, pa.DataType]:
    """The columns of a file and their types.

    Raises:
        UserError: not an Arrow stream, or a column that is missing or of a wrong type; names the columns found.
    """
    with _open(item) as file:
        schema = _read_schema(file, item)
    types = dict(zip(schema.names, schema.types, strict=True))
    find_key(item, types, columns)
    return types


def arrow_blocks(item: Input, columns: Columns, schema: pa.Schema, start: int) -> Iterator[Piece]:
    """Blocks of a file that begin at row `start` or later.

    Raises:
        BrokenInput: the file ends or is damaged in the middle.
    """
    with _open(item) as file:
        stored = _read_schema(file, item)
        types = dict(zip(stored.names, stored.types, strict=True))
        key = find_key(item, types, columns)
        wanted = wanted_columns(types, columns, key)
        row, first, size, begin, skip = 0, 0, 0, file.tell(), 0
        for place, batch in _batches(file, stored, item):
            batch = batch.select(wanted)
            parts: list[pa.RecordBatch] = []
            done = 0
            step = max(1, min(MAX_BATCH_ROWS, batch.num_rows * BLOCK_BYTES // max(batch.nbytes, 1)))
            for at in range(0, batch.num_rows, step):
                parts += bounded(batch.slice(at, step))
            for part in parts:
                if row == first:
                    begin, skip = place, done
                row, done, size = row + part.num_rows, done + part.num_rows, size + part.nbytes
                if size >= BLOCK_BYTES // 2:
                    if first >= start:
                        load = partial(_load, item, columns, key, schema, first, row - first, begin, skip)
                        yield Piece(load, size, row, file.tell())
                    first, size = row, 0
        if row > first >= start:
            load = partial(_load, item, columns, key, schema, first, row - first, begin, skip)
            yield Piece(load, size, row, item.size)


def _load(
    item: Input, columns: Columns, key: str | None, schema: pa.Schema, first: int, rows: int, place: int, skip: int
) -> Documents:
    """Rows `first` to `first + rows`, which begin `skip` rows behind the message at `place`.

    Raises:
        BrokenInput: they cannot be read.
    """
    try:
        with _open(item) as file:
            stored = _read_schema(file, item)
            file.seek(place)
            wanted = wanted_columns(dict(zip(stored.names, stored.types, strict=True)), columns, key)
            parts, left = [], rows
            for _, batch in _batches(file, stored, item):
                parts.append(batch.select(wanted).slice(skip, left))
                left, skip = left - parts[-1].num_rows, 0
                if not left:
                    break
            batch = parts[0] if len(parts) == 1 else pa.concat_batches(parts)
            for column in batch.columns:  # that the offsets lie inside, before anything follows them
                (column.view(_BYTES[column.type]) if column.type in _BYTES else column).validate(full=True)
            numbers = np.arange(first + 1, first + 1 + rows)
            return batch_documents(batch, item, columns, key, schema, numbers)
    except (BrokenInput, pa.ArrowInvalid) as error:
        raise BrokenInput(f"{item.path}: {error}") from None


def _batches(file: pa.NativeFile, schema: pa.Schema, item: Input) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches from here on, each with the place of its message; nothing is copied from a mapped file."""
    while True:
        place = file.tell()
        try:
            message = pa.ipc.read_message(file)
            if message.type != "record batch":
                raise BrokenInput(f"holds a {message.type} message; only plain columns can be read")
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate()
        except EOFError:
            return
        except (pa.ArrowException, OSError) as error:
            raise_if_unreachable(item.path, error)
            raise BrokenInput(f"truncated or damaged near byte {place:,} of {item.size:,} ({error})") from None
        yield place, batch


def _open(item: Input) -> pa.NativeFile:
    return open_input(item.path) if is_remote(item.path) else pa.memory_map(item.path)


def _read_schema(file: pa.NativeFile, item: Input) -> pa.Schema:
    try:
        if file.read(len(_MAGIC)) == _MAGIC:
            raise UserError(f"{item.path}: an Arrow file, not a stream as `save_to_disk` writes; convert it to Parquet")
        file.seek(0)
        return pa.ipc.read_schema(pa.ipc.read_message(file))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{item.path}: not a readable Arrow stream: {error}") from None
