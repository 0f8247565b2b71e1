"""Small inputs for the tests of prep."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prep.documents import START, BrokenInput, Columns, Documents, Position
from prep.sources import find_inputs, read_blocks
from prep.train_tokenizer import _train

TEXT = Columns()
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "he",
    "it",
    "with",
    "is",
    "for",
    "you",
    "not",
    "her",
    "on",
]


def prose(seed: int, words: int) -> str:
    """Some words, deterministic."""
    rng = random.Random(seed)
    return " ".join(
        rng.choice(WORDS) + rng.choice(["", "", "s", ",", ".\n", "'s", " 1234", " é"]) for _ in range(words)
    )


def small_tokenizer(special_tokens: Sequence[str] = ("<|endoftext|>",), vocab_size: int = 330) -> bytes:
    """A byte-level BPE tokenizer."""
    return _train([prose(seed, 400) for seed in range(20)], vocab_size, special_tokens)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """JSON Lines; what is already bytes goes in as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read_all(
    arguments: Sequence[str | Path], columns: Columns = TEXT, start: Position = START
) -> tuple[list[tuple[str, str, str]], list[Documents], list[str]]:
    """All documents (id, text, source), the blocks they came in, and what was broken."""
    blocks = list(read_blocks(find_inputs([str(argument) for argument in arguments]).inputs, columns, start))
    loaded, broken = [], [block.broken for block in blocks if block.broken]
    for block in blocks:
        try:
            loaded.append(block.load())
        except BrokenInput as error:
            broken.append(str(error))
    rows = [tuple(row.values()) for documents in loaded for row in documents.batch.to_pylist()]
    return rows, loaded, broken
