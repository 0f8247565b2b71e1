"""Real text that every machine with Python has: source code, and the prose that its packages carry.

    code.jsonl.zst     modules of the standard library and the installed packages
    prose.jsonl.zst    their docstrings, READMEs and manuals

Files are taken in the order of the hash of their name until a corpus is full, so that the choice is spread over all
packages and the same on every run. A name is a path below the folder that Python installs into, as in
`site-packages/numpy/linalg/__init__.py`, so that it is the same wherever Python is installed.
"""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash
import zstandard

from shards.files import publish

CODE_BYTES = 30_000_000
PROSE_BYTES = 15_000_000
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "encodings", "lib2to3"}
PROSE_NAMES = {"METADATA", "README", "CHANGES"}
PROSE_SUFFIXES = {".rst", ".md"}
FILE_BYTES = range(400, 300_000)  # smaller ones say little, larger ones are mostly tables


class File(NamedTuple):
    """A file, and the name by which its documents are known."""

    path: Path
    name: str


def collect(folder: Path) -> dict[str, int]:
    """Write the two corpora into `folder`; returns the bytes of text of each."""
    folder.mkdir(parents=True, exist_ok=True)
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    files = sorted(find_files(roots), key=lambda file: xxhash.xxh32_intdigest(file.name.encode()))
    modules = [file for file in files if file.path.suffix == ".py"]
    manuals = [file for file in files if file.path.suffix != ".py"]
    sizes = {"code": write_corpus(folder / "code.jsonl.zst", read_documents(modules), CODE_BYTES)}
    with ProcessPoolExecutor() as pool:
        docstrings = (found for found in pool.map(docstrings_of, modules, chunksize=32) if found is not None)
        prose = itertools.chain(read_documents(manuals), docstrings)
        sizes["prose"] = write_corpus(folder / "prose.jsonl.zst", prose, PROSE_BYTES)
        pool.shutdown(cancel_futures=True)
    return sizes


def find_files(roots: Iterable[Path]) -> Iterator[File]:
    """Python modules and prose below the roots."""
    for root in roots:
        for path in root.rglob("*"):
            inside = path.relative_to(root).parts
            wanted = path.suffix in {".py", *PROSE_SUFFIXES} or path.name in PROSE_NAMES
            if not wanted or SKIPPED_FOLDERS.intersection(inside):
                continue
            if path.is_file() and path.stat().st_size in FILE_BYTES:
                yield File(path, f"{root.name}/{path.relative_to(root).as_posix()}")


def read_documents(files: Iterable[File]) -> Iterator[tuple[str, str]]:
    """(id, text) of files that are UTF-8."""
    for file in files:
        try:
            yield file.name, file.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def docstrings_of(file: File) -> tuple[str, str] | None:
    """The longer docstrings of a module as one document, or None."""
    try:
        tree = ast.parse(file.path.read_bytes())
    except (SyntaxError, ValueError):
        return None
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 200]
    return (f"{file.name}#docstrings", "\n\n".join(docs)) if docs else None


def write_corpus(path: Path, documents: Iterable[tuple[str, str]], limit: int) -> int:
    """Write distinct documents as JSONL.zst until there are `limit` bytes of text; returns the bytes written."""
    size, seen = 0, set()
    temporary = path.with_name(path.name + ".tmp")
    with zstandard.open(temporary, "wt", encoding="utf-8") as file:
        for name, text in documents:
            data = text.encode(errors="replace")  # a docstring may spell a lone surrogate
            digest = xxhash.xxh3_128_digest(data)
            if digest in seen:  # vendored copies, licence texts
                continue
            seen.add(digest)
            file.write(json.dumps({"id": name, "text": data.decode()}) + "\n")
            size += len(data)
            if size >= limit:
                break
    publish(temporary, path)
    return size
