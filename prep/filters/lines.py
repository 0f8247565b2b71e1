"""Cleaning of lines: C4's and DCLM's rules on single lines, and the removal of licence headers.

A cleaner writes the texts anew into one buffer and counts, per document, what its document rules need. It is told which
of its line rules are on, and their bounds; rules are in `prep.filters.presets`, definitions in docs/FILTERS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import classes
from prep.filters import c4_lines, code_text, dclm_lines
from prep.filters.measures_lines import count_words
from prep.filters.spans import breaks, terminal
from prep.words import text_buffers

Bounds = tuple[float, float]  # -inf and inf where there is none
Active = Mapping[str, Bounds]  # line rules that are on, by the last part of their name


class Cleaned(NamedTuple):
    """What a cleaner gives.

    Attributes:
        texts: the cleaned column, of the same type; a text may be empty.
        statistics: name -> float64 [documents].
        counts: name -> total over the batch, for the report.
    """

    texts: pa.Array
    statistics: dict[str, np.ndarray]
    counts: dict[str, int]


def clean_c4(texts: pa.Array, active: Active, end_marks: str = ".?!\"'", count_after: bool = False) -> Cleaned:
    """C4's cleaning.

    Args:
        texts: string or large_string.
        active: line rules `citations`, `line_word_length` (high), `line_end`, `line_words` (low), `line_javascript`,
            `line_policy`.
        end_marks: ASCII characters that may end a line.
        count_after: count the words of a line when its citations are gone, as the reference code does.

    Returns:
        Statistics `lorem_ipsum` and `curly_brackets` (lines that hold one), `sentences`.
    """
    data, offsets = text_buffers(texts)
    marks = np.zeros(256, np.uint8)
    marks[list(end_marks.encode("ascii"))] = 1
    longest, fewest = active.get("line_word_length", (0, np.inf))[1], active.get("line_words", (0, 0))[0]
    limits = np.array([min(longest, 2.0**62), np.ceil(max(fewest, 0))]).astype(np.int64)
    switches = np.array(
        [name in active for name in ("citations", "line_end", "line_javascript", "line_policy")] + [count_after]
    )
    out, ends = np.empty(len(data) + 1, np.uint8), np.zeros(len(offsets), np.int64)
    found = np.zeros((len(c4_lines.COUNTS), len(offsets) - 1), np.int64)
    tables = (classes(), breaks(), terminal(), c4_lines.scan_table(), marks, c4_lines.ABBREVIATIONS)
    c4_lines.clean(data, offsets, limits, switches, *tables, c4_lines.PHRASES, out, ends, found)
    columns = dict(zip(c4_lines.COUNTS, found, strict=True))
    statistics = {name: columns[name].astype(np.float64) for name in ("lorem_ipsum", "curly_brackets", "sentences")}
    counts = {name: int(columns[name].sum()) for name in c4_lines.COUNTS if name not in statistics}
    return Cleaned(make_texts(out, ends, texts.type), statistics, counts)


def clean_c4_reference(texts: pa.Array, active: Active) -> Cleaned:
    """C4's cleaning as its reference code does it: no `'` at the end of a line, citations are no words."""
    return clean_c4(texts, active, end_marks='.?!"', count_after=True)


def clean_dclm(texts: pa.Array, active: Active) -> Cleaned:
    """DCLM's cleaning of lines (RefinedWeb's, G.2).

    Args:
        texts: string or large_string.
        active: `newlines` (high), `upper_case` (high), `numbers` (high), `counters`, `words` (low), `cart`,
            `read_more`, `sign_in` (high: words in the line).

    Returns:
        Statistic `words_removed`: the share of the words that went.
    """
    data, offsets = text_buffers(texts)
    limits = np.array(
        [
            active.get("newlines", (0, np.inf))[1],
            active.get("upper_case", (0, np.inf))[1],
            active.get("numbers", (0, np.inf))[1],
            active.get("words", (0, 0))[0],
            *(active.get(name, (0, -1))[1] for name in ("cart", "read_more", "sign_in")),
        ],
        dtype=np.float64,
    )
    out, ends = np.empty(len(data) + 1, np.uint8), np.zeros(len(offsets), np.int64)
    found = np.zeros((len(dclm_lines.COUNTS), len(offsets) - 1), np.int64)
    dclm_lines.clean(data, offsets, limits, "counters" in active, classes(), *dclm_lines.NOUNS, out, ends, found)
    before, after = count_words(data, offsets), count_words(out, ends)
    removed = np.divide(before - after, before, out=np.zeros(len(before)), where=before > 0)
    counts = {name: int(column.sum()) for name, column in zip(dclm_lines.COUNTS, found, strict=True)}
    return Cleaned(make_texts(out, ends, texts.type), {"words_removed": removed}, counts)


def remove_licences(texts: pa.Array, active: Active) -> Cleaned:
    """Cut off licence headers (line rule `licence`); counts them and their bytes."""
    data, offsets = text_buffers(texts)
    if "licence" not in active:
        return Cleaned(texts, {}, {})
    start, stop = code_text.licence_headers(data, offsets)
    out, ends = np.empty(len(data) + 1, np.uint8), np.zeros(len(offsets), np.int64)
    _cut(data, offsets, start, stop, out, ends)
    counts = {"licence_headers": int((stop > start).sum()), "licence_bytes": int((stop - start).sum())}
    return Cleaned(make_texts(out, ends, texts.type), {}, counts)


CLEANERS: dict[str, Callable[[pa.Array, Active], Cleaned]] = {
    "c4": clean_c4,
    "c4_reference": clean_c4_reference,
    "dclm_lines": clean_dclm,
    "licence": remove_licences,
}


def make_texts(data: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column over UTF-8 data and its borders, without a copy of the data."""
    size = np.int64 if pa.types.is_large_string(kind) else np.int32
    buffers = [None, pa.py_buffer(offsets.astype(size)), pa.py_buffer(data)]
    return pa.Array.from_buffers(kind, len(offsets) - 1, buffers)


@njit(nogil=True, cache=True)
def _cut(data, offsets, start, stop, out, ends):
    """Copy all documents without their spans [start, stop)."""
    at = 0
    for document in range(len(start)):
        for a, b in ((offsets[document], start[document]), (stop[document], offsets[document + 1])):
            out[at : at + b - a] = data[a:b]
            at += b - a
        ends[document + 1] = at
