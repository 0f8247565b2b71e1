"""Output of a pass: one file for each part, Parquet or JSON Lines in zstd, complete or absent.

Documents are gathered into groups of about 16 MB and written group by group: a row group of Parquet, or a zstd frame of
lines. A group ends with the row that reaches the size, so the file depends on the documents alone and not on the
batches in which they came: equal documents give equal bytes.

In JSON Lines each row has every column, null where it has no value; numbers that JSON lacks (NaN, infinity) become
null, and times and decimals become text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from prep.storage import Folder
from shards.errors import UserError, unknown_name

Format = Literal["parquet", "jsonl.zst"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl.zst")
GROUP_BYTES = 16 << 20
ZSTD_LEVEL = 1  # on prose 218 MB/s and 0.418 of its size; level 3: 111 MB/s and 0.370; level 6: 44 MB/s and 0.348
_UNIQUE = ("id", "text")  # columns whose values do not come again: a dictionary or a minimum would be lost work


def check_format(name: str) -> Format:
    """The output format of a name.

    Raises:
        UserError: unknown format.
    """
    for known in FORMATS:
        if name == known:
            return known
    raise UserError(unknown_name("output format", name, FORMATS))


class PartWriter:
    """Writes `NAME.parquet` or `NAME.jsonl.zst` in a `with` block; after an exception there is no file.

    Args:
        folder: where it goes.
        name: such as `part-00000`.
        schema: of all batches; flat columns.
        format: "parquet" or "jsonl.zst".
        compressed: whether Parquet is.

    Attributes:
        rows: written so far.

    Raises:
        UserError: unknown format, or storage that refuses.
    """

    def __init__(
        self, folder: Folder, name: str, schema: pa.Schema, format: Format = "parquet", *, compressed: bool = True
    ) -> None:
        self.folder, self.schema, self.format, self.compressed = folder, schema, check_format(format), compressed
        self.file_name = f"{name}.{format}"
        self.rows = 0
        self._gathered: list[pa.RecordBatch] = []
        self._size = 0
        self._files = ExitStack()

    def __enter__(self) -> PartWriter:
        with ExitStack() as files:
            self._file = files.enter_context(self.folder.create(self.file_name, durable=False))
            if self.format == "parquet":
                repeated = [name for name in self.schema.names if name not in _UNIQUE]
                self._parquet = files.enter_context(
                    pyarrow.parquet.ParquetWriter(
                        self._file,
                        self.schema,
                        compression="zstd" if self.compressed else "none",
                        compression_level=ZSTD_LEVEL if self.compressed else None,
                        use_dictionary=repeated or False,
                        write_statistics=repeated or False,
                    )
                )
            self._files = files.pop_all()
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Take documents; those that fill a group are written."""
        if not batch.schema.equals(self.schema):
            raise ValueError(f"{self.file_name}: columns are {batch.schema}, not {self.schema}")
        ends = np.cumsum(_row_bytes(batch))
        done, reached = 0, 0
        while True:
            cut = int(np.searchsorted(ends, reached + GROUP_BYTES - self._size)) + 1  # behind the row that fills it
            if cut > batch.num_rows:
                break
            self._gathered.append(batch.slice(done, cut - done))
            self._flush()
            done, reached = cut, int(ends[cut - 1])
        if done < batch.num_rows:
            self._gathered.append(batch.slice(done))
            self._size += int(ends[-1]) - reached

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._flush()

    def _flush(self) -> None:
        gathered, self._gathered, self._size = self._gathered, [], 0
        if not gathered:
            return
        table = pa.Table.from_batches(gathered).combine_chunks()
        self.rows += table.num_rows
        if self.format == "parquet":
            self._parquet.write_table(table, row_group_size=table.num_rows)
        else:
            self._file.write(_compress(_lines(table)))


def find_parts(folder: Folder) -> list[str]:
    """The files of a folder's parts, such as `part-00000.parquet`, in order."""
    return [name for name in folder.names("part-*") if name.partition(".")[2] in FORMATS]


def read_part(
    folder: Folder,
    name: str,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    groups: Collection[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Read what a `PartWriter` wrote, group by group (about 16 MB of text each), a batch for each.

    Args:
        folder: where it lies.
        name: such as `part-00000`, whose format is looked for, or `part-00000.parquet`.
        columns: those to read; None: all.
        schema: types of the columns, which JSON Lines do not keep; without it, they are what the values of a group are.
        groups: the numbers of those to read; None: all.

    Raises:
        UserError: there is no such part, or it is damaged.
    """
    name = _find(folder, name)
    with _damage_explained(folder, name), folder.open(name) as file:
        read = _read_parquet if name.endswith(".parquet") else _read_lines
        yield from read(file, columns, schema, groups)


def read_metadata(folder: Folder, name: str) -> pyarrow.parquet.FileMetaData | None:
    """What a part in Parquet says of its groups, without reading them; None for JSON Lines, which say nothing.

    Raises:
        UserError: there is no such part, or it is damaged.
    """
    name = _find(folder, name)
    if not name.endswith(".parquet"):
        return None
    with _damage_explained(folder, name), folder.open(name) as file:
        return pyarrow.parquet.ParquetFile(file).metadata


def _find(folder: Folder, name: str) -> str:
    files = [name] if name.endswith(FORMATS) else [f"{name}.{format}" for format in FORMATS]
    for file in files:
        if folder.exists(file):
            return file
    raise UserError(f"{folder}: holds no {' or '.join(files)}")


@contextmanager
def _damage_explained(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, orjson.JSONDecodeError) as error:
        raise UserError(f"{folder.path(name)}: cannot be read ({error}); remove it and run the stage again") from None


def _row_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """About what each row takes, int64 [rows]."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            lengths = pc.fill_null(pc.binary_length(column), 0)
            sizes += lengths.to_numpy(zero_copy_only=False)
        else:
            sizes += 8
    return sizes


def _lines(table: pa.Table) -> bytes:
    columns = [_plain(column).to_pylist() for column in table.columns]
    names = table.schema.names
    dumps, newline = orjson.dumps, orjson.OPT_APPEND_NEWLINE
    return b"".join(dumps(dict(zip(names, row, strict=True)), option=newline) for row in zip(*columns, strict=True))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column in a type that JSON has."""
    kind = column.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if plain or pa.types.is_nested(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column
    return column.cast(pa.string())


def _compress(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(data)


def _read_parquet(
    file: pa.NativeFile, columns: Sequence[str] | None, schema: pa.Schema | None, groups: Collection[int] | None
) -> Iterator[pa.RecordBatch]:
    reader = pyarrow.parquet.ParquetFile(file)
    for group in range(reader.metadata.num_row_groups) if groups is None else groups:
        yield from reader.read_row_group(group, columns=columns).combine_chunks().to_batches()


def _read_lines(
    file: pa.NativeFile, columns: Sequence[str] | None, schema: pa.Schema | None, groups: Collection[int] | None
) -> Iterator[pa.RecordBatch]:
    import zstandard

    unread, group = file.read(), -1
    while unread:
        group += 1
        decoder = zstandard.ZstdDecompressor().decompressobj()
        try:
            data = decoder.decompress(unread)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        if not decoder.eof:
            raise OSError("truncated")
        unread = decoder.unused_data
        if groups is not None and group not in groups:
            continue
        rows = [orjson.loads(line) for line in data.removesuffix(b"\n").split(b"\n")]
        names = list(columns) if columns is not None else list(rows[0])
        types = [schema.field(name).type if schema is not None else None for name in names]
        yield pa.RecordBatch.from_arrays(
            [pa.array([row[name] for row in rows], kind) for name, kind in zip(names, types, strict=True)], names=names
        )
