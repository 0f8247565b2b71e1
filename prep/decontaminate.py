"""Decontamination: documents that hold a piece of an evaluation's items are removed, or the piece is cut out.

Words are the `\\w+` of the lower-cased text: punctuation, case and line breaks do not hide an item. A document is hit
when it shares `ngram` consecutive words with an item (13: GPT-3, arXiv 2005.14165, appendix C), or all words of an item
that is shorter than that. Items below `min_words` would hit by chance; they are skipped and counted.

NVIDIA's NeMo Curator differs in that it forgets n-grams that occur more than ten times in the training data. Here every
n-gram counts, so an instruction that stands in front of all items hits whatever has it too: leave it out of the items.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from prep.evaluation_items import Benchmark, read_benchmarks
from prep.ngrams import Index, Match, build_index
from prep.stages import NOTHING_ADDED, Tally, replace_text
from shards.errors import UserError
from shards.settings import Settings, validate

VERSION = 1  # raise it when the same settings find other matches than before
WORD_SLACK = 40  # characters that a cut moves outwards at most, so as not to cut through a word
EXCERPT = 200  # characters of the matched text in `detail`
MIN_WORDS = 5  # none of 1,246 instructions of this length hits 10,000 book documents; of 4 words, one does


class DecontaminateSettings(Settings):
    """Options of the stage.

    Attributes:
        against: files with evaluation items, `FILE[:column[,column]]`; by default every text column, each value of each
            row is one item. `${VAR}` is expanded.
        ngram: consecutive words that make a match.
        min_words: items with fewer words are skipped; default 5, or `ngram` if that is less. GPT-3 and NeMo Curator go
            down to 8: take that where columns with answers to choose from ("all of the above are correct") count.
        action: remove the document, or cut the matches out of it.
        margin: characters that a cut takes on both sides of a match (200: GPT-3, NeMo Curator).
        min_characters: what a cut leaves must have as many, or the document goes (200: the same).
    """

    against: list[str] = Field(min_length=1)
    ngram: int = Field(default=13, ge=2, le=255)
    min_words: int | None = Field(default=None, ge=1)
    action: Literal["remove", "cut"] = "remove"
    margin: int = Field(default=200, ge=0)
    min_characters: int = Field(default=200, ge=0)


class _Items(NamedTuple):
    """What the stage works with: `benchmark` and `number` tell whose item an item of `grams` is, and which of its."""

    benchmarks: list[Benchmark]
    grams: Index
    benchmark: np.ndarray
    number: np.ndarray


@dataclass(frozen=True)
class DecontaminateStage:
    """Removes documents that hold items of evaluations, or cuts the place out; made by `build`.

    The rule is `decontaminate.BENCHMARK`, of the benchmark with the item that shares most n-grams in a row with the
    document; `value` is their number, `detail` the item's row and column and the matched text. For each benchmark the
    tally holds the set `items.BENCHMARK` and the counts `documents.BENCHMARK` and `bytes.BENCHMARK`, of what was
    removed; a document may count for several.
    """

    settings: DecontaminateSettings
    where: str
    digest: str
    name: str = "decontaminate"
    adds: pa.Schema = NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """All that the output depends on; the files of the items by a hash of what they hold."""
        unused = set() if self.settings.action == "cut" else {"margin", "min_characters"}
        options = self.settings.model_dump(exclude={"against", *unused})
        return {"version": VERSION, "items": self.digest, **options, "min_words": self._min_words}

    def report(self, tally: Tally) -> list[dict[str, Any]]:
        """For each benchmark: items, those too short to look for, items found, documents hit and bytes removed."""
        items = self._items()
        short = np.bincount(items.benchmark[items.grams.short], minlength=len(items.benchmarks)).tolist()
        return [
            {
                "benchmark": benchmark.name,
                "items": len(benchmark.texts) - skipped,
                "skipped": skipped,
                "items_found": len(tally.sets.get(f"items.{benchmark.name}", ())),
                "documents": tally.counts.get(f"documents.{benchmark.name}", 0),
                "bytes": tally.counts.get(f"bytes.{benchmark.name}", 0),
            }
            for benchmark, skipped in zip(items.benchmarks, short, strict=True)
        ]

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents without items of the benchmarks."""
        items = self._items()
        texts = batch.column("text")
        found = items.grams.search(texts)
        if not found:
            return batch
        originals = {document: texts[document].as_py().encode() for document in found}
        left = self._cut(items.grams, originals, found) if self.settings.action == "cut" else {}
        gone: dict[int, list[int]] = {}
        values = np.zeros(batch.num_rows)
        details: list[str | None] = [None] * batch.num_rows
        for document, matches in found.items():
            by_benchmark: dict[int, list[Match]] = {}
            for match in matches:
                by_benchmark.setdefault(int(items.benchmark[match.item]), []).append(match)
            removed = len(originals[document]) - len(left.get(document, b""))
            for number, mine in by_benchmark.items():
                name = items.benchmarks[number].name
                tally.sets.setdefault(f"items.{name}", set()).update(int(items.number[match.item]) for match in mine)
                tally.count(f"documents.{name}", 1)
                tally.count(f"bytes.{name}", removed)
            if document not in left:
                longest = min(matches, key=lambda match: (-match.grams, match.item))
                gone.setdefault(int(items.benchmark[longest.item]), []).append(document)
                values[document] = longest.grams
                details[document] = _detail(items, longest, originals[document])
        tally.count("cut", len(left))
        keep = np.ones(batch.num_rows, bool)
        for number, documents in sorted(gone.items()):
            chosen = np.zeros(batch.num_rows, bool)
            chosen[documents] = True
            rule = f"{self.name}.{items.benchmarks[number].name}"
            tally.reject(batch, chosen, rule, value=values, threshold=1.0, detail=details)
            keep &= ~chosen
        if left:
            changed = texts.to_pylist()
            for document, text in left.items():
                changed[document] = text.decode()
            batch = replace_text(batch, pa.array(changed, texts.type))
        return batch.filter(pa.array(keep))

    def _cut(self, index: Index, originals: dict[int, bytes], found: dict[int, list[Match]]) -> dict[int, bytes]:
        """What cutting leaves of the documents that have enough left."""
        texts = dict(originals)
        while found:  # more than once where the pieces, joined, make a new match
            for document, matches in found.items():
                spans = [(match.start, match.stop) for match in matches]
                texts[document] = cut_spans(texts[document], spans, self.settings.margin)
            numbers = list(found)
            again = index.search(pa.array([texts[number].decode() for number in numbers], pa.large_string()))
            found = {numbers[row]: matches for row, matches in again.items()}
        least = max(1, self.settings.min_characters)
        return {document: text for document, text in texts.items() if len(text.decode()) >= least}

    @property
    def _min_words(self) -> int:
        return min(MIN_WORDS, self.settings.ngram) if self.settings.min_words is None else self.settings.min_words

    def _items(self) -> _Items:
        return _load(tuple(self.settings.against), self.settings.ngram, self._min_words, self.digest, self.where)


def build(settings: dict[str, Any], where: str) -> DecontaminateStage:
    """The stage for the settings of a recipe or a command; reads the items.

    Raises:
        UserError: an unknown option, a file that is missing or holds no text, no item that is long enough.
    """
    checked = validate(DecontaminateSettings, settings, where)
    if checked.min_words is not None and checked.min_words > checked.ngram:
        raise UserError(f"{where}: min_words ({checked.min_words}) is more than ngram ({checked.ngram}); lower it")
    stage = DecontaminateStage(checked, where, _digest(read_benchmarks(checked.against, where)))
    items = stage._items()
    for number, benchmark in enumerate(items.benchmarks):
        if items.grams.short[items.benchmark == number].all():
            raise UserError(
                f"{where}: {benchmark.path}: none of its {len(benchmark.texts):,} items has enough words; "
                "lower min_words, or name the columns that hold the items (FILE:column)"
            )
    return stage


@lru_cache(maxsize=4)
def _load(against: tuple[str, ...], ngram: int, min_words: int, digest: str, where: str) -> _Items:
    """The items and their index, once in each process."""
    benchmarks = read_benchmarks(against, where)
    if _digest(benchmarks) != digest:
        raise UserError(f"{where}: the files with the items have changed since the run began; start it again")
    sizes = [len(benchmark.texts) for benchmark in benchmarks]
    index = build_index([text for benchmark in benchmarks for text in benchmark.texts], ngram, min_words)
    return _Items(benchmarks, index, np.repeat(np.arange(len(sizes)), sizes), np.concatenate([*map(np.arange, sizes)]))


def _digest(benchmarks: list[Benchmark]) -> str:
    digest = xxhash.xxh3_128()
    for benchmark in benchmarks:
        for text in (benchmark.name, *benchmark.texts):
            digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def _detail(items: _Items, match: Match, raw: bytes) -> str:
    text = " ".join(raw[match.start : match.stop].decode().split())
    row, column = items.benchmarks[items.benchmark[match.item]].places[items.number[match.item]]
    return f"row {row:,}, {column}: {text if len(text) <= EXCERPT else text[:EXCERPT] + ' …'}"


def cut_spans(raw: bytes, spans: list[tuple[int, int]], margin: int) -> bytes:
    """The text without the given bytes and `margin` characters on both sides; what is left is joined by blank lines.

    A cut moves outwards to the next white space, if that is not far: half a word is no word.
    """
    pieces, behind = [], 0
    reach = margin + WORD_SLACK
    for start, stop in sorted(set(spans)):
        before = raw[max(0, start - 4 * reach) : start].decode("utf-8", "ignore")[-reach:]
        after = raw[stop : stop + 4 * reach].decode("utf-8", "ignore")[:reach]
        kept = before[: max(0, len(before) - margin)]
        space = re.search(r"\s\S*$", kept)
        kept = kept[: space.start()] if space else "" if len(before) < reach else kept
        first = start - len(before[len(kept) :].encode())
        rest = after[margin:]
        space = re.search(r"\s", rest)
        rest = rest[space.start() :] if space else "" if len(after) < reach else rest
        last = stop + len(after[: len(after) - len(rest)].encode())
        if first > behind:
            pieces.append(raw[behind:first])
        behind = max(behind, last)
    pieces.append(raw[behind:])
    return b"\n\n".join(piece for piece in (piece.strip() for piece in pieces) if piece)
