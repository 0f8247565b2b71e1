"""MinHash deduplication: signatures per core against datasketch and rensa, and the whole command.

Signatures: text to 128 hashes of its word 5-grams, one thread. minigpt's kernel goes straight over the UTF-8 buffer.
The peers get what people give them: `re.findall(r"\\w+", text.lower())` and the joined 5-grams, one `update` per
document; their rate without that Python part is shown beside it. All see the same documents and as many shingles.
Rounds are taken in turns, the best counts.

Whole command: `minigpt-prep dedup`, files in to files out with verification, over the data and further files made from
it: of their documents a tenth are copies, a tenth are edits of a few words, the others have their words shuffled, so
that they are new documents of the same kind. Memory is that of all its processes together, pages that they share
counted once (PSS), sampled.

    python -m tools.bench dedup
    python -m tools.bench dedup --documents 10000000     # short synthetic documents instead: time and peak memory
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import UserError
from tools.bench.tokenize_speed import SHARED, lines

PERMUTATIONS, WORDS = 128, 5
OURS = """
import json, sys, time
import numpy as np, pyarrow as pa
from prep.dedup.minhash import make_band_keys, make_shingles, make_signatures, permutations
texts = pa.array(json.loads(open(sys.argv[1]).read()))
parameters = permutations()
make_signatures(texts[:1], parameters)
begin = time.perf_counter(); make_signatures(texts, parameters); seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "shingles": sum(len(make_shingles(texts[i:i+1])[0]) for i in range(50))}))
"""
# Of ten synthetic documents one is a copy with other white space, one has one word changed, one six.
COPY, EDIT, REWRITE = 0, 1, 2


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["peer"]:
        return peer(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench dedup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SHARED / "books.jsonl.zst", help="a .jsonl.zst with a key `text`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-mb", type=float, default=8.0, help="MB of rows for the signatures")
    parser.add_argument("--files", type=int, default=5, help="so many files for the whole command, the data among them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", type=int, help="so many short synthetic documents instead of the data")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-dedup-") as name:
        folder = Path(name)
        if options.documents:
            files = list(synthesise(folder, options.documents))
            size = sum(file.stat().st_size for file in files)
            print(f"{options.documents:,} short documents, {size / 1e6:,.0f} MB of JSONL", flush=True)
            return whole(files, folder / "out", options.workers)
        if not options.data.is_file():
            raise UserError(f"{options.data}: no such file; name one with --data")
        signatures(options, folder)
        files = [options.data, *(vary(options.data, folder, number) for number in range(1, options.files))]
        whole(files, folder / "out", options.workers)


def signatures(options: argparse.Namespace, folder: Path) -> None:
    """Text to signatures, in turns."""
    texts = [json.loads(line)["text"] for line in lines(options.data, int(options.peer_mb * 1e6))]
    size = sum(len(text.encode()) for text in texts) / 1e6
    sample = folder / "texts.json"
    sample.write_text(json.dumps(texts))
    commands = {
        "minigpt": [sys.executable, "-c", OURS, str(sample)],
        "datasketch": [sys.executable, "-m", "tools.bench.dedup_speed", "peer", "datasketch", str(sample)],
        "rensa": [sys.executable, "-m", "tools.bench.dedup_speed", "peer", "rensa", str(sample)],
    }
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, command in commands.items():
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    if len({found["shingles"] for found in best.values()}) > 1:
        print(f"note: other numbers of shingles: { {name: found['shingles'] for name, found in best.items()} }")
    print(f"signatures of {len(texts):,} documents, {size:.1f} MB, one thread, best of {options.rounds}")
    for name, found in best.items():
        line = f"  {name:<12}{size / found['seconds']:8.1f} MB/s"
        if name != "minigpt":
            line += f"   minigpt is {found['seconds'] / best['minigpt']['seconds']:.1f} times as fast"
            line += f" ({size / found['hashing']:.1f} MB/s without the making of shingles)"
        print(line, flush=True)


def peer(name: str, sample: Path) -> None:
    """Signatures by a peer, in a process of its own."""
    texts = json.loads(sample.read_text())
    sign = signer(name)
    sign(shingles(texts[0]))
    hashing = 0.0
    begin = time.perf_counter()
    for text in texts:
        found = shingles(text)
        before = time.perf_counter()
        sign(found)
        hashing += time.perf_counter() - before
    seconds = time.perf_counter() - begin
    counted = sum(len(set(shingles(text))) for text in texts[:50])
    print(json.dumps({"seconds": seconds, "hashing": hashing, "shingles": counted}))


def signer(name: str) -> Any:
    """A function from shingles to a signature."""
    if name == "datasketch":
        from datasketch import MinHash

        empty = MinHash(PERMUTATIONS)  # a copy of it has its permutations already

        def sign(found: list[str]) -> None:
            signature = empty.copy()
            signature.update_batch([shingle.encode() for shingle in found])

        return sign
    from rensa import RMinHash

    def sign_rensa(found: list[str]) -> None:
        signature = RMinHash(PERMUTATIONS, 1)
        signature.update(found)
        signature.digest()

    return sign_rensa


def shingles(text: str) -> list[str]:
    """Word 5-grams."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))]


def vary(source: Path, folder: Path, number: int) -> Path:
    """A file of copies, edits and shuffled documents of another."""
    import zstandard

    generator = random.Random(number)
    path = folder / f"varied-{number}.jsonl.zst"
    with zstandard.open(path, "wt", encoding="utf-8") as file:
        for line in lines(source, 1 << 62):
            text = json.loads(line)["text"]
            kind = generator.randrange(10)
            if kind > COPY:
                words = text.split(" ")
                if kind == EDIT:
                    for _ in range(1 + len(words) // 100):
                        words[generator.randrange(len(words))] = "edited"
                else:
                    generator.shuffle(words)
                text = " ".join(words)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def whole(files: list[Path], out: Path, workers: int) -> None:
    """`minigpt-prep dedup`."""
    command = [sys.executable, "-m", "prep.cli", "dedup", *map(str, files), "--out", str(out)]
    seconds, peak = watched([*command, "--workers", str(workers), "--max-removed", "1"])
    report = json.loads((out / "report.json").read_bytes())
    dedup, size = report["dedup"][0], report["text_bytes"] / 1e6
    print(f"minigpt-prep dedup, {workers} workers, {size:,.0f} MB of text, {dedup['documents']:,} documents")
    print(f"  {size / seconds:8.1f} MB/s   {seconds:.1f} s")
    print(f"  {peak / 1e6:8,.0f} MB peak memory of all processes")
    print(f"  {dedup['removed']:,} removed, {dedup['candidates']:,} candidates, {dedup['verified']:,} pairs verified")


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the highest memory (bytes) of its processes together."""
    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.25):
            peak = max(peak, sum(map(memory, family(process.pid))))

    watcher = threading.Thread(target=sample)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    if status:
        raise UserError(f"{' '.join(command[:6])} …: failed with status {status}")
    return seconds, peak


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return  # it has just ended
    for child in children:
        yield from family(int(child))


def memory(pid: int) -> int:
    """Resident bytes of a process, its share of those that several have."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def synthesise(folder: Path, documents: int) -> Iterator[Path]:
    """JSONL files of random documents of 20 to 60 words, each followed by copies and edits of earlier ones."""
    generator = random.Random(0)
    vocabulary = [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 8))) for _ in range(9999)
    ]
    per_file = 1_000_000
    for first in range(0, documents, per_file):
        path = folder / f"documents-{first // per_file:03d}.jsonl"
        recent: list[list[str]] = []
        with path.open("w") as file:
            for number in range(first, min(first + per_file, documents)):
                kind = number % 10
                if kind > REWRITE or not recent:
                    words = generator.choices(vocabulary, k=generator.randint(20, 60))
                    recent = [*recent[-99:], words]
                else:
                    words = list(generator.choice(recent))
                    for _ in range((0, 1, 6)[kind]):
                        words[generator.randrange(len(words))] = generator.choice(vocabulary)
                text = ("  " if kind == COPY else " ").join(words)
                file.write(f'{{"id": "{number}", "text": "{text}"}}\n')
        yield path


if __name__ == "__main__":
    main()
