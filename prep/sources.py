"""Readers: files become blocks of documents.

A file is one of three kinds, told by its name: rows of JSON (`.jsonl .ndjson .json`, plain or `.gz` or `.zst`),
Parquet, or plain text, where one file is one document. Reading is split in two: `read_blocks` walks through the files
in order and cuts them into blocks of about 4 MB, which is cheap; `Block.load` parses one block, which is not. The cuts
depend on the files alone, so a run that starts again at a block's end sees the same blocks.

A bad row is set aside (`Rejected`) and the reading goes on. A file whose rest cannot be read (a truncated `.gz`) gives
what stands before the damage and then a block whose `broken` says what is wrong.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from prep.documents import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    START,
    Block,
    BrokenInput,
    Columns,
    Documents,
    Input,
    Position,
    RowCollector,
)
from shards.errors import UserError

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSIONS = (".gz", ".zst", ".zstd")
PARQUET_SUFFIXES = (".parquet", ".pq")
_TEXT_NAMES = """
    txt text md markdown rst adoc org tex html htm xml py pyi c h cc cpp cxx hpp hh cu cuh java kt scala js jsx mjs ts
    tsx go rs rb php pl pm lua r jl swift m hs ml mli ex exs erl clj el lisp scm sh bash zsh ps1 sql css scss yaml yml
    toml ini cfg cmake proto vim f90 zig dart v
"""
TEXT_SUFFIXES = frozenset("." + name for name in _TEXT_NAMES.split())
LINK, DANGLING = "linked folder", "link to nowhere"
SHOWN_KINDS, SHOWN_NAMES = 4, 2
READABLE = f"{' '.join(ROW_SUFFIXES)} (plain, .gz or .zst), .parquet, and text: .txt .md .rst .py and other source code"

Kind = Literal["rows", "parquet", "text"]


class Found(NamedTuple):
    """The files to read, and what the folders among the arguments hold beside them."""

    inputs: list[Input]
    left_out: list[LeftOut]


class LeftOut(NamedTuple):
    """What was left out of a folder: kind (a suffix, or what it is instead of a file) -> names below the folder."""

    folder: str
    names: dict[str, list[str]]

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return {kind: len(names) for kind, names in self.names.items()}

    def __str__(self) -> str:
        """One line, with the first names and what to do."""
        kinds = sorted(self.names.items(), key=lambda pair: (pair[0] not in (".json", LINK), -len(pair[1])))
        shown = [
            f"{len(names):,} × {kind} ({', '.join(names[:SHOWN_NAMES])}{', …' * (len(names) > SHOWN_NAMES)})"
            for kind, names in kinds[:SHOWN_KINDS]
        ]
        rest = sum(len(names) for _, names in kinds[SHOWN_KINDS:])
        line = f"{self.folder}: left out {', '.join(shown)}" + (f", and {rest:,} of other suffixes" if rest else "")
        advice = []
        if ".json" in self.names:
            pattern = "**/*.json" if any("/" in name for name in self.names[".json"]) else "*.json"
            advice.append(
                f"beside text .json is taken for configuration: to include it, give '{self.folder}/{pattern}'"
            )
        if LINK in self.names:
            advice.append("linked folders are not followed: to include them, give them by name")
        if self.names.keys() - {".json", LINK, DANGLING}:
            advice.append("to include files of unknown suffixes, give them one that is known, such as .txt or .jsonl")
        return "; ".join([line, *advice])


def find_inputs(arguments: Sequence[str], source: str | None = None, exclude: Path | None = None) -> Found:
    """Files behind paths, globs and folders; folders are searched recursively, hidden files left out, sorted by path.

    Ids are made of the files' names: neither those nor the order depend on how a path is spelled.

    Args:
        arguments: what the user typed.
        source: name of the source; default: the stem of a file that is named, the name of a folder.
        exclude: a folder that is not searched (where the output goes).

    Raises:
        UserError: nothing found, a folder that cannot be read, a suffix that is not known, a file that is given twice.
    """
    found: list[tuple[Path, str, str]] = []  # file, name, source
    left_out: list[LeftOut] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            files, rest = _walk(path, exclude)
            own = path.resolve().name
            found += [(file, f"{own}/{file.relative_to(path).as_posix()}", own) for file in files]
            left_out += [rest] if rest.names else []
        elif path.exists():
            found.append((path, path.name, path.name.split(".")[0] or path.name))
        elif glob.has_magic(argument):
            root = _literal_root(path)
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
            if not files:
                raise UserError(f"{argument}: no file matches this pattern")
            found += [(file, file.relative_to(root).as_posix(), root.resolve().name) for file in files]
        else:
            raise UserError(f"{argument}: no such file or folder")
    names = [name for _, name, _ in found]
    if len(set(names)) < len(names):  # the same name below two arguments: only longer paths tell their documents apart
        paths = [path.parent.resolve() / path.name for path, _, _ in found]
        root = Path(os.path.commonpath([path.parent for path in paths]))
        names = [path.relative_to(root).as_posix() for path in paths]
    seen: set[Path] = set()
    for path, _, _ in found:
        if (real := path.resolve()) in seen:
            raise UserError(f"{path}: given twice; to see a source more often, raise its weight in the mixture")
        seen.add(real)
    inputs = [
        Input(path, name, source or own, _require_kind(path), path.stat().st_size)
        for (path, _, own), name in zip(found, names, strict=True)
    ]
    return Found(inputs, left_out)


def check_inputs(inputs: Sequence[Input], columns: Columns) -> None:
    """Look for the named columns in every file of rows, before any work is done.

    Raises:
        UserError: a column that is missing or of a wrong type, with the columns found; a file that is not what its name
            says; a text file too large to be one document.
    """
    from prep.jsonl import check_rows
    from prep.parquet import open_parquet

    for item in inputs:
        if item.kind == "rows":
            check_rows(item, columns)
        elif item.kind == "parquet":
            open_parquet(item, columns)
        elif item.size > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{item.path}: {item.size:,} bytes; a text file is one document, and no document is larger than "
                f"{MAX_DOCUMENT_BYTES:,} bytes. Cut it into documents, one JSON object with a text per line (.jsonl)"
            )


def read_blocks(inputs: Sequence[Input], columns: Columns, start: Position = START) -> Iterator[Block]:
    """Cut the inputs into blocks, in order, from the end of a block on (or from the beginning)."""
    from prep.jsonl import row_blocks
    from prep.parquet import parquet_blocks

    index, row = start
    consumed = sum(item.size for item in inputs[:index])
    while index < len(inputs):
        item = inputs[index]
        if item.kind == "text":
            group = _text_group(inputs, index)
            size = sum(file.size for file in group)
            index, consumed = index + len(group), consumed + size
            yield Block(_TextLoader(group), size, Position(index), consumed)
            continue
        broken = None
        try:
            for piece in (row_blocks if item.kind == "rows" else parquet_blocks)(item, columns, row):
                row = piece.row
                yield Block(piece.load, piece.size, Position(index, row), consumed + piece.consumed)
        except BrokenInput as error:
            broken = f"{item.path}: {error}; {row:,} rows before the damage were read"
        index, row, consumed = index + 1, 0, consumed + item.size
        if broken:
            yield Block(RowCollector(item).documents, 0, Position(index), consumed, broken)


def _kind(path: Path) -> Kind | None:
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(ROW_SUFFIXES):
        return "rows"
    if path.suffix.lower() in PARQUET_SUFFIXES:
        return "parquet"
    return "text" if path.suffix.lower() in TEXT_SUFFIXES else None


def _require_kind(path: Path) -> Kind:
    if (kind := _kind(path)) is None:
        raise UserError(f"{path}: cannot tell by its name what this file is; readable are {READABLE}")
    return kind


def _walk(folder: Path, exclude: Path | None) -> tuple[list[Path], LeftOut]:
    """All readable files below a folder, sorted, and what else is there; links to folders are not followed."""
    excluded = exclude.resolve() if exclude else None
    kinds: dict[Path, Kind] = {}
    others: list[tuple[str, Path]] = []

    def fail(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); make it readable, "
            f"or name the folders and files to read beside it"
        ) from None

    for directory, folders, files in os.walk(folder, onerror=fail):
        here = Path(directory)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != excluded]
        others += [(LINK, here / name) for name in folders if (here / name).is_symlink()]
        for name in files:
            path = here / name
            if name.startswith("."):
                continue
            if not path.is_file():
                others += [(DANGLING, path)] if path.is_symlink() else []  # no socket or pipe is worth a word
            elif kind := _kind(path):
                kinds[path] = kind
            else:
                others.append((_suffix(path), path))
    if not kinds:
        raise UserError(f"{folder}: this folder holds no file that can be read; readable are {READABLE}")
    if "text" in kinds.values():  # beside text and source code a plain .json is configuration, not rows of documents
        others += [(".json", path) for path in kinds if path.suffix.lower() == ".json"]
        kinds = {path: kind for path, kind in kinds.items() if path.suffix.lower() != ".json"}
    names: dict[str, list[str]] = {}
    for what, path in sorted(others):
        names.setdefault(what, []).append(path.relative_to(folder).as_posix())
    return sorted(kinds), LeftOut(str(folder), names)


def _suffix(path: Path) -> str:
    suffixes = path.suffixes[-2:] if path.suffix.lower() in COMPRESSIONS else path.suffixes[-1:]
    return "".join(suffixes).lower() or "no suffix"


def _literal_root(pattern: Path) -> Path:
    """The folder in front of the first wildcard: `data/*/x.txt` -> `data`."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


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


class _TextLoader:
    """Reads a group of text files; each is one document, its id is its name."""

    def __init__(self, group: list[Input]) -> None:
        self.group = group

    def __call__(self) -> Documents:
        rows = RowCollector(self.group[0])
        for item in self.group:
            raw = item.path.read_bytes()
            try:
                rows.add(item.name, raw.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                rows.item = item
                line = raw.count(b"\n", 0, error.start) + 1
                rows.reject(line, f"not UTF-8 ({error.reason} at byte {error.start:,})", raw[error.start :])
        return rows.documents()
