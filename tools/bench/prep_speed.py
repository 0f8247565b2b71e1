"""JSONL.zst to clean, deduplicated token shards, as whole processes: `minigpt-prep run` against datatrove.

Both take FineWeb's order: language (English, 0.65), Gopher's, C4's and FineWeb's rules, MinHash, tokens; see
`tools/bench/datatrove_peer.py` for what datatrove is spared. datatrove sees the first part of the text only
(`--peer-mb`), since it takes far longer; the start of its stages' processes, some 10 s in all, weighs on a small part.
Rates are MB of UTF-8 text per second of wall clock, start-up included. Rounds are taken in turns, the best counts. Both
run with `--workers` processes. At the end minigpt runs once on the peer's part too, so that the numbers of documents
kept can be compared.

minigpt's input is the file and, with `--copies N`, N - 1 more that are made from it: in each line all words but the
last are shuffled, so they are other documents of the same kind, which no deduplication removes.

Peak memory is the sum of the resident sets of the process and all its descendants, sampled 20 times a second:
pages that processes share count once for each, and a peak of less than 50 ms may be missed.

    python -m tools.bench prep
    python -m tools.bench prep --data web.jsonl.zst --rounds 1 --peer-mb 8
    python -m tools.bench prep --memory     # of single commands on 1 and 4 times the input, and on huge documents
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from shards.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HUGE = 16 << 20


class Run(NamedTuple):
    """A process and its descendants: wall-clock seconds, peak memory in MB, what it printed."""

    seconds: float
    peak_mb: float
    output: str


class Outcome(NamedTuple):
    """A run over text: MB of it, documents kept."""

    run: Run
    text_mb: float
    kept: int

    @property
    def rate(self) -> float:
        """MB of text per second."""
        return self.text_mb / self.run.seconds


def main() -> None:
    """Measure both in turns and print rates, ratio and peak memory; or, with --memory, the single commands."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench prep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "books.jsonl.zst", help="a .jsonl.zst with a key `text`")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "gpt2-tokenizer.json")
    parser.add_argument("--copies", type=int, default=4, help="files that minigpt sees, the data among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-mb", type=float, default=4.0, help="MB of text that datatrove sees")
    parser.add_argument("--memory", action="store_true", help="peak memory of filter, decontaminate and tokenize")
    parser.add_argument("--benchmark", type=Path, default=SHARED / "gsm8k-test.jsonl", help="for --memory")
    options = parser.parse_args()
    for path in (options.data, options.tokenizer, *([options.benchmark] if options.memory else [])):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name one with --data, --tokenizer or --benchmark")
    with tempfile.TemporaryDirectory(prefix="bench-prep-") as name:
        if options.memory:
            memory(options, Path(name))
        else:
            speed(options, Path(name))


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Rounds of both, then the report."""
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("datatrove is not installed: pip install -c constraints.txt -e '.[bench]'")
    part = folder / "part"
    cut(options.data, part, int(options.peer_mb * 1e6), options.workers)
    inputs = [options.data, *(folder / f"shuffled-{number}.jsonl.zst" for number in range(1, options.copies))]
    for seed, path in enumerate(inputs[1:], 1):
        write_shuffled(options.data, path, seed)
    text_mb = sum(text_size(path)[1] for path in inputs) / 1e6
    ours, others = [], []
    for number in range(options.rounds):
        ours.append(run_minigpt(options, folder, inputs, text_mb))
        others.append(run_peer(options, part))
        print(f"round {number + 1}: {ours[-1].rate:.1f} MB/s, datatrove {others[-1].rate:.3f} MB/s", file=sys.stderr)
    small = run_minigpt(options, folder, sorted(part.iterdir()), others[0].text_mb)
    best, best_peer = max(ours, key=lambda one: one.rate), max(others, key=lambda one: one.rate)
    cores = len(os.sched_getaffinity(0))
    print(
        f"{options.data.name} × {options.copies}: {text_mb:.1f} MB of text, {cores} cores, "
        f"{options.workers} workers, best of {len(ours)}"
    )
    for title, one in (("minigpt-prep run", best), ("datatrove", best_peer)):
        print(
            f"  {title:<20}{one.rate:9.2f} MB/s   {one.run.seconds:7.2f} s for {one.text_mb:5.1f} MB   "
            f"peak {one.run.peak_mb:6.0f} MB"
        )
    print(f"  {'ratio':<20}{best.rate / best_peer.rate:9.1f}")
    print(f"  documents kept of the first {small.text_mb:.1f} MB: minigpt {small.kept}, datatrove {best_peer.kept}")
    for stage in json.loads(best_peer.run.output.splitlines()[-1])["stages"]:
        print(f"    datatrove, {stage['name']:<12}{stage['seconds']:7.2f} s")


def write_shuffled(source: Path, out: Path, seed: int) -> None:
    """Documents with the words of `source` in another order: within each line, the last one stays in its place."""
    import zstandard

    rng = random.Random(seed)
    with zstandard.open(out, "wb") as file:
        for line in lines(source):
            row = json.loads(line)
            text = []
            for words in (part.split(" ") for part in row["text"].split("\n")):
                *rest, last = words
                rng.shuffle(rest)
                text.append(" ".join([*rest, last]))
            row = {**row, "id": f"{row['id']}~{seed}", "text": "\n".join(text)}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def run_minigpt(options: argparse.Namespace, folder: Path, inputs: list[Path], text_mb: float) -> Outcome:
    """`minigpt-prep run` of a FineWeb-like recipe into an empty folder."""
    out, recipe = folder / "out", folder / "recipe.yaml"
    shutil.rmtree(out, ignore_errors=True)
    content = {
        "name": "fineweb",
        "output": str(out),
        "sources": [{"name": "text", "path": [str(path.resolve()) for path in inputs]}],
        "stages": [
            {"language": {"languages": {"en": 0.65}}},
            {"filter": {"preset": "fineweb"}},
            {"dedup": {"method": "minhash"}},
            {"tokenize": {"tokenizer": str(options.tokenizer.resolve())}},
        ],
    }
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    run = run_tree([sys.executable, "-m", "prep.cli", "run", str(recipe), "--workers", str(options.workers)])
    manifests = sorted(out.rglob("dataset.json"))
    if not manifests:
        raise UserError(f"{out}: the run left no dataset.json")
    kept = sum(shard["documents"] for path in manifests for shard in json.loads(path.read_bytes())["shards"])
    return Outcome(run, text_mb, kept)


def run_peer(options: argparse.Namespace, part: Path) -> Outcome:
    """datatrove's pipeline over a folder."""
    arguments = ["-m", "tools.bench.datatrove_peer", "pipeline", str(part), "--tokenizer", str(options.tokenizer)]
    run = run_tree([sys.executable, *arguments, "--workers", str(options.workers)])
    figures = json.loads(run.output.splitlines()[-1])
    return Outcome(run, figures["text_mb"], figures["documents_kept"])


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Peak memory of each command on the file, on four copies of it, and on documents of 16 MB."""
    copies = [folder / f"copy{number}.jsonl.zst" for number in range(4)]
    for path in copies:
        shutil.copyfile(options.data, path)
    huge = folder / "huge.jsonl.zst"
    write_huge(options.data, huge)
    tokenizer, benchmark = str(options.tokenizer), str(options.benchmark)
    commands = {
        "filter": ["filter", "--preset", "fineweb"],
        "decontaminate": ["decontaminate", "--against", benchmark],
        "tokenize": ["tokenize", "--tokenizer", tokenizer],
    }
    print(f"{options.data.name}, {options.workers} workers; peak memory in MB (sum of resident sets, all processes)")
    print(f"  {'':<16}{'× 1':>8}{'× 4':>8}{'4 × 16 MB':>11}")
    for name, command in commands.items():
        peaks = []
        for inputs in (copies[:1], copies, [huge]):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            arguments = [*command, *map(str, inputs), "--out", str(out), "--workers", str(options.workers)]
            peaks.append(run_tree([sys.executable, "-m", "prep.cli", *arguments]).peak_mb)
        print(f"  {name:<16}{peaks[0]:8.0f}{peaks[1]:8.0f}{peaks[2]:11.0f}", flush=True)


def write_huge(source: Path, out: Path, documents: int = 4) -> None:
    """A .jsonl.zst of documents of 16 MB, each the texts of `source` in a row from another place on.

    The first rows of `source` stand before them: rules on length remove the huge ones, and an empty result is an error.
    """
    import zstandard

    rows = list(lines(source))
    texts = [json.loads(row)["text"] for row in rows]
    with zstandard.open(out, "wb") as file:
        file.write(b"".join(rows[:1000]))
        for number in range(documents):
            at, parts, size = number * len(texts) // documents, [], 0
            while size < HUGE:
                parts.append(texts[at % len(texts)])
                size, at = size + len(parts[-1].encode()) + 2, at + 1
            file.write(json.dumps({"id": f"huge{number}", "text": "\n\n".join(parts)}).encode() + b"\n")


def cut(source: Path, folder: Path, text_bytes: int, number: int) -> None:
    """The first rows of a .jsonl.zst, until they hold `text_bytes` of text, as `number` files of about equal size."""
    import zstandard

    rows: list[tuple[int, bytes]] = []
    left = text_bytes
    for line in lines(source):
        size = len(json.loads(line)["text"].encode())
        rows.append((size, line))
        left -= size
        if left <= 0:
            break
    folder.mkdir()
    total, done = sum(size for size, _ in rows), 0
    files = [zstandard.open(folder / f"{index:05d}.jsonl.zst", "wb") for index in range(number)]
    for size, line in rows:
        files[min(done * number // total, number - 1)].write(line)
        done += size
    for file in files:
        file.close()


def text_size(source: Path) -> tuple[int, int]:
    """Documents and bytes of UTF-8 text in a .jsonl.zst or in a folder of them."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    sizes = [len(json.loads(line)["text"].encode()) for path in files for line in lines(path)]
    return len(sizes), sum(sizes)


def lines(source: Path) -> Iterator[bytes]:
    """The rows of a .jsonl.zst."""
    import zstandard

    with source.open("rb") as file:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), 1 << 20)


def run_tree(command: list[str]) -> Run:
    """Run a command; seconds, peak memory of its process tree, standard output. Standard error is shown if it fails."""
    if not Path("/proc/self/task").is_dir():
        raise UserError("memory is read from /proc, which this system does not have")
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as messages:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=messages)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(resident, tree(process.pid))))
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - begin
        output.seek(0)
        messages.seek(0)
        if process.returncode:
            sys.stderr.write(messages.read().decode(errors="replace")[-4000:])
            raise UserError(f"{' '.join(command)}: failed with status {process.returncode}")
        return Run(seconds, peak / 1e6, output.read().decode())


def tree(pid: int) -> list[int]:
    """A process and its descendants; those that end meanwhile are left out."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            waiting += read_numbers(children)
    return found


def resident(pid: int) -> int:
    """Resident memory in bytes; 0 if the process has ended."""
    numbers = read_numbers(Path(f"/proc/{pid}/statm"))
    return numbers[1] * os.sysconf("SC_PAGE_SIZE") if numbers else 0


def read_numbers(path: Path) -> list[int]:
    """The integers in a file of /proc; none if its process has ended."""
    try:
        return [int(number) for number in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":
    main()
