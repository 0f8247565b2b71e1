"""Readers: files become blocks of documents.

A file is one of five kinds, told by its name: rows of JSON (`.jsonl .ndjson .json`) or of CSV (`.csv .tsv`), plain or
`.gz` or `.zst`; Parquet; Arrow as `save_to_disk` of Hugging Face's datasets writes it; or plain text, where one file is
one document. They lie on this machine or anywhere that prep/storage.py reaches. Reading is split in two: `read_blocks`
walks through the files in order and cuts them into blocks of some megabytes, which is cheap; `Block.load` parses one
block, which is not, in any thread or process. The cuts depend on the files alone, so a run that starts again at a
block's end sees the same blocks.

A bad row is set aside (`Rejected`) and the reading goes on. A file whose rest cannot be read (a truncated `.gz`) gives
what stands before the damage and then a block whose `broken` says what is wrong; where a single block cannot be read,
its `load` raises `BrokenInput`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from prep.arrow_files import arrow_blocks, check_arrow, dataset_files
from prep.documents import (
    BLOCK_BYTES,
    DOCUMENT,
    MAX_DOCUMENT_BYTES,
    START,
    Block,
    BrokenInput,
    Columns,
    Documents,
    Input,
    Kind,
    Piece,
    Position,
    RowCollector,
)
from prep.jsonl import check_rows, row_blocks
from prep.kept_columns import settle_schema
from prep.parquet import WHOLE_GROUP_BYTES, check_parquet, parquet_blocks
from prep.stage_manifest import find_documents
from prep.storage import Folder, Stat, is_remote, open_input, stat
from prep.walk import LeftOut, glob_remote, literal_root, require_kind, walk, walk_remote
from shards.errors import UserError

REQUESTS = 16  # to remote storage at a time, which answers slowly


class Found(NamedTuple):
    """The files to read, and what the folders among the arguments hold beside them."""

    inputs: list[Input]
    left_out: list[LeftOut]


class _File(NamedTuple):
    file: Stat
    name: str
    source: str


def find_inputs(arguments: Sequence[str], source: str | None = None, exclude: Path | None = None) -> Found:
    """Files behind paths, globs, folders and addresses.

    Folders are searched recursively, hidden files left out, sorted by path; one that a stage or `save_to_disk` made
    gives its documents. Ids are made of the files' names: neither those nor the order depend on how a path is spelled.

    Args:
        arguments: what the user typed.
        source: name of the source; default: the stem of a file that is named, the name of a folder.
        exclude: a folder that is not searched (where the output goes).

    Raises:
        UserError: nothing found, a folder that cannot be read, a suffix that is not known, a file that is given twice,
            storage that cannot be reached.
    """
    found: list[_File] = []
    left_out: list[LeftOut] = []
    for argument in arguments:
        files, rest = _find_remote(argument) if is_remote(argument) else _find_local(argument, exclude)
        found += files
        left_out += [rest] if rest and rest.names else []
    names = [name for _, name, _ in found]
    if len(set(names)) < len(names):  # the same name below two arguments: only longer paths tell their documents apart
        names = _longer_names([file.path for file, _, _ in found])
    seen: set[str] = set()
    for file, _, _ in found:
        if (real := file.path if is_remote(file.path) else os.path.realpath(file.path)) in seen:
            raise UserError(f"{file.path}: given twice; to see a source more often, raise its weight in the mixture")
        seen.add(real)
    inputs = [
        Input(file.path, name, source or own, require_kind(file.path), file.size, file.modified)
        for (file, _, own), name in zip(found, names, strict=True)
    ]
    return Found(inputs, left_out)


def check_inputs(inputs: Sequence[Input], columns: Columns) -> pa.Schema:
    """Look for the named columns in every file of rows, before any work is done.

    Returns:
        the schema of the documents: id, text, source and the columns to keep, with one type for each in all files.

    Raises:
        UserError: a column that is missing or of a wrong type, with the columns found; a kept column whose types do not
            go together, with the files; a file that is not what its name says; a text file too large to be one
            document.
    """
    for item in inputs:
        if item.kind == "text" and item.size > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{item.path}: {item.size:,} bytes; a text file is one document, and no document is larger than "
                f"{MAX_DOCUMENT_BYTES:,} bytes. Cut it into documents, one JSON object with a text per line (.jsonl)"
            )
    with ThreadPoolExecutor(REQUESTS) as pool:
        kinds = pool.map(lambda item: _check(item, columns), inputs)
        return settle_schema(list(zip(inputs, kinds, strict=True)), columns)


def read_blocks(
    inputs: Sequence[Input],
    columns: Columns,
    start: Position = START,
    schema: pa.Schema | None = None,
    whole_group_bytes: int = WHOLE_GROUP_BYTES,
) -> Iterator[Block]:
    """Cut the inputs into blocks, in order, from the end of a block on (or from the beginning).

    Args:
        inputs: the files.
        columns: those to read.
        start: end of the block behind which to begin.
        schema: of the documents, from `check_inputs`; needed where `inputs` are some of the files whose documents come
            together. None: what `check_inputs` gives for these files.
        whole_group_bytes: a row group of Parquet of up to this size is one block, which is read where it is loaded; of
            a larger one the blocks are smaller, and it is read here. Threads do better with small blocks.
    """
    if schema is None:
        schema = check_inputs(inputs, columns) if columns.keep else DOCUMENT
    index, row = start
    consumed = sum(item.size for item in inputs[:index])
    while index < len(inputs):
        item = inputs[index]
        if item.kind == "text":
            group = _text_group(inputs, index)
            size = sum(file.size for file in group)
            index, consumed = index + len(group), consumed + size
            yield Block(partial(_load_texts, group, schema), size, Position(index), consumed)
            continue
        broken = None
        try:
            for piece in _pieces(item, columns, schema, row, whole_group_bytes):
                row = piece.row
                yield Block(piece.load, piece.size, Position(index, row), consumed + piece.consumed)
        except BrokenInput as error:
            broken = f"{item.path}: {error}; {row:,} rows before the damage were read"
        index, row, consumed = index + 1, 0, consumed + item.size
        if broken:
            yield Block(partial(_nothing, item, schema), 0, Position(index), consumed, broken)


def _check(item: Input, columns: Columns) -> dict[str, pa.DataType]:
    """The columns of a file."""
    if item.kind == "text":
        return {}
    if item.kind == "csv":
        from prep.csv_rows import check_csv  # loads numba

        return check_csv(item, columns)
    checks: dict[Kind, Callable[[Input, Columns], dict[str, pa.DataType]]] = {
        "rows": check_rows,
        "parquet": check_parquet,
        "arrow": check_arrow,
    }
    return checks[item.kind](item, columns)


def _pieces(item: Input, columns: Columns, schema: pa.Schema, start: int, whole_group_bytes: int) -> Iterator[Piece]:
    if item.kind == "parquet":
        return parquet_blocks(item, columns, schema, start, whole_group_bytes)
    if item.kind == "csv":
        from prep.csv_rows import csv_blocks

        return csv_blocks(item, columns, schema, start)
    return (row_blocks if item.kind == "rows" else arrow_blocks)(item, columns, schema, start)


def _find_local(argument: str, exclude: Path | None) -> tuple[list[_File], LeftOut | None]:
    path = Path(argument.removeprefix("file://")).expanduser()
    if path.is_dir():
        own = path.resolve().name
        if found := find_documents(Folder(path)):
            return _stage_files(found.folder, own, found.manifest), None
        rest = None
        saved = dataset_files(Folder(path))
        if saved is not None:
            files = [path / name for name in saved]
        else:
            files, rest = walk(path, exclude)
        return [_File(_stat(file), f"{own}/{file.relative_to(path).as_posix()}", own) for file in files], rest
    if path.exists():
        return [_File(_stat(path), path.name, _stem(path.name))], None
    if not glob.has_magic(argument):
        raise UserError(f"{argument}: no such file or folder")
    root = literal_root(path)
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not files:
        raise UserError(f"{argument}: no file matches this pattern")
    return [_File(_stat(file), file.relative_to(root).as_posix(), root.resolve().name) for file in files], None


def _find_remote(argument: str) -> tuple[list[_File], LeftOut | None]:
    address = argument.rstrip("/")
    if glob.has_magic(address):
        root, files = glob_remote(address)
        if not files:
            raise UserError(f"{argument}: no file matches this pattern")
        return [_File(file, file.path.removeprefix(root + "/"), _last(root)) for file in files], None
    if file := stat(address):
        return [_File(file, _last(address), _stem(_last(address)))], None
    if found := find_documents(Folder(address)):
        return _stage_files(found.folder, _last(address), found.manifest), None
    walked = walk_remote(address)
    if walked is None:
        raise UserError(f"{argument}: no such file or folder")
    files, rest = walked
    if saved := dataset_files(Folder(address)):
        files, rest = [_stat(f"{address}/{name}") for name in saved], LeftOut(address, {})
    own = _last(address)
    return [_File(file, f"{own}/{file.path.removeprefix(address + '/')}", own) for file in files], rest


def _stage_files(folder: Folder, own: str, manifest: dict[str, Any]) -> list[_File]:
    """The documents of a stage's folder, each part under its source; what else lies there is not read."""
    parts = manifest["parts"]
    with ThreadPoolExecutor(REQUESTS) as pool:
        files = list(pool.map(lambda part: _stat(folder.path(part["file"])), parts))
    return [_File(file, f"{own}/{part['file']}", part["source"]) for file, part in zip(files, parts, strict=True)]


def _stat(path: Path | str) -> Stat:
    found = stat(str(path))
    if found is None:
        raise UserError(f"{path}: no such file")
    return found


def _stem(name: str) -> str:
    return name.split(".")[0] or name


def _last(address: str) -> str:
    return address.rpartition("/")[2]


def _longer_names(paths: Sequence[str]) -> list[str]:
    """Names by which all files differ: local ones below the folder they share, the address of remote ones."""
    local = {path: Path(path).parent.resolve() / Path(path).name for path in paths if not is_remote(path)}
    root = Path(os.path.commonpath([path.parent for path in local.values()])) if local else Path()
    return [local[path].relative_to(root).as_posix() if path in local else path.partition("://")[2] for path in paths]


def _text_group(inputs: Sequence[Input], index: int) -> list[Input]:
    """Text files of one source that are read as one block: up to 4 MB, or one larger file alone."""
    first = inputs[index]
    group, size = [first], first.size
    for item in inputs[index + 1 : index + 10_000]:
        size += item.size
        if item.kind != "text" or item.source != first.source or size > BLOCK_BYTES:
            break
        group.append(item)
    return group


def _load_texts(group: Sequence[Input], schema: pa.Schema) -> Documents:
    """Reads a group of text files; each is one document, its id is its name."""
    rows = RowCollector(group[0], schema)
    for item in group:
        with open_input(item.path) as file:
            raw = file.read()
        try:
            rows.add(item.name, raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            rows.item = item
            line = raw.count(b"\n", 0, error.start) + 1
            rows.reject(line, f"not UTF-8 ({error.reason} at byte {error.start:,})", raw[error.start :])
    return rows.documents()


def _nothing(item: Input, schema: pa.Schema) -> Documents:
    return RowCollector(item, schema).documents()
