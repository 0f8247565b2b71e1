"""Repeated paragraphs or lines of a corpus: the first occurrence stays, later ones are cut out of their documents.

A *line* ends at "\\n"; a *paragraph* is a run of lines that are not blank. A unit (one or the other) is known by a
64-bit hash of its normalised text: lower-cased, runs of white space as one space, none at the ends. Units of fewer than
`min_characters` normalised characters are never cut. First is what comes first in input order, also inside of one
document. That is decided from the hashes alone, before anything is cut: a unit of a document that is then dropped still
counts as the first of its kind, so its copies elsewhere are cut as well.

A cut takes the unit and the white space behind it; behind the last unit that is left, nothing is left over. A document
that loses more than `max_cut` of the characters of its units, or all of them, is dropped.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import SPACE, classes, lower
from prep.words import FNV_PRIME, FNV_START, MIX_1, MIX_2, decode, mix, text_buffers

Level = Literal["paragraph", "line"]
MIN_CHARACTERS = 40  # shorter ones are headings, list items, dialogue: natural repetition
MAX_CUT = 0.5
_SPACE, _BLANK = np.uint8(SPACE), np.uint64(0x20)
_START, _PRIME = np.uint64(FNV_START), np.uint64(FNV_PRIME)
_MIX_1, _MIX_2, _SHIFT = np.uint64(MIX_1), np.uint64(MIX_2), np.uint64(33)


class Units(NamedTuple):
    """The units of a batch, flat.

    Attributes:
        offsets: int64 [documents + 1]; the units of document d are offsets[d]:offsets[d + 1] of the other arrays.
        begin: int64 [n]; first byte of the line in which it begins, in the text data of the batch.
        stop: int64 [n]; the byte behind its last letter.
        characters: int64 [n]; code points of its normalised text.
        hash: uint64 [n]; of its normalised text, never 0.
    """

    offsets: np.ndarray
    begin: np.ndarray
    stop: np.ndarray
    characters: np.ndarray
    hash: np.ndarray


class Cut(NamedTuple):
    """What is left of a batch of n documents.

    Attributes:
        texts: string [n]; empty where nothing is left.
        share: float64 [n]; cut characters by all characters of the units.
        units: int64 [n]; how many were cut.
    """

    texts: pa.Array
    share: np.ndarray
    units: np.ndarray


def split_units(texts: pa.Array, level: Level) -> Units:
    """Split documents (string or large_string, no nulls) into paragraphs or lines; blank ones are none."""
    data, offsets = text_buffers(texts)
    ends = np.zeros(len(offsets), np.int64)
    capacity = int(np.count_nonzero(data == 0x0A)) + len(texts)
    begin, stop, characters = (np.empty(capacity, np.int64) for _ in range(3))
    hashes = np.empty(capacity, np.uint64)
    n = _split(data, offsets, classes(), lower(), level == "paragraph", ends, begin, stop, characters, hashes)
    return Units(ends, begin[:n], stop[:n], characters[:n], hashes[:n])


def unit_hashes(texts: pa.Array, level: Level, min_characters: int = MIN_CHARACTERS) -> np.ndarray:
    """Hashes of the units that are long enough, in order; uint64 [n]."""
    units = split_units(texts, level)
    return units.hash[units.characters >= min_characters]


def find_repeats(hashes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Positions of all units but the first of each hash.

    Args:
        hashes: uint64 [n].
        positions: int64 [n], all different; the lowest is the first.

    Returns:
        int64 [m], sorted.
    """
    repeats = np.empty(len(hashes), np.int64)
    n = _find_repeats(hashes, np.argsort(hashes), positions, repeats)
    return np.sort(repeats[:n])


def cut_units(texts: pa.Array, units: Units, gone: np.ndarray) -> Cut:
    """Cut units.

    Args:
        texts: string or large_string, n documents, no nulls.
        units: of these texts, by `split_units`.
        gone: for each of them, whether it is to be cut; bool.

    Returns:
        What is left.
    """
    data, offsets = text_buffers(texts)
    out, ends = np.empty_like(data), np.zeros(len(offsets), np.int64)
    _cut(data, offsets, units.offsets, units.begin, units.stop, gone, out, ends)
    left = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(out[: ends[-1]]))
    cut = np.concatenate([[0], np.cumsum(units.characters * gone)])[units.offsets]
    all_characters = np.concatenate([[0], np.cumsum(units.characters)])[units.offsets]
    number = np.concatenate([[0], np.cumsum(gone)])[units.offsets]
    share = np.diff(cut) / np.maximum(np.diff(all_characters), 1)
    return Cut(left.cast(texts.type), share, np.diff(number))


@njit(nogil=True, cache=True)
def _split(
    data: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    small: np.ndarray,
    paragraphs: bool,
    ends: np.ndarray,
    begin: np.ndarray,
    stop: np.ndarray,
    characters: np.ndarray,
    hashes: np.ndarray,
) -> int:
    n = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        line = at
        value, length, space, breaks = _START, 0, False, 0
        while at <= end:
            if at == end:
                closes, code, size = length > 0, np.int32(0x0A), 1
            else:
                code, size = decode(data, at)
                closes = code == 0x0A and length > 0 and (breaks > 0 or not paragraphs)
            if closes:
                hashes[n] = max(mix(value), np.uint64(1))
                characters[n] = length
                n += 1
                value, length, space, breaks = _START, 0, False, 0
            elif table[code] & _SPACE:
                space = True
                breaks += code == 0x0A
            else:
                if length == 0:
                    begin[n] = line
                elif space:
                    value = (value ^ _BLANK) * _PRIME
                    length += 1
                value = (value ^ np.uint64(small[code])) * _PRIME
                length += 1
                space, breaks = False, 0
                stop[n] = at + size
            at += size
            if code == 0x0A:
                line = at
        ends[document + 1] = n
    return n


@njit(nogil=True, cache=True)
def _find_repeats(hashes: np.ndarray, order: np.ndarray, positions: np.ndarray, repeats: np.ndarray) -> int:
    n = 0
    begin = 0
    while begin < len(order):
        end = begin
        first = positions[order[begin]]
        while end < len(order) and hashes[order[end]] == hashes[order[begin]]:
            first = min(first, positions[order[end]])
            end += 1
        for i in range(begin, end):
            if positions[order[i]] != first:
                repeats[n] = positions[order[i]]
                n += 1
        begin = end
    return n


@njit(nogil=True, cache=True)
def _cut(
    data: np.ndarray,
    offsets: np.ndarray,
    unit_offsets: np.ndarray,
    begin: np.ndarray,
    stop: np.ndarray,
    gone: np.ndarray,
    out: np.ndarray,
    ends: np.ndarray,
) -> None:
    n = 0
    for document in range(len(offsets) - 1):
        first, last = unit_offsets[document], unit_offsets[document + 1]
        kept = -1  # the last unit that stays
        for unit in range(first, last):
            if not gone[unit]:
                kept = unit
        if first == last:  # white space alone is left as it is
            size = offsets[document + 1] - offsets[document]
            out[n : n + size] = data[offsets[document] : offsets[document + 1]]
            n += size
        for unit in range(first, kept + 1):
            if gone[unit]:
                continue
            start = offsets[document] if unit == first else begin[unit]
            end = begin[unit + 1] if unit + 1 < last else offsets[document + 1]
            if unit == kept and unit + 1 < last:
                end = stop[unit]
            out[n : n + end - start] = data[start:end]
            n += end - start
        ends[document + 1] = n
