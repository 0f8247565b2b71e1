"""Rows of CSV and TSV: a header, then values; a value in quotes may hold delimiters, quotes (doubled) and line breaks.

The stream is cut into blocks at the ends of rows, which a small automaton finds, with the number of fields in each row.
Rows with another number of fields than the header are set aside, the others go through `pyarrow.csv` as bytes, so no
type is guessed. Rows are numbered from 1 behind the header; an empty line is no row, but counts as one in the numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from prep.arrow_columns import batch_documents, find_key, wanted_columns
from prep.documents import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    BrokenInput,
    Columns,
    Documents,
    Input,
    Piece,
    Rejected,
    excerpt,
    make_documents,
)
from prep.jsonl import decompress
from prep.storage import open_stream
from shards.errors import UserError

HEAD_BYTES = 1 << 16
_QUOTE, _NEWLINE, _RETURN = 34, 10, 13
_START, _PLAIN, _QUOTED, _CLOSED, _RETURNED = range(5)  # at a field's start, in it, in quotes, behind them, behind \r


class _Header(NamedTuple):
    names: list[str]
    delimiter: str
    key: str | None


def check_csv(item: Input, columns: Columns) -> dict[str, pa.DataType]:
    """The columns of a file, all of them text.

    Raises:
        UserError: a column that is missing; names the columns found.
    """
    with open_stream(item.path) as file:
        try:
            data, _, _ = next(_cut_at_rows(decompress(file, item), _delimiter(item), HEAD_BYTES), (b"", 0, True))
        except BrokenInput:  # so early that nothing is known; the run reports it
            return {}
    if not data:
        return {}
    types = dict.fromkeys(_split_header(item, data)[0].names, pa.string())
    find_key(item, types, columns)
    return types


def csv_blocks(item: Input, columns: Columns, schema: pa.Schema, start: int) -> Iterator[Piece]:
    """Blocks of a file that begin at row `start` or later.

    Raises:
        BrokenInput: the stream ends or fails in the middle; the whole rows before it have been given.
    """
    header: _Header | None = None
    row = 0
    with open_stream(item.path) as file:
        for data, rows, even in _cut_at_rows(decompress(file, item), _delimiter(item), BLOCK_BYTES):
            if header is None:
                header, data = _split_header(item, data)
                types = dict.fromkeys(header.names, pa.string())
                header = header._replace(key=find_key(item, types, columns))
                rows -= 1
            first, row = row, row + rows
            if rows and first >= start:
                yield Piece(
                    partial(_parse, data, item, columns, schema, header, first, rows, even), len(data), row, file.tell()
                )


def _delimiter(item: Input) -> str:
    return "\t" if ".tsv" in item.path.rpartition("/")[2].lower() else ","


def _cut_at_rows(stream: Iterator[bytes], delimiter: str, block_bytes: int) -> Iterator[tuple[bytes, int, bool]]:
    """Blocks of whole rows, how many they are, and whether all have as many fields as the first of the file.

    Where the stream breaks, the rows before that and then the error.
    """
    pending = bytearray()
    nothing = np.empty(0, np.int64), np.empty(0, np.int32)
    scanned, rows, odd, end, state, fields, expected = 0, 0, 0, 0, _START, 0, 0
    broken: BrokenInput | None = None
    while True:
        try:
            piece = next(stream, b"")
        except BrokenInput as error:
            piece, broken = b"", error
        pending += piece
        if len(pending) >= block_bytes or not piece:
            if not piece and not broken and pending and not pending.endswith(b"\n"):
                pending += b"\n"  # the last row may lack its line break
            raw = np.frombuffer(memoryview(pending).toreadonly(), np.uint8)
            found, last, state, fields, unequal, expected = _scan(
                raw, scanned, state, fields, ord(delimiter), expected, *nothing
            )
            del raw  # or the buffer cannot shrink
            scanned, rows, odd, end = len(pending), rows + found, odd + unequal, last if found else end
            if end >= block_bytes or (not piece and end):
                yield bytes(memoryview(pending)[:end]), rows, not odd
                del pending[:end]
                scanned, rows, odd, end = scanned - end, 0, 0, 0
            if len(pending) > MAX_DOCUMENT_BYTES:
                broken = BrokenInput(f"a row of more than {MAX_DOCUMENT_BYTES:,} bytes; is a quote left open?")
        if broken:
            raise broken
        if not piece:
            break
    if pending.strip():
        raise BrokenInput(f"the last row, of {len(pending):,} bytes, does not end; is a quote left open?")


@numba.njit(nogil=True, cache=True)
def _scan(
    raw: np.ndarray,
    at: int,
    state: int,
    fields: int,
    delimiter: int,
    expected: int,
    ends: np.ndarray,
    counts: np.ndarray,
) -> tuple[int, int, int, int, int, int]:
    """Find the rows that end in raw[at:], and fill `ends` (behind each row) and `counts` (fields; 0: an empty line).

    Returns:
        the number of rows; the end of the last; the state and number of fields in which the row behind it is left; how
        many rows have not `expected` fields; and `expected`, which is that of the first row where it was 0.
    """
    rows, last, odd, place = 0, 0, 0, at
    while place < len(raw):
        if state == _QUOTED:
            while place < len(raw) and raw[place] != _QUOTE:
                place += 1
            if place == len(raw):
                break
            state = _CLOSED
            place += 1
            continue
        c = raw[place]
        end = -1
        if state == _RETURNED:  # a row ends in \r\n, or in \r alone
            end = place + 1 if c == _NEWLINE else place
        elif c == _QUOTE and state in (_START, _CLOSED):
            if state == _START:
                fields += 1
            state = _QUOTED
        elif c in (_NEWLINE, _RETURN):
            if state == _START and fields > 0:
                fields += 1
            state = _RETURNED
            if c == _NEWLINE:
                end = place + 1
        elif c == delimiter:
            if state == _START:
                fields += 1
            state = _START
        else:
            if state == _START:
                fields += 1
            state = _PLAIN
        if end < 0:
            place += 1
            continue
        if rows < len(ends):
            ends[rows], counts[rows] = end, fields
        if expected == 0:
            expected = fields
        odd += fields != expected
        rows, last, fields, state, place = rows + 1, end, 0, _START, end
    return rows, last, state, fields, odd, expected


def _split_header(item: Input, data: bytes) -> tuple[_Header, bytes]:
    """The names in the first row, and the bytes behind it."""
    delimiter = _delimiter(item)
    body = data.removeprefix(b"\xef\xbb\xbf")
    ends, counts = np.empty(1, np.int64), np.empty(1, np.int32)
    _scan(np.frombuffer(body, np.uint8), 0, _START, 0, ord(delimiter), 0, ends, counts)
    end = int(ends[0])
    try:
        names = next(csv.reader(io.StringIO(body[:end].decode(), newline=""), delimiter=delimiter), [])
    except UnicodeDecodeError:
        raise UserError(f"{item.path}: the header is not UTF-8; convert the file with iconv") from None
    if len(set(names)) < len(names) or not names:
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1})) or "none"
        raise UserError(f"{item.path}: the first row must name each column once; named twice: {twice}")
    return _Header(names, delimiter, None), body[end:]


def _parse(
    data: bytes, item: Input, columns: Columns, schema: pa.Schema, header: _Header, first: int, rows: int, even: bool
) -> Documents:
    """A block of `rows` rows; `even`: all of them have as many fields as the header."""
    numbers = np.arange(first + 1, first + 1 + rows)
    if even:
        return _parse_columns(data, item, columns, schema, header, numbers)
    raw = np.frombuffer(data, np.uint8)
    ends, counts = np.empty(rows, np.int64), np.empty(rows, np.int32)
    found, _, _, fields, _, _ = _scan(raw, 0, _START, 0, ord(header.delimiter), 0, ends, counts)
    if found < rows:  # the last row ends in \r alone
        ends[-1], counts[-1] = len(raw), fields
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    good, empty = counts == len(header.names), counts == 0
    rejected = []
    for row in np.flatnonzero(~good & ~empty).tolist():
        reason = f"{counts[row]:,} fields, not {len(header.names):,} as in the header"
        rejected.append(Rejected(item.path, int(numbers[row]), reason, excerpt(data[begins[row] : ends[row]])))
    data = raw[np.repeat(good, ends - begins)].tobytes()
    documents = _parse_columns(data, item, columns, schema, header, numbers[good])
    documents.rows += len(rejected)
    documents.rejected = sorted(documents.rejected + rejected, key=lambda row: row.row)
    return documents


def _parse_columns(
    data: bytes, item: Input, columns: Columns, schema: pa.Schema, header: _Header, numbers: np.ndarray
) -> Documents:
    if not data:
        arrays = [pa.array([], field.type) for field in schema]
        return make_documents(item, arrays[0], arrays[1], arrays[3:], schema)
    wanted = wanted_columns(dict.fromkeys(header.names, pa.string()), columns, header.key)
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=header.names),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=header.delimiter, newlines_in_values=True, ignore_empty_lines=False
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            check_utf8=False, include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary())
        ),
    ).combine_chunks()
    if table.num_rows != len(numbers):
        raise BrokenInput(
            f"{item.path}: rows {numbers[0]:,} to {numbers[-1]:,} cannot be told apart ({table.num_rows:,} found)"
        )
    found = {name: column.chunk(0).view(pa.string()) for name, column in zip(wanted, table.columns, strict=True)}
    if header.key and header.key != columns.text:  # a row without an id gets one
        ids = found[header.key]
        found[header.key] = pc.if_else(pc.equal(pc.binary_length(ids), 0), pa.scalar(None, pa.string()), ids)
    return batch_documents(pa.RecordBatch.from_pydict(found), item, columns, header.key, schema, numbers)
