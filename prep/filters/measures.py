"""Statistics of documents as columns: what rules are bounds on.

A statistic has a name, a version (its definition never changes under the same one) and a group; a group is computed by
one or a few kernel passes over the batch, and only the groups of the wanted names are. All lengths are in code points.
A share of nothing is 0. The definitions stand in docs/FILTERS.md, and as plain Python in tests/filter_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from prep.filters import code_text, measures_lines, measures_repetition, measures_tokens
from prep.words import Hash, Words, split_words, text_buffers
from shards.errors import UserError, unknown_name

Values = dict[str, np.ndarray]  # of statistics or rules, by name: float64 or int64 [documents] each
HASHES: tuple[Hash, ...] = ("hash",)  # of words, for all groups but `chunks`


class Statistic(NamedTuple):
    """What can be measured: the group that computes it, the unit of its values, the version of its definition."""

    group: str
    unit: Literal["share", "count"]
    version: int = 1


class Texts:
    """A column of texts, and what several groups need of it, computed once; `hashes` are those of its words."""

    def __init__(self, texts: pa.Array, hashes: Collection[Hash] = HASHES) -> None:
        self.texts, self.hashes = texts, hashes
        self.data, self.offsets = text_buffers(texts)

    @cached_property
    def words(self) -> Words:
        """All tokens."""
        return split_words(self.texts, self.hashes)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Number of tokens of each document."""
        if "words" in self.__dict__:
            return np.diff(self.words.offsets)
        return measures_lines.count_tokens(self.data, self.offsets)

    @cached_property
    def characters(self) -> np.ndarray:
        """Code points of each document."""
        return measures_lines.characters(self.data, self.offsets)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where the whole is."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole != 0)


def _length(texts: Texts) -> Values:
    return {"characters": texts.characters, "bytes": np.diff(texts.offsets), "tokens": texts.tokens}


def _tokens(texts: Texts) -> Values:
    found = measures_tokens.token_counts(texts.data, texts.words)
    return {
        "words": found["words"],
        "mean_word_length": share(found["word_characters"], found["words"]),
        "hashes_per_token": share(found["hashes"], found["tokens"]),
        "ellipses_per_token": share(found["dots"], found["tokens"]),
        "alphabetic_tokens": share(found["alphabetic"], found["joined"]),
        "different_stop_words": found["stop_words"],
    }


def _chunks(texts: Texts) -> Values:
    found = measures_tokens.chunk_counts(texts.data, texts.words)
    return {
        "mean_chunk_length": share(found["characters"], found["chunks"]),
        "symbols_per_chunk": share(found["symbols"], found["chunks"]),
        "alphabetic_chunks": share(found["alphabetic"], found["chunks"]),
        "stop_words": found["stop_words"],
    }


def _line_edges(texts: Texts) -> Values:
    found = measures_lines.edges(texts.data, texts.offsets, splitlines=True)
    return {
        "bullet_lines": share(found["bullets"], found["lines"]),
        "ellipsis_lines": share(found["ellipses"], found["lines"]),
    }


def _filled_line_edges(texts: Texts) -> Values:
    found = measures_lines.edges(texts.data, texts.offsets, splitlines=False)
    return {
        "bullet_filled_lines": share(found["bullets"], found["lines"]),
        "ellipsis_filled_lines": share(found["ellipses"], found["lines"]),
    }


def _copies(texts: Texts) -> Values:
    found = {}
    for name, newlines in (("line", 1), ("paragraph", 2)):
        counts = measures_lines.copies(texts.data, texts.offsets, newlines=newlines, stripped=False)
        found[f"duplicate_{name}s"] = share(counts["copies"], counts["pieces"])
        found[f"duplicate_{name}_characters"] = share(counts["copied_characters"], texts.characters)
    return found


def _all_copies(texts: Texts) -> Values:
    found = {}
    for name, newlines in (("line", 1), ("paragraph", 2)):
        counts = measures_lines.copies(texts.data, texts.offsets, newlines=newlines, stripped=True)
        found[f"repeated_{name}s"] = share(counts["copies"], counts["pieces"])
        found[f"repeated_{name}_characters"] = share(counts["copied_characters"], counts["characters"])
    return found


def _ngrams(texts: Texts) -> Values:
    words = texts.words
    assert words.hash is not None
    tops, duplicates = measures_repetition.repeated_ngrams(
        words.offsets, words.hash, words.characters, texts.characters.astype(np.float64), overlapping=False
    )
    return _named("top_{}gram", "duplicate_{}gram", tops, duplicates)


def _word_ngrams(texts: Texts) -> Values:
    offsets, hashes, lengths = measures_tokens.only_words(texts.words)
    totals = np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[offsets]).astype(np.float64)
    tops, duplicates = measures_repetition.repeated_ngrams(offsets, hashes, lengths, totals, overlapping=True)
    return _named("top_word_{}gram", "repeated_word_{}gram", tops, duplicates)


def _named(top: str, duplicate: str, tops: np.ndarray, duplicates: np.ndarray) -> Values:
    names = [top.format(n) for n in measures_repetition.TOP] + [
        duplicate.format(n) for n in measures_repetition.DUPLICATE
    ]
    return dict(zip(names, [*tops, *duplicates], strict=True))


def _plain_lines(texts: Texts) -> Values:
    found = measures_lines.plain_lines(texts.data, texts.offsets)
    return {
        "terminal_lines": share(found["terminal"], found["lines"]),
        "short_lines": share(found["short"], found["lines"]),
        "copied_line_characters": share(found["copied_characters"], texts.characters - found["newlines"]),
        "newlines_per_token": share(found["newlines"], texts.tokens),
    }


def _line_lengths(texts: Texts) -> Values:
    found = measures_lines.line_lengths(texts.data, texts.offsets)
    return {
        "lines": found["lines"],
        "mean_line_length": share(found["characters"], found["lines"]),
        "longest_line": found["longest"],
    }


def _kinds(texts: Texts) -> Values:
    found = measures_lines.character_kinds(texts.data, texts.offsets)
    names = {"letters": "letter", "alphanumeric": "alphanumeric", "upper": "upper_case", "numbers": "number"}
    shares = {f"{name}_share": share(found[key], texts.characters) for key, name in names.items()}
    return {**shares, "space_share": share(found["spaces"], texts.characters)}


def _generated(texts: Texts) -> Values:
    return {"generated_markers": code_text.generated_markers(texts.data, texts.offsets)}


GROUPS: dict[str, Callable[[Texts], Values]] = {
    "length": _length,
    "tokens": _tokens,
    "chunks": _chunks,
    "line_edges": _line_edges,
    "filled_line_edges": _filled_line_edges,
    "copies": _copies,
    "all_copies": _all_copies,
    "ngrams": _ngrams,
    "word_ngrams": _word_ngrams,
    "plain_lines": _plain_lines,
    "line_lengths": _line_lengths,
    "kinds": _kinds,
    "generated": _generated,
}
_COUNTS = {
    "length": ("characters", "bytes", "tokens"),
    "tokens": ("words", "mean_word_length", "different_stop_words"),
    "chunks": ("mean_chunk_length", "stop_words"),
    "line_lengths": ("lines", "mean_line_length", "longest_line"),
    "generated": ("generated_markers",),
}
_SHARES = {
    "tokens": ("hashes_per_token", "ellipses_per_token", "alphabetic_tokens"),
    "chunks": ("symbols_per_chunk", "alphabetic_chunks"),
    "line_edges": ("bullet_lines", "ellipsis_lines"),
    "filled_line_edges": ("bullet_filled_lines", "ellipsis_filled_lines"),
    "copies": (
        "duplicate_lines",
        "duplicate_line_characters",
        "duplicate_paragraphs",
        "duplicate_paragraph_characters",
    ),
    "all_copies": (
        "repeated_lines",
        "repeated_line_characters",
        "repeated_paragraphs",
        "repeated_paragraph_characters",
    ),
    "ngrams": (*(f"top_{n}gram" for n in range(2, 5)), *(f"duplicate_{n}gram" for n in range(5, 11))),
    "word_ngrams": (*(f"top_word_{n}gram" for n in range(2, 5)), *(f"repeated_word_{n}gram" for n in range(5, 11))),
    "plain_lines": ("terminal_lines", "short_lines", "copied_line_characters", "newlines_per_token"),
    "kinds": ("letter_share", "alphanumeric_share", "upper_case_share", "number_share", "space_share"),
}
STATISTICS: dict[str, Statistic] = {
    **{name: Statistic(group, "count") for group, names in _COUNTS.items() for name in names},
    **{name: Statistic(group, "share") for group, names in _SHARES.items() for name in names},
}


def statistics(texts: pa.Array | pa.RecordBatch, names: Iterable[str]) -> Values:
    """Measure texts.

    Args:
        texts: a column of texts, or a batch of documents.
        names: which statistics, of `STATISTICS`.

    Returns:
        name -> float64 [documents].

    Raises:
        UserError: a name is not known.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in STATISTICS:
            raise UserError(unknown_name("statistic", name, STATISTICS))
    groups = {STATISTICS[name].group for name in wanted}
    hashes = (*HASHES, "lower") if "chunks" in groups else HASHES
    column = Texts(texts.column("text") if isinstance(texts, pa.RecordBatch) else texts, hashes)
    if groups & {"tokens", "chunks", "ngrams", "word_ngrams"}:
        _ = column.words  # first, so that the other groups use them
    found: Values = {}
    for group in GROUPS:  # in this order
        if group in groups:
            found.update(GROUPS[group](column))
    return {name: found[name].astype(np.float64, copy=False) for name in wanted}
