"""Rows of JSON: the (decompressed) stream is cut at newlines into blocks, each block is parsed as columns.

A block goes through `pyarrow.json` under an explicit schema: no type is guessed, "2020-01-01" stays text. That parser
takes or refuses a block as a whole, and it is looser than JSON Lines (it reads two objects in one line, skips blank
lines, and crashes on a bare `null`), so a block goes there only if each of its lines begins with `{`, and its result
counts only if it has as many rows as the block has lines, no nulls, and valid UTF-8. Any other block is read again line
by line with `orjson`, and the bad lines are set aside. Blank lines are no rows, but they count as lines.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.json

from prep.documents import (
    BLOCK_BYTES,
    DOCUMENT,
    BrokenInput,
    Columns,
    Documents,
    Input,
    Piece,
    RowCollector,
    make_documents,
    row_ids,
)
from prep.kept_columns import fit
from prep.storage import open_stream
from shards.errors import UserError

READ_BYTES = 32 << 10  # compressed bytes handed over at once: fast, and a damaged file loses no more than this
PIECE_BYTES = 1 << 20  # and well-compressed text comes out in pieces of this size
MAX_LINE_BYTES = 1 << 30
HEAD_ROWS, HEAD_BYTES = 100, 1 << 16
_NEWLINE, _RETURN, _BRACE = 10, 13, 123
_CACHE = 1 << 18
_BYTES_PER_LINE = 64


class _Shape(NamedTuple):
    """How a file is parsed: columns of text, id (None: by file and line) and those to keep; the documents' schema."""

    text: str
    key: tuple[str, pa.DataType] | None
    kept: tuple[pa.Field, ...]
    schema: pa.Schema


def row_blocks(item: Input, columns: Columns, schema: pa.Schema, start: int) -> Iterator[Piece]:
    """Blocks of a file that begin at row `start` or later; rows are lines.

    Raises:
        BrokenInput: the stream ends or fails in the middle; the whole lines before it have been given.
    """
    with open_stream(item.path) as file:
        shape = _Shape(columns.text, None, tuple(schema)[len(DOCUMENT) :], schema)
        row = 0
        for data in _cut_at_newlines(decompress(file, item), BLOCK_BYTES):
            if row == 0:
                data = data.removeprefix(b"\xef\xbb\xbf")
                shape = shape._replace(key=_id_column(data, columns))
            lines = _line_starts(data)
            first, row = row, row + len(lines)
            if first >= start:
                few = lines if len(lines) * _BYTES_PER_LINE < len(data) else None  # they may weigh more than the block
                yield Piece(partial(_parse, data, few, item, shape, first), len(data), row, file.tell())


def check_rows(item: Input, columns: Columns) -> dict[str, pa.DataType]:
    """The columns in the first rows of a file, and their types.

    Raises:
        UserError: a named column is in none of them, or the text is never text; names the columns found.
    """
    with open_stream(item.path) as file:
        try:
            data = next(_cut_at_newlines(decompress(file, item), HEAD_BYTES), b"")
        except BrokenInput:  # so early that nothing is known; the run reports it
            return {}
    if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        name = item.path.rpartition("/")[2]
        raise UserError(
            f"{item.path}: this is one JSON array, not JSON Lines (one object per line); "
            f"convert it with: jq -c '.[]' {name} > {name.split('.')[0]}.jsonl"
        )
    rows = list(_first_objects(data.removeprefix(b"\xef\xbb\xbf")))
    if not rows:
        return {}
    found = ", ".join(dict.fromkeys(name for row in rows for name in row))
    for column, option in ((columns.text, "--text-column"), (columns.id, "--id-column")):
        if column is not None and not any(column in row for row in rows):
            raise UserError(f"{item.path}: no column '{column}'; columns found: {found}. Name one with {option}")
    values = [row[columns.text] for row in rows if row.get(columns.text) is not None]
    if values and not any(isinstance(value, str) for value in values):
        raise UserError(
            f"{item.path}: column '{columns.text}' holds {_json_type(values[0])}, not text (the first: "
            f"{json.dumps(values[0])[:60]}); columns found: {found}. Name the text with --text-column"
        )
    types: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            known, kind = types.get(name, pa.null()), _arrow_type(value)
            if pa.types.is_null(known) or (known == pa.int64() and kind == pa.float64()):
                types[name] = kind
    return types


def decompress(file: BinaryIO, item: Input) -> Iterator[bytes]:
    """The stream of a plain, gzip or zstd file, in pieces; any number of gzip members or zstd frames."""
    suffix = os.path.splitext(item.path)[1].lower()
    if suffix == ".gz":
        new_decoder: Callable[[], Any] = partial(zlib.decompressobj, wbits=31)
    elif suffix in (".zst", ".zstd"):
        import zstandard

        # written with `zstd --long` a frame may ask for a window of up to 2 GB
        new_decoder = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    else:
        yield from iter(partial(file.read, PIECE_BYTES), b"")
        return
    decoder: Any = None
    while data := file.read(READ_BYTES):
        while data:
            if decoder is None:
                if suffix == ".gz" and not data.strip(b"\0"):
                    break  # gzip files may be padded with zeros
                decoder = new_decoder()
            try:
                piece = decoder.decompress(data)
            except Exception as error:  # zlib.error, ZstdError: not worth importing both for their names
                position = file.tell() - len(data)
                raise BrokenInput(f"cannot be decompressed near byte {position:,} of {item.size:,} ({error})") from None
            yield from (piece[at : at + PIECE_BYTES] for at in range(0, len(piece), PIECE_BYTES))
            data, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise BrokenInput(f"truncated: the compressed stream stops early, at byte {item.size:,}")


def _cut_at_newlines(stream: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """Blocks of whole lines; where the stream breaks, the whole lines before that and then the error."""
    parts: list[bytes] = []
    size = 0
    try:
        for piece in stream:
            cut = piece.rfind(b"\n") + 1 if size + len(piece) >= block_bytes else 0
            if cut:
                yield b"".join([*parts, piece[:cut]])
                parts, size, piece = [], 0, piece[cut:]
            parts.append(piece)
            size += len(piece)
            if size > MAX_LINE_BYTES:
                raise BrokenInput(f"a line of more than {MAX_LINE_BYTES:,} bytes; is it one JSON object per line?")
    except BrokenInput:
        data = b"".join(parts)
        if cut := data.rfind(b"\n") + 1:
            yield data[:cut]
        raise
    if size:
        yield b"".join(parts)


def _line_starts(data: bytes) -> np.ndarray:
    """Where the lines begin; by pieces, whose comparison stays in the processor's cache."""
    raw = np.frombuffer(data, np.uint8)
    found = [np.flatnonzero(raw[at : at + _CACHE] == _NEWLINE) + (at + 1) for at in range(0, len(raw), _CACHE)]
    starts = np.concatenate([np.zeros(1, np.int64), *found])
    return starts[:-1] if starts[-1] == len(raw) else starts


def _parse(data: bytes, lines: np.ndarray | None, item: Input, shape: _Shape, first: int) -> Documents:
    raw = np.frombuffer(data, np.uint8)
    if lines is None:
        lines = _line_starts(data)
    numbers = np.arange(first + 1, first + 1 + len(lines))
    if not (raw[lines] == _BRACE).all():
        data, numbers = _without_blank_lines(data, lines, numbers)
        raw, lines = np.frombuffer(data, np.uint8), _line_starts(data)
    documents = None
    if len(lines) and (raw[lines] == _BRACE).all():
        documents = _parse_columns(data, item, shape, numbers)
    return documents or _parse_lines(data, item, shape, numbers)


def _without_blank_lines(data: bytes, lines: np.ndarray, numbers: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The block without the lines of which nothing but the line's end is there, and the numbers of the others."""
    raw = np.frombuffer(data, np.uint8)
    lengths = np.diff(lines, append=len(raw))
    begins = raw[lines]
    blank = (begins == _NEWLINE) | ((begins == _RETURN) & (lengths == 2))
    return raw[np.repeat(~blank, lengths)].tobytes(), numbers[~blank]


def _parse_columns(data: bytes, item: Input, shape: _Shape, numbers: np.ndarray) -> Documents | None:
    """The block as columns, or None if it needs a closer look."""
    fields = {shape.text: pa.string(), **{field.name: field.type for field in shape.kept}}
    if shape.key:
        fields[shape.key[0]] = pa.string() if shape.key[0] == shape.text else shape.key[1]
    options = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema(list(fields.items())), unexpected_field_behavior="ignore"
    )
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(data),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(data)),
            parse_options=options,
        )
        table.validate(full=True)
        if table.num_rows != len(numbers):
            return None
        columns = {name: column.chunk(0) for name, column in zip(fields, table.combine_chunks().columns, strict=True)}
        texts = columns[shape.text]
        ids = columns[shape.key[0]].cast(pa.string()) if shape.key else row_ids(item, numbers)
        if texts.null_count or ids.null_count:
            return None
        kept = [columns[field.name].cast(field.type) for field in shape.kept]
    except pa.ArrowInvalid:
        return None
    return make_documents(item, ids, texts, kept, shape.schema)


def _parse_lines(data: bytes, item: Input, shape: _Shape, numbers: np.ndarray) -> Documents:
    rows = RowCollector(item, shape.schema)
    for number, line in zip(numbers.tolist(), data.removesuffix(b"\n").split(b"\n"), strict=False):
        if not line.strip():
            continue  # a blank line is no row
        try:
            row = _parse_line(line)
            text = row.get(shape.text)
            if text is None:
                reason = "is null" if shape.text in row else "is missing"
                raise ValueError(f"column '{shape.text}' {reason}")
            if not isinstance(text, str):
                raise ValueError(f"column '{shape.text}' holds {_json_type(text)}, not text")
            name = shape.key[0] if shape.key else ""
            identity = row.get(name) if shape.key else None
            if identity is None:
                identity = f"{item.name}:{number}"
            elif not isinstance(identity, str) and type(identity) is not int:
                raise ValueError(f"id '{name}' holds {_json_type(identity)}, not text or a whole number")
            rows.add(str(identity), text, [fit(field.name, row.get(field.name), field.type) for field in shape.kept])
        except ValueError as error:
            rows.reject(number, str(error), line)
    return rows.documents()


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = f"not valid JSON: {error}"
        try:
            line.decode()
            row = json.loads(line)  # takes NaN and Infinity, as the column parser does
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as problem:
            raise ValueError(f"not UTF-8 ({problem.reason} at byte {problem.start:,} of the line)") from None
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate (half of a UTF-16 pair), which is no text") from None
        except (ValueError, RecursionError):
            raise ValueError(reason) from None
    if not isinstance(row, dict):
        raise ValueError(f"the line holds {_json_type(row)}, not an object")
    return row


def _first_objects(data: bytes) -> Iterator[dict[str, Any]]:
    """The first rows that are objects."""

    def objects() -> Iterator[dict[str, Any]]:
        for line in data.split(b"\n", 10 * HEAD_ROWS)[: 10 * HEAD_ROWS]:
            try:
                yield _parse_line(line)
            except ValueError:
                continue

    return islice(objects(), HEAD_ROWS)


def _id_column(data: bytes, columns: Columns) -> tuple[str, pa.DataType] | None:
    """Name and type of the id column, from the first rows; None: documents are named by file and row."""
    name = columns.id or "id"
    for row in _first_objects(data):
        if isinstance(row.get(name), str):
            return name, pa.string()
        if type(row.get(name)) is int:
            return name, pa.int64()
    return (columns.id, pa.string()) if columns.id else None


def _arrow_type(value: object) -> pa.DataType:
    """The type of a column of such values; what is nested is nested, whatever is in it."""
    if isinstance(value, bool):
        return pa.bool_()
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), type(None): pa.null()}
    return types.get(type(value), pa.struct([]))


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "an array", str: "text", int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]
