"""Window loader against nanoGPT's `get_batch`, and the time to open a mixture of a trillion tokens.

`python -m tools.bench loader`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from shards.format import DEFAULT_SHARD_TOKENS, FORMAT_VERSION, Manifest, ShardEntry, dataset_fingerprint, pack_header
from shards.loader import WindowLoader
from shards.mixture import MixtureConfig, MixturePlan
from shards.writer import DatasetWriter

VOCAB, EOS, DOCUMENT = 50_257, 50_256, 500  # tokens per document


def main() -> None:
    """Measure both loaders over the same file in turns, then opening; print two tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench loader", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=2**26, help="tokens of the dataset both read")
    parser.add_argument("--batches", type=int, default=300, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in turns; the best counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        speed(Path(folder), arguments)
        opening(Path(folder))


def speed(folder: Path, arguments: argparse.Namespace) -> None:
    """Tokens per second of nanoGPT's recipe and of the window loader, single-threaded and with threads."""
    batch_size, length = arguments.batch_size, arguments.length
    write_dataset(folder / "data", arguments.tokens)
    config = MixtureConfig.model_validate({"sources": [{"name": "data", "path": str(folder / "data"), "weight": 1}]})
    plan = MixturePlan.build(config, length)
    peer = "nanoGPT get_batch"
    pulls: dict[str, Callable[[], object]] = {
        peer: lambda: get_batch(folder / "data" / "shard-00000.bin", batch_size, length)
    }
    loaders = []
    for label, workers, mask in (
        ("minigpt, in the calling thread", 0, False),
        ("minigpt, 1 thread ahead", 1, False),
        ("minigpt, 2 threads ahead", 2, False),
        ("minigpt, 1 thread ahead, document mask", 1, True),
    ):
        loaders.append(WindowLoader(plan, batch_size=batch_size, num_workers=workers, document_mask=mask))
        pulls[label] = loaders[-1].__next__
    best = dict.fromkeys(pulls, float("inf"))
    for _ in range(arguments.rounds + 1):  # the first round also warms the files
        for label, pull in pulls.items():
            start = time.perf_counter()
            for _ in range(arguments.batches):
                pull()
            best[label] = min(best[label], (time.perf_counter() - start) / arguments.batches)
    for loader in loaders:
        loader.close()
    table = Table(title=f"Batches of {batch_size} x {length}, one process, warm file of {arguments.tokens:,} tokens")
    for column in ("loader", "µs / batch", "M tokens/s", "x get_batch"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for label, seconds in best.items():
        rate = batch_size * length / seconds / 1e6
        table.add_row(label, f"{seconds * 1e6:.1f}", f"{rate:,.0f}", f"{best[peer] / seconds:.1f}")
    Console().print(table)


def get_batch(path: Path, batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """nanoGPT's documented recipe: a new memmap per batch, random offsets, a slice and a cast per row, a stack."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    offsets = torch.randint(len(data) - length, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in offsets])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in offsets])
    return x, y


def opening(folder: Path, sources: int = 100, tokens: int = 10**10, length: int = 4096) -> None:
    """Time from a mixture's config to its loader, and to the first batch, with sparse files of the full size."""
    for index in range(sources):
        sparse_dataset(folder / f"source-{index:03d}", tokens)
    lines = [
        {"name": path.name, "path": str(path), "weight": 1 + index % 7}
        for index, path in enumerate(sorted(folder.glob("source-*")))
    ]
    config = MixtureConfig.model_validate({"total_tokens": sources * tokens, "sources": lines})
    start = time.perf_counter()
    plan = MixturePlan.build(config, length)
    loader = WindowLoader(plan, batch_size=8, num_workers=0)
    opened = time.perf_counter()
    next(loader)
    first = time.perf_counter()
    step = 10**8 // loader.step_samples * loader.step_samples
    middle = WindowLoader(plan, batch_size=8, num_workers=0, next_sample=step)
    next(middle)
    resumed = time.perf_counter()
    state = json.dumps({"next_sample": middle.next_sample, "plan": plan.fingerprint(middle.next_sample)})
    shards = sum(len(source.dataset.shards) for source in plan.sources)
    table = Table(title=f"{sources} sources, {sources * tokens:,} tokens, {shards:,} shards (sparse files)")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("open: mixture to loader", f"{opened - start:.3f} s")
    table.add_row("first batch of 8 x 4096", f"{first - opened:.3f} s")
    table.add_row("new loader at sample 100,000,000, its first batch", f"{resumed - first:.3f} s")
    table.add_row("state", f"{len(state)} bytes")
    Console().print(table)


def write_dataset(directory: Path, tokens: int) -> None:
    """A dataset of random ids in documents of 500 tokens."""
    ends = np.append(np.arange(DOCUMENT, tokens, DOCUMENT), tokens)
    stream = np.random.default_rng(0).integers(0, EOS, tokens, dtype=np.uint16)
    stream[ends - 1] = EOS
    writer = DatasetWriter(directory, tokenizer_json=b"{}", vocab_size=VOCAB, eos_id=EOS)
    names = pa.array(np.arange(len(ends)).astype(str))
    writer.append(stream, ends, names, pa.array(["random"] * len(ends)), np.full(len(ends), 4 * DOCUMENT))
    writer.finish(backend="random", recipe={})


def sparse_dataset(directory: Path, tokens: int) -> None:
    """A dataset whose files have the size and headers of `tokens` tokens but occupy no disk."""
    directory.mkdir()
    offsets = range(0, tokens, DEFAULT_SHARD_TOKENS)
    shards = []
    for index, offset in enumerate(offsets):
        size = min(DEFAULT_SHARD_TOKENS, tokens - offset)
        entry = ShardEntry(size, size // DOCUMENT, offset, f"{index:016x}", "0" * 16)
        shards.append(entry)
        with (directory / f"shard-{index:05d}.bin").open("wb") as file:
            file.truncate(2 * size)
        with (directory / f"shard-{index:05d}.idx").open("wb") as file:
            file.write(pack_header(entry, 2))
            file.truncate(64 + 4 * entry.documents)
    manifest = Manifest(
        format_version=FORMAT_VERSION, dtype="uint16", vocab_size=VOCAB, eos_id=EOS, bos_id=None, tokenizer_hash="0",
        shard_tokens=DEFAULT_SHARD_TOKENS, tokens=tokens, documents=sum(entry.documents for entry in shards),
        text_bytes=4 * tokens, sources={}, backend="sparse", recipe={}, fingerprint="0", shards=tuple(shards),
    )  # fmt: skip
    fingerprint = dataset_fingerprint("uint16", directory.name, shards)
    dataclasses.replace(manifest, fingerprint=fingerprint).write(directory)


if __name__ == "__main__":
    main()
