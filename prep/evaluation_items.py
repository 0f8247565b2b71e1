"""Reads the items of evaluations: the texts that must not be in training data.

A file is JSON lines or a JSON array of objects (plain, .gz or .zst), or Parquet; here or at an address. With
`FILE:column,column` those columns hold the items; without, every column that holds text does. Each value of each row
is an item of its own. The benchmark is called like the file.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from prep.storage import open_input
from shards.errors import UserError, unknown_name
from shards.settings import expand_variables

ENDINGS = (".gz", ".zst", ".zstd", ".jsonl", ".ndjson", ".json", ".parquet", ".pq")


@dataclass(frozen=True)
class Benchmark:
    """The distinct items of one file: their texts, and row (from 1) and column where each was first seen."""

    name: str
    path: str
    texts: list[str]
    places: list[tuple[int, str]]


def read_benchmarks(against: Sequence[str], where: str) -> list[Benchmark]:
    """Read the items of files given as `FILE[:column[,column]]`.

    Raises:
        UserError: a file that is missing or damaged, of another kind, without text; a column that it does not have.
    """
    found: dict[str, Benchmark] = {}
    for given in against:
        path, wanted = _split(expand_variables(given, where))
        try:
            file = open_input(path)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        try:
            with file:
                benchmark = _read(path, file, wanted)
        except UserError as error:
            raise UserError(f"{where}: {path}: {error}") from None
        name = benchmark.name
        if name in found:  # arc/test.jsonl beside mmlu/test.jsonl
            name = f"{Path(path).resolve().parent.name}-{name}"
        if name in found:
            raise UserError(f"{where}: {path}: two files with items are called '{name}'; rename one of them")
        found[name] = Benchmark(name, benchmark.path, benchmark.texts, benchmark.places)
    return list(found.values())


def _split(given: str) -> tuple[str, list[str]]:
    """Path and columns; a colon may be part of the path or address."""
    path, colon, columns = given.rpartition(":")
    if not colon or "/" in columns or Path(given).exists():
        return given, []
    return path, [column.strip() for column in columns.split(",")]


def _read(path: str, file: pa.NativeFile, wanted: list[str]) -> Benchmark:
    name = Path(path).name
    kind = name.lower()
    while kind.endswith(ENDINGS):
        ending = next(ending for ending in ENDINGS if kind.endswith(ending))
        name, kind = name[: -len(ending)], kind[: -len(ending)]
    if name == Path(path).name:
        raise UserError(f"cannot tell by its name what this file is; readable are {' '.join(ENDINGS)}")
    rows = _parquet_rows(file) if path.lower().endswith((".parquet", ".pq")) else _json_rows(path.lower(), file)
    texts: dict[str, tuple[int, str]] = {}
    columns: dict[str, bool] = {}  # those seen, and whether they held text
    for number, row in rows:
        for column, value in row.items():
            columns[column] = columns.get(column, False) or isinstance(value, str)
            if isinstance(value, str) and value.strip() and (not wanted or column in wanted):
                texts.setdefault(value, (number, column))
    for column in wanted:
        if column not in columns:
            raise UserError(unknown_name("column", column, columns))
        if not columns[column]:
            raise UserError(f"column '{column}' holds no text; columns with text: {_names(columns)}")
    if not columns:
        raise UserError("holds no rows; give the file with the items")
    if not texts:
        raise UserError(f"holds no text; columns: {', '.join(columns)}. The items must be strings")
    return Benchmark(name, path, list(texts), list(texts.values()))


def _names(columns: dict[str, bool]) -> str:
    return ", ".join(column for column, text in columns.items() if text) or "none"


def _parquet_rows(file: pa.NativeFile) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = pq.ParquetFile(file)
        kept = [column.name for column in table.schema_arrow if _is_text(column.type)]
        rest = {column.name: None for column in table.schema_arrow}
        number = 0
        for batch in table.iter_batches(columns=kept):
            for row in batch.to_pylist():
                number += 1
                yield number, rest | row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot be read as Parquet ({error}); copy it again") from None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _json_rows(path: str, file: pa.NativeFile) -> Iterator[tuple[int, dict[str, Any]]]:
    content: bytes = file.read()
    try:
        if path.endswith(".gz"):
            content = gzip.decompress(content)
        elif path.endswith((".zst", ".zstd")):
            with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
                content = reader.read()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"cannot be unpacked ({error}); copy it again") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    rows: Iterable[tuple[int, Any]]
    if content.lstrip()[:1] == b"[":
        rows = enumerate(_parse(content, "the file"), 1)
    else:
        lines = enumerate(content.split(b"\n"), 1)
        rows = ((number, _parse(line, f"line {number:,}")) for number, line in lines if line.strip())
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"row {number:,} is not an object with columns: {row!r:.60}")
        yield number, row


def _parse(text: bytes, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: {error}") from None
