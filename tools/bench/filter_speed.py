"""The statistics and rules of the `fineweb` preset on one core, beside datatrove's same four filters.

minigpt runs warm and in one thread over batches in memory: every step for itself, all statistics together (as
`--stats-only` measures them), and the stages as a run applies them, where a rejected document goes no further. The best
of some rounds counts. datatrove works through the first part of the text (`--peer-mb`), since it takes some
hundred times as long: one task, JSONL in and out, its words and sentences from spaCy. Rates are MB of UTF-8 text per
second.

    python -m tools.bench filter
    python -m tools.bench filter --data web.jsonl.zst --datatrove-python /tmp/datatrove/bin/python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
OURS = """
import io, json, sys, time
import pyarrow as pa, zstandard
from prep.filters import measures
from prep.filters.presets import build
from prep.filters.rules import CleanStage, MeasureStage
from prep.stages import Tally
from prep.words import split_words

path, megabytes, rounds = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
texts, size, batches = [], 0, []
with open(path, "rb") as file:
    for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file)):
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
for start in range(0, len(texts), 2000):
    part = texts[start : start + 2000]
    columns = [pa.array([str(start + row) for row in range(len(part))]), pa.array(part), pa.repeat("x", len(part))]
    batches.append(pa.RecordBatch.from_arrays(columns, names=["id", "text", "source"]))
stages = build({"preset": "fineweb"}, "")
gopher, c4, fineweb = stages
measure = MeasureStage(tuple(stages))
columns = [measures.Texts(batch.column("text")) for batch in batches]
cleaned = [measures.Texts(c4.clean(batch.column("text"))[0]) for batch in batches]
for column in columns:
    column.words, column.characters


def run(batch):
    for stage in stages:
        batch = stage(batch, Tally(stage.name))
    return batch.num_rows


work = {"words": lambda: [split_words(batch.column("text"), ["hash"]) for batch in batches]}
for name in ("tokens", "line_edges", "copies", "ngrams"):
    work[name] = lambda group=measures.GROUPS[name]: [group(column) for column in columns]
work["C4 cleaning"] = lambda: [c4.clean(batch.column("text")) for batch in batches]
work["FineWeb lines"] = lambda: [measures.GROUPS["plain_lines"](measures.Texts(column.texts)) for column in cleaned]
work["all statistics"] = lambda: [measure(batch, Tally("measure")) for batch in batches]
work["the stages"] = lambda: sum(run(batch) for batch in batches)
best = {}
for number in range(rounds + 1):  # the first round compiles
    for name, call in work.items():
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        best[name] = min(best.get(name, seconds), seconds) if number else 1e9
print(json.dumps({"documents": len(texts), "text_mb": size / 1e6, "seconds": best, "kept": result}))
"""


def main() -> None:
    """Measure both and print rates and ratio."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench filter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "books.jsonl.zst", help="a .jsonl.zst with a key `text`")
    parser.add_argument("--mb", type=float, default=20.0, help="MB of text to measure on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-mb", type=float, default=2.0, help="MB of text that datatrove sees")
    parser.add_argument("--datatrove-python", default=sys.executable, help="a Python in which datatrove is installed")
    options = parser.parse_args()
    if not options.data.is_file():
        raise UserError(f"{options.data}: no such file; name one with --data")
    if options.datatrove_python == sys.executable and importlib.util.find_spec("datatrove") is None:
        raise UserError("datatrove is not installed: pip install -c constraints.txt -e '.[bench]'")
    ours = call([sys.executable, "-c", OURS, str(options.data), str(options.mb), str(options.rounds)])
    peer = ["-m", "tools.bench.datatrove_peer", "filters", str(options.data), "--mb", str(options.peer_mb)]
    theirs = call([options.datatrove_python, *peer])
    print(f"{options.data.name}: {ours['documents']} documents, {ours['text_mb']:.1f} MB, one thread, warm, best round")
    rates = {name: ours["text_mb"] / seconds for name, seconds in ours["seconds"].items()}
    for name, rate in rates.items():
        print(f"  {name:<18}{rate:9.1f} MB/s")
    rate = theirs["mb_per_second"]
    print(f"  {'datatrove':<18}{rate:9.2f} MB/s   {theirs['seconds']:.1f} s for the first {theirs['text_mb']:.1f} MB")
    print(f"  {'ratio':<18}{rates['all statistics'] / rate:9.0f}        all statistics")
    print(f"  {'':<18}{rates['the stages'] / rate:9.0f}        the stages")


def call(command: list[str]) -> dict[str, Any]:
    """Run a process in the repository; its last line is JSON."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{command[0]}: the process failed; its message is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
