"""Training a byte-level BPE tokenizer on a sample of the input.

The sample is the documents with the smallest xxh3-64 of their ids, as many as fit into the bytes allowed, so it depends
neither on the order of the input nor on chance. Documents whose hash is divisible by 100 are held out to measure bytes
per token.

Text is cut before merging as in the GPT-4 family: letters with at most one sign before them, numbers in groups of up to
three digits, signs with the line breaks behind them, white space. All 256 bytes are in the vocabulary, so any text can
be encoded.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from prep.documents import BLOCK_BYTES, BrokenInput, Columns, Rejected, too_many_bad
from prep.encoder import Encoder
from prep.progress import Progress
from prep.sources import check_inputs, find_inputs, read_blocks
from shards.errors import UserError
from shards.files import write_atomic

DEFAULT_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_SHARE = 100
HELD_OUT_BYTES = 4_000_000
SHOWN_REJECTED = 3


@dataclass(frozen=True)
class Training:
    """What came out: the tokenizer's size, what it saw, and how well it packs text."""

    vocab_size: int
    special_tokens: tuple[str, ...]
    documents: int
    sample_bytes: int
    bytes_per_token: float
    measured_on: str
    rows: int
    bad: int
    broken: tuple[str, ...]
    seconds: float


class SmallestHashes:
    """Keeps the documents with the smallest hashes that fit into `limit` bytes of text, whatever their order."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._heap: list[tuple[int, bytes]] = []  # the largest hash first

    def add(self, value: int, text: bytes) -> None:
        """Offer a document."""
        if self._heap and self.size >= self.limit and value >= -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-value, text))
        self.size += len(text)
        while self.size - len(self._heap[0][1]) >= self.limit:
            self.size -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> list[str]:
        """The texts in the order of their hashes; the last is cut, so that they fit into the limit."""
        texts = [text for _, text in sorted(self._heap, reverse=True)]
        if self.size > self.limit:
            texts[-1] = texts[-1][: len(texts[-1]) - (self.size - self.limit)]
        return [text.decode("utf-8", "ignore") for text in texts]


def train_tokenizer(
    arguments: Sequence[str],
    out: Path,
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = DEFAULT_SPECIAL_TOKENS,
    sample_bytes: int = 100_000_000,
    text_column: str = "text",
    id_column: str | None = None,
    max_bad_rows: float = 0.001,
    keep_going: bool = False,
    say: Callable[[str], None] = print,
) -> Training:
    """Train a tokenizer and write it to `out`.

    Args:
        arguments: files, globs and folders.
        out: the tokenizer.json to write.
        vocab_size: entries, the control tokens and the 256 bytes among them.
        special_tokens: control tokens; they get the ids from 0 on.
        sample_bytes: UTF-8 bytes of text that are used for training.
        text_column: the column with the text.
        id_column: the column with the id.
        max_bad_rows: largest share of bad rows, looked at from 1,000 rows on.
        keep_going: train although a file is broken in the middle.
        say: takes one-line notices.

    Raises:
        UserError: no text in the input, too little text for the vocabulary, a vocabulary too small for the bytes, too
            many bad rows, or a broken file.
    """
    begin = time.monotonic()
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size: {vocab_size} is too small; 256 bytes and the control tokens take {smallest}")
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise UserError("--special-token: each must be given once, and not be empty")
    inputs, left_out = find_inputs(arguments)
    for rest in left_out:
        say(str(rest))
    columns = Columns(text_column, id_column)
    check_inputs(inputs, columns)
    sample, held_out = SmallestHashes(sample_bytes), SmallestHashes(HELD_OUT_BYTES)
    broken: list[str] = []
    rejected: list[Rejected] = []
    rows = bad = read = 0
    with Progress("reading", sum(item.size for item in inputs)) as progress:
        for block in read_blocks(inputs, columns, whole_group_bytes=2 * BLOCK_BYTES):
            try:
                documents = block.load()
            except BrokenInput as error:
                broken.append(str(error))
                _check_input(rows, bad, rejected, broken, max_bad_rows, keep_going)
                continue
            rows, bad = rows + documents.rows, bad + len(documents.rejected)
            rejected += documents.rejected[: SHOWN_REJECTED - len(rejected)]
            broken += [block.broken] if block.broken else []
            _check_input(rows, bad, rejected, broken, max_bad_rows, keep_going)
            batch = documents.batch
            ids, texts_read = (batch.column(name).cast(pa.binary()).to_pylist() for name in ("id", "text"))
            for identity, text in zip(ids, texts_read, strict=True):
                value = xxhash.xxh3_64_intdigest(identity)
                (sample if value % HELD_OUT_SHARE else held_out).add(value, text)
            read += block.size
            progress.update(block.consumed, read)
    if bad:
        say(f"{bad:,} of {rows:,} rows are bad; {_list_rejected(rejected)}")
    texts, measured, measured_on = sample.texts(), held_out.texts(), "held-out documents"
    if not texts or not measured:  # a handful of documents: nothing to hold out
        texts, measured_on = [*texts, *measured], "the text it was trained on (too few documents to hold any out)"
        measured = texts
    if not any(texts):
        raise UserError(f"{' '.join(arguments)}: no text to train on")
    content = _train(texts, vocab_size, special_tokens)
    encoder = Encoder(content, str(out), lambda: measured)
    if encoder.vocab_size < vocab_size:
        raise UserError(
            f"--vocab-size: the text gives only {encoder.vocab_size:,} entries, not {vocab_size:,}; "
            f"give more text or ask for a smaller vocabulary"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content)
    bytes_per_token = sum(len(text.encode()) for text in measured) / len(encoder.encode(measured)[0])
    size = sum(len(text.encode()) for text in texts)
    seconds = time.monotonic() - begin
    return Training(
        encoder.vocab_size,
        tuple(special_tokens),
        len(texts),
        size,
        bytes_per_token,
        measured_on,
        rows,
        bad,
        tuple(broken),
        seconds,
    )


def _check_input(
    rows: int, bad: int, rejected: Sequence[Rejected], broken: Sequence[str], max_bad_rows: float, keep_going: bool
) -> None:
    """The rules of tokenize; nothing is kept of a run that stops, so it stops at once."""
    if broken and not keep_going:
        raise UserError(
            f"the rest of a file cannot be read: {broken[0]}. Mend the file, "
            f"or train without its rest with --keep-going"
        )
    if too_many_bad(bad, rows, max_bad_rows):
        raise UserError(
            f"{bad:,} of {rows:,} rows are bad, more than --max-bad-rows {max_bad_rows:g}; {_list_rejected(rejected)}"
        )


def _list_rejected(rejected: Sequence[Rejected]) -> str:
    """The first bad rows in a line."""
    return "the first: " + ", ".join(f"{row.file}:{row.row} ({row.reason})" for row in rejected)


def _train(texts: list[str], vocab_size: int, special_tokens: Sequence[str]) -> bytes:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()
