"""What files are, told by their names, and what folders hold."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from prep.arrow_files import INFO, SPLITS, STATE
from prep.documents import Kind
from prep.stage_manifest import is_stage_folder
from prep.storage import Folder, Stat, matches, remote_files
from shards.errors import UserError

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst", ".zstd")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow",)
_TEXT_NAMES = """
    txt text md markdown rst adoc org tex html htm xml py pyi c h cc cpp cxx hpp hh cu cuh java kt scala js jsx mjs ts
    tsx go rs rb php pl pm lua r jl swift m hs ml mli ex exs erl clj el lisp scm sh bash zsh ps1 sql css scss yaml yml
    toml ini cfg cmake proto vim f90 zig dart v
"""
TEXT_SUFFIXES = frozenset("." + name for name in _TEXT_NAMES.split())
LINK, DANGLING, OF_STAGE = "linked folder", "link to nowhere", "folder of a stage"
SHOWN_KINDS, SHOWN_NAMES = 4, 2
READABLE = (
    f"{' '.join(ROW_SUFFIXES + CSV_SUFFIXES)} (plain, .gz or .zst), .parquet, .arrow, and text: .txt .md .rst .py and "
    f"other source code"
)


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
        if OF_STAGE in self.names:
            advice.append("to read the documents of a stage, give its folder by name")
        if self.names.keys() - {".json", LINK, DANGLING, OF_STAGE}:
            advice.append("to include files of unknown suffixes, give them one that is known, such as .txt or .jsonl")
        return "; ".join([line, *advice])


def file_kind(path: str) -> Kind | None:
    """How a file is read, by its name; None: it cannot be."""
    name = path.rpartition("/")[2].lower()
    whole = name
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(ROW_SUFFIXES):
        return "rows"
    if name.endswith(CSV_SUFFIXES):
        return "csv"
    if whole.endswith(PARQUET_SUFFIXES):
        return "parquet"
    if whole.endswith(ARROW_SUFFIXES):
        return "arrow"
    return "text" if os.path.splitext(whole)[1] in TEXT_SUFFIXES else None


def require_kind(path: str) -> Kind:
    """How a file is read, by its name.

    Raises:
        UserError: a suffix that is not known.
    """
    if (kind := file_kind(path)) is None:
        raise UserError(f"{path}: cannot tell by its name what this file is; readable are {READABLE}")
    return kind


def walk(folder: Path, exclude: Path | None) -> tuple[list[Path], LeftOut]:
    """All readable files below a folder, sorted, and what else is there; links to folders are not followed.

    Raises:
        UserError: a folder that cannot be read, or nothing in it that can be.
    """
    excluded = exclude.resolve() if exclude else None
    found: list[str] = []
    others: list[tuple[str, str]] = []

    def fail(error: OSError) -> NoReturn:
        raise UserError(
            f"{error.filename}: this folder cannot be read ({error.strerror}); make it readable, "
            f"or name the folders and files to read beside it"
        ) from None

    for directory, folders, files in os.walk(folder, onerror=fail):
        here = Path(directory)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != excluded]
        stages = [name for name in folders if is_stage_folder(Folder(here / name))]  # removed documents lie there too
        others += [(OF_STAGE, _below(here / name, folder)) for name in stages]
        folders[:] = [name for name in folders if name not in stages]
        others += [(LINK, _below(here / name, folder)) for name in folders if (here / name).is_symlink()]
        for name in files:
            path = here / name
            if name.startswith("."):
                continue
            if path.is_file():
                found.append(_below(path, folder))
            elif path.is_symlink():  # no socket or pipe is worth a word
                others.append((DANGLING, _below(path, folder)))
    names, rest = _sort_out(str(folder), found, others)
    return [folder / name for name in names], rest


def walk_remote(address: str) -> tuple[list[Stat], LeftOut] | None:
    """All readable files below a remote folder, sorted, and what else is there; None: there is no such folder.

    Raises:
        UserError: there is nothing in it that can be read, or storage refuses.
    """
    address = address.rstrip("/")
    found = {file.path.removeprefix(address + "/"): file for file in remote_files(address)}
    if not found:
        return None
    visible = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
    names, rest = _sort_out(address, visible, [])
    return [found[name] for name in names], rest


def glob_remote(pattern: str) -> tuple[str, list[Stat]]:
    """The folder in front of the first wildcard of a pattern, and the remote files that match."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first])
    return root, [file for file in remote_files(root) if matches(file.path, pattern)]


def literal_root(pattern: Path) -> Path:
    """The folder in front of the first wildcard: `data/*/x.txt` -> `data`."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _sort_out(folder: str, found: Sequence[str], others: list[tuple[str, str]]) -> tuple[list[str], LeftOut]:
    """Which of the files below a folder are read, sorted, and what is left out."""
    saved = {name.rpartition("/")[0] for name in found if name.endswith(ARROW_SUFFIXES)}
    described = {f"{place}/{name}".lstrip("/") for place in saved for name in (STATE, INFO)}
    described |= {f"{place.rpartition('/')[0]}/{SPLITS}".lstrip("/") for place in saved}
    kinds: dict[str, Kind] = {}
    for name in found:
        if kind := file_kind(name):
            if name not in described:  # it describes Arrow files that lie beside it
                kinds[name] = kind
        else:
            others.append((_suffix(name), name))
    if not kinds:
        raise UserError(f"{folder}: this folder holds no file that can be read; readable are {READABLE}")
    if "text" in kinds.values():  # beside text and source code a plain .json is configuration, not rows of documents
        others += [(".json", name) for name in kinds if name.lower().endswith(".json")]
        kinds = {name: kind for name, kind in kinds.items() if not name.lower().endswith(".json")}
    names: dict[str, list[str]] = {}
    for what, name in sorted(others):
        names.setdefault(what, []).append(name)
    return sorted(kinds, key=lambda name: name.split("/")), LeftOut(folder, names)


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _suffix(name: str) -> str:
    suffixes = Path(name).suffixes
    last = suffixes[-2:] if suffixes and suffixes[-1].lower() in COMPRESSIONS else suffixes[-1:]
    return "".join(last).lower() or "no suffix"
