"""Tokenizing: documents in, token shards out, in input order, resumable, the same bytes for any number of workers.

The main thread cuts the input into blocks and writes; worker threads parse and encode a block each. The tokens of a
document are those of its text and then EOS (before them BOS, if asked for). At each finished shard the run makes a
checkpoint: the position in the input behind the last block written, the state of the writers, the counts so far.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from prep.documents import BLOCK_BYTES, Block, BrokenInput, Columns, Input, too_many_bad
from prep.encoder import (
    SAMPLE_DOCUMENT,
    SAMPLE_DOCUMENTS,
    Encoder,
    control_token,
    end_of_document,
)
from prep.fast import load_tokenizer, use_threads
from prep.output import REJECTED, TRAIN, VAL, Counts, Encoded, Output, Part, describe_inputs, open_output
from prep.progress import Progress
from prep.sources import check_inputs, find_inputs, read_blocks
from shards.errors import UserError
from shards.format import DEFAULT_SHARD_TOKENS, MANIFEST, Manifest, token_dtype, tokenizer_hash

IN_FLIGHT_BYTES = 64 << 20  # text that waits or is being encoded; one larger block may be on its way alone


@dataclass(frozen=True)
class Options:
    """What the output of a run depends on, beside its input.

    Attributes:
        text_column: the column with the text.
        id_column: the column with the id; None: `id` where there is one, else documents are named by file and row.
        eos: control token behind each document; None: found from the tokenizer.
        bos: control token before each document, or None.
        shard_tokens: tokens in every shard but the last.
        val_fraction: documents whose xxh3-64(id) / 2^64 is below it form the validation part.
    """

    text_column: str = "text"
    id_column: str | None = None
    eos: str | None = None
    bos: str | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    val_fraction: float = 0.0


@dataclass(frozen=True)
class Summary:
    """A finished dataset, and what this process did for it (`seconds`, `done_bytes` of text)."""

    train: Manifest
    val: Manifest | None
    counts: Counts
    seconds: float
    done_bytes: int
    up_to_date: bool


def tokenize(
    arguments: Sequence[str],
    tokenizer: Path,
    out: Path,
    options: Options = Options(),
    *,
    source: str | None = None,
    sources: Collection[str] | None = None,
    workers: int = 0,
    max_bad_rows: float = 0.001,
    keep_going: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Tokenize files into the dataset `out` (and `out/val`).

    Args:
        arguments: files, globs and folders.
        tokenizer: a tokenizer.json, or a folder that holds one.
        out: where the dataset goes; one that the same call left unfinished is finished.
        options: what the output depends on.
        source: name of the source in the dataset; None: from the file or folder.
        sources: only files of these sources; None: all.
        workers: threads that parse and encode; 0: one per core. The output does not depend on it.
        max_bad_rows: the run stops when more than this share of the rows (from 1,000 on) is bad.
        keep_going: finish the dataset although a file is broken in the middle.
        overwrite: replace what another run left in `out`.
        say: takes one-line notices.

    Raises:
        UserError: a mistake that the user can mend; what was done until then is kept and resumed.
    """
    begin = time.monotonic()
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction: {options.val_fraction} is not a share of the documents (0 or more, below 1)")
    workers = use_threads(workers)
    tokenizer_json, tokenizer_path = load_tokenizer(tokenizer)
    inputs, left_out = find_inputs(arguments, source, exclude=out)
    inputs = [item for item in inputs if sources is None or item.source in sources]
    for rest in left_out:
        say(str(rest))
    columns = Columns(options.text_column, options.id_column)
    recipe: dict[str, Any] = {"command": "tokenize", "options": vars(options)}
    run = {**recipe, "inputs": describe_inputs(inputs), "tokenizer_hash": _hash(tokenizer_json, tokenizer_path)}

    with open_output(out, run, overwrite) as state:
        if state and "finished" in state:
            return _up_to_date(out, time.monotonic() - begin)
        check_inputs(inputs, columns)
        encoder = Encoder(tokenizer_json, str(tokenizer_path), lambda: _first_texts(inputs, columns))
        if encoder.notice:
            say(encoder.notice)
        eos_id = end_of_document(encoder.special_tokens, options.eos, tokenizer_path)
        bos_id = control_token(encoder.special_tokens, options.bos, "--bos") if options.bos else None
        job = BlockEncoder(encoder, eos_id, bos_id, options.val_fraction)
        settings = {
            "tokenizer_json": tokenizer_json,
            "vocab_size": encoder.vocab_size,
            "eos_id": eos_id,
            "bos_id": bos_id,
            "shard_tokens": options.shard_tokens,
        }
        output = Output(out, state, split=options.val_fraction > 0, settings=settings)
        counts, earlier_bytes = output.counts, output.counts.text_bytes
        if state:
            say(f"going on behind {counts.documents:,} documents that are done")

        _check_bad_rows(output, max_bad_rows)
        blocks = read_blocks(inputs, columns, output.position, whole_group_bytes=2 * BLOCK_BYTES)
        total, done = (sum(item.size for item in files) for files in (inputs, inputs[: output.position.input]))
        with Progress("tokenizing", total, done) as progress, ThreadPoolExecutor(workers) as pool:
            for block, encoded in _in_order(pool, job, blocks, workers):
                broken = block.broken or encoded.broken
                output.take(encoded, block.end, broken)
                if broken:
                    say(f"broken input: {broken}")
                _check_bad_rows(output, max_bad_rows)
                progress.update(block.consumed, counts.text_bytes - earlier_bytes)

        _check_complete(output, keep_going)
        recipe["left_out"] = [{"folder": Path(rest.folder).resolve().name, "files": rest.counts()} for rest in left_out]
        recipe["inputs"] = [{"source": name, **entry} for name, entry in run["inputs"].items()]
        for entry in recipe["inputs"]:
            del entry["digest"], entry["times"]
        output.finish(encoder.backend, {**recipe, "counts": vars(counts)})
        if options.val_fraction and not (out / VAL).exists():
            say(
                f"no document fell into the validation part: raise --val-fraction ({options.val_fraction:g}) to get one"
            )
        train, val = _manifests(out)
        return Summary(
            train, val, counts, time.monotonic() - begin, counts.text_bytes - earlier_bytes, up_to_date=False
        )


class BlockEncoder:
    """Parses and encodes blocks; called from many threads.

    Args:
        encoder: text to ids.
        eos_id: put behind each document.
        bos_id: put before each document, if any.
        val_fraction: share of the documents that go to the validation part.
    """

    def __init__(self, encoder: Encoder, eos_id: int, bos_id: int | None, val_fraction: float) -> None:
        self.encoder, self.eos_id, self.bos_id = encoder, eos_id, bos_id
        self.dtype = token_dtype(encoder.vocab_size)
        self.threshold = math.ceil(val_fraction * 2**64)

    def __call__(self, block: Block) -> Encoded:
        """Parse and encode a block; one that cannot be read gives nothing but the reason."""
        try:
            documents = block.load()
        except BrokenInput as error:
            return Encoded({}, 0, 0, [], Counter(), str(error))
        ids, texts, sources = documents.batch.columns
        parts: dict[str, Part] = {}
        if len(texts):
            tokens, ends = self._tokens(texts)
            whole = Part(tokens, ends, ids, sources, _byte_lengths(texts))
            parts = self._split(whole)
        literal = self.encoder.count_specials(texts)
        return Encoded(parts, documents.rows, documents.empty, documents.rejected, literal)

    def _tokens(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all documents with EOS (and BOS) scattered among them, and where each document ends."""
        ids, offsets = self.encoder.encode(texts.to_pylist())
        extra = 1 if self.bos_id is None else 2
        ends = offsets[1:] + extra * np.arange(1, len(offsets))
        tokens = np.empty(len(ids) + extra * len(ends), self.dtype)
        ordinary = np.ones(len(tokens), bool)
        ordinary[ends - 1] = False
        tokens[ends - 1] = self.eos_id
        if self.bos_id is not None:
            starts = np.concatenate([[0], ends[:-1]])
            ordinary[starts] = False
            tokens[starts] = self.bos_id
        tokens[ordinary] = ids
        return tokens, ends

    def _split(self, whole: Part) -> dict[str, Part]:
        """Divide documents between training and validation by the hash of their ids."""
        if not self.threshold:
            return {TRAIN: whole}
        hashes = (xxhash.xxh3_64_intdigest(identity) for identity in whole.ids.cast(pa.binary()).to_pylist())
        val = np.fromiter((value < self.threshold for value in hashes), bool, len(whole.ids))
        return {name: _select(whole, chosen) for name, chosen in ((TRAIN, ~val), (VAL, val)) if chosen.any()}


def _select(part: Part, chosen: np.ndarray) -> Part:
    if chosen.all():
        return part
    lengths = np.diff(part.ends, prepend=0)
    mask = pa.array(chosen)
    return Part(
        part.tokens[np.repeat(chosen, lengths)],
        np.cumsum(lengths[chosen]),
        part.ids.filter(mask),
        part.sources.filter(mask),
        part.text_bytes[chosen],
    )


def _hash(tokenizer_json: bytes, path: Path) -> str:
    try:
        return tokenizer_hash(tokenizer_json)
    except UserError:
        raise UserError(f"{path}: not a tokenizer.json: it is no JSON") from None


def _first_texts(inputs: Sequence[Input], columns: Columns) -> list[str]:
    """What the encoder is checked on; a resumed run checks it on the same documents."""
    for block in read_blocks(inputs, columns, whole_group_bytes=2 * BLOCK_BYTES):
        try:
            texts = block.load().batch.column("text").slice(0, SAMPLE_DOCUMENTS)
        except BrokenInput:
            continue  # the run reports it
        return [text.as_py()[:SAMPLE_DOCUMENT] for text in texts]
    return []


def _byte_lengths(texts: pa.Array) -> np.ndarray:
    lengths: np.ndarray = pc.binary_length(texts).to_numpy().astype(np.int64)
    return lengths


def _in_order(
    pool: ThreadPoolExecutor, job: BlockEncoder, blocks: Iterable[Block], workers: int
) -> Iterator[tuple[Block, Encoded]]:
    """Blocks and what became of them, in input order; only so many are under way that memory stays small."""
    pending: deque[tuple[Block, Future[Encoded]]] = deque()
    size = 0

    def next_one() -> tuple[Block, Encoded]:
        nonlocal size
        block, future = pending.popleft()
        size -= block.size
        return block, future.result()

    try:
        for block in blocks:
            while pending and (len(pending) > workers or size + block.size > IN_FLIGHT_BYTES):
                yield next_one()
            pending.append((block, pool.submit(job, block)))
            size += block.size
        while pending:
            yield next_one()
    finally:
        for _, future in pending:
            future.cancel()


def _check_bad_rows(output: Output, max_bad_rows: float) -> None:
    counts = output.counts
    if too_many_bad(counts.bad, counts.rows, max_bad_rows):
        output.checkpoint()
        raise UserError(
            f"{counts.bad:,} of {counts.rows:,} rows are bad, more than --max-bad-rows {max_bad_rows:g}; rows and "
            f"reasons are in {output.out / REJECTED}. What was read is kept: run the same command with a higher limit"
        )


def _check_complete(output: Output, keep_going: bool) -> None:
    counts = output.counts
    if counts.broken and not keep_going:
        output.checkpoint()
        problems = "\n  ".join(counts.broken)
        raise UserError(
            f"the rest of {len(counts.broken)} file(s) cannot be read:\n  {problems}\n"
            f"{counts.documents:,} documents are tokenized and kept, but the dataset is not finished. To finish it "
            f"without the rest, run the same command with --keep-going; or mend the file and run it with --overwrite"
        )
    if not counts.documents:
        output.checkpoint()
        where = f" (see {output.out / REJECTED})" if counts.bad else ""
        raise UserError(
            f"no document in the input: {counts.rows:,} rows, {counts.empty:,} of them empty, {counts.bad:,} bad{where}"
        )


def _manifests(out: Path) -> tuple[Manifest, Manifest | None]:
    return Manifest.read(out), Manifest.read(out / VAL) if (out / VAL / MANIFEST).exists() else None


def _up_to_date(out: Path, seconds: float) -> Summary:
    train, val = _manifests(out)
    return Summary(train, val, Counts(**train.recipe["counts"]), seconds, 0, up_to_date=True)
