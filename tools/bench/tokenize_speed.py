"""JSONL.zst to token shards, as whole processes: `minigpt-prep tokenize` against a pool of `tokenizers` encodes.

The peer is the usual script: a `multiprocessing.Pool` whose workers parse a line and encode its text, one process that
reads the lines and writes the ids to one file. It sees the first part of the text only (`--peer-mb`), since it takes
some fifty times as long; both rates are MB of UTF-8 text per second of wall clock, start-up included. Rounds are taken
in turns, the best counts.

    python -m tools.bench tokenize
    python -m tools.bench tokenize --data web.jsonl.zst --tokenizer tokenizer.json --copies 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
POOL = 2
_worker: dict[str, Any] = {}


class Run(NamedTuple):
    """One process: wall-clock seconds, peak memory in MB, MB of text that it tokenized."""

    seconds: float
    peak_mb: float
    text_mb: float

    @property
    def rate(self) -> float:
        """MB of text per second."""
        return self.text_mb / self.seconds


def main() -> None:
    """Measure both in turns and print rates, ratio and peak memory."""
    if sys.argv[1:2] == ["peer"]:
        return peer(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(float(sys.argv[5]) * 1e6))
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "books.jsonl.zst", help="a .jsonl.zst with a key `text`")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "gpt2-tokenizer.json")
    parser.add_argument("--copies", type=int, default=4, help="how often the file is given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-mb", type=float, default=16.0, help="MB of rows that the peer sees")
    options = parser.parse_args()
    for path in (options.data, options.tokenizer):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name one with --data and --tokenizer")
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as name:
        folder = Path(name)
        copies = [folder / "in" / f"copy{number}.jsonl.zst" for number in range(options.copies)]
        copies[0].parent.mkdir()
        for path in copies:
            shutil.copyfile(options.data, path)
        ours, others, one = [], [], []
        for number in range(options.rounds):
            ours.append(run_minigpt(copies, options.tokenizer, folder / "out"))
            others.append(run_peer(copies[0], options.tokenizer, folder / "peer.bin", options.peer_mb))
            one.append(run_minigpt(copies[:1], options.tokenizer, folder / "out"))
            print(f"round {number + 1}: {ours[-1].rate:.0f} MB/s, peer {others[-1].rate:.2f} MB/s", file=sys.stderr)
    report(options, ours, others, one)


def report(options: argparse.Namespace, ours: list[Run], others: list[Run], one: list[Run]) -> None:
    """Print the best of each."""
    best, best_peer = max(ours, key=lambda run: run.rate), max(others, key=lambda run: run.rate)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{options.data.name} × {options.copies} = {best.text_mb:.0f} MB of text, {cores} cores, best of {len(ours)}")
    print(f"  minigpt-prep tokenize      {best.rate:8.1f} MB/s   {best.seconds:6.2f} s for {best.text_mb:.0f} MB")
    print(
        f"  Pool({POOL}) of `tokenizers`   {best_peer.rate:8.2f} MB/s   {best_peer.seconds:6.2f} s "
        f"for the first {best_peer.text_mb:.0f} MB"
    )
    print(f"  ratio                      {best.rate / best_peer.rate:8.1f}")
    peak, peak_one = max(run.peak_mb for run in ours), max(run.peak_mb for run in one)
    print(f"  peak memory                {peak:8.0f} MB     ({peak_one:.0f} MB for one copy)")


def run_minigpt(inputs: list[Path], tokenizer: Path, out: Path) -> Run:
    """`minigpt-prep tokenize` into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["-m", "prep.cli", "tokenize", *map(str, inputs), "--tokenizer", str(tokenizer), "--out", str(out)]
    seconds, peak_mb = timed([sys.executable, *arguments])
    manifest = json.loads((out / "dataset.json").read_bytes())
    if not manifest["backend"].startswith("fastokens"):
        print(f"note: the backend was {manifest['backend']}", file=sys.stderr)
    return Run(seconds, peak_mb, manifest["text_bytes"] / 1e6)


def run_peer(source: Path, tokenizer: Path, out: Path, megabytes: float) -> Run:
    """The pool, in a process of its own."""
    arguments = ["-m", "tools.bench.tokenize_speed", "peer", str(source), str(tokenizer), str(out), str(megabytes)]
    seconds, peak_mb = timed([sys.executable, *arguments])
    return Run(seconds, peak_mb, int(out.with_suffix(".text_bytes").read_text()) / 1e6)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory (MB, of the process itself) of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command)}: failed with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def peer(source: Path, tokenizer: Path, out: Path, limit: int) -> None:
    """Tokenize the first `limit` bytes of rows with a pool of processes; uint16 ids, EOS behind each document."""
    import multiprocessing

    import numpy as np

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    text_bytes = 0
    with multiprocessing.Pool(POOL, initializer=load, initargs=(str(tokenizer),)) as pool, out.open("wb") as file:
        for ids, size in pool.imap(encode, lines(source, limit), chunksize=32):
            file.write(np.array(ids, dtype=np.uint16).tobytes())
            text_bytes += size
    out.with_suffix(".text_bytes").write_text(str(text_bytes))


def lines(source: Path, limit: int) -> Iterator[bytes]:
    """Whole rows of a .jsonl.zst until `limit` bytes are read."""
    import io

    import zstandard

    with source.open("rb") as file:
        for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file), 1 << 20):
            yield line
            limit -= len(line)
            if limit <= 0:
                return


def load(tokenizer: str) -> None:
    """Start of a pool worker."""
    from tokenizers import Tokenizer

    _worker["tokenizer"] = Tokenizer.from_file(tokenizer)
    _worker["eos"] = _worker["tokenizer"].get_vocab_size() - 1


def encode(line: bytes) -> tuple[list[int], int]:
    """One document in a pool worker."""
    text = json.loads(line)["text"]
    return [*_worker["tokenizer"].encode(text, add_special_tokens=False).ids, _worker["eos"]], len(text.encode())


if __name__ == "__main__":
    main()
