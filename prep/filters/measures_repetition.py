"""Kernels for n-grams of tokens: the share of the most frequent one, and of all that repeat.

Each document is worked through once per n. A repeated n-gram begins with a repeated (n-1)-gram and ends with one, so
only the positions where both repeat are looked at again; in most texts these are few after the first round. An n-gram
is named by the position where it first stands, and compared by the names of its two (n-1)-grams: no hash of an n-gram
is ever trusted, only the 64-bit hashes of the tokens are. Work and memory are linear in the tokens (30 bytes each).
"""

from __future__ import annotations

import numpy as np
from numba import njit

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_K1, _K2, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(32)


def repeated_ngrams(
    offsets: np.ndarray, hashes: np.ndarray, lengths: np.ndarray, totals: np.ndarray, *, overlapping: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of characters in n-grams of tokens.

    Args:
        offsets: borders of the documents in the tokens, int64 [documents + 1].
        hashes: uint64 [tokens].
        lengths: characters of each token, int32 [tokens].
        totals: what the shares are of, float64 [documents].
        overlapping: False counts as Gopher does in datatrove, True as DCLM does (see docs/FILTERS.md).

    Returns:
        The most frequent 2-, 3-, 4-gram, float64 [3, documents], and repeated 5- to 10-grams, float64 [6, documents].
    """
    tops, duplicates = np.zeros((3, len(totals))), np.zeros((6, len(totals)))
    _ngrams(offsets, hashes, lengths, totals, overlapping, tops, duplicates)
    return tops, duplicates


@njit(nogil=True, cache=True)
def _length(lengths, first, n):
    total = np.int64(0)
    for number in range(n):
        total += lengths[first + number]
    return total


@njit(nogil=True, cache=True)
def _name_pairs(hashes, begin, number, table, names, counts):
    """Name and count the 2-grams of a document."""
    mask = np.uint64(len(table) - 1)
    table[:] = 0
    for at in range(number):
        left, right = hashes[begin + at], hashes[begin + at + 1]
        place = ((left * _K1 + right) >> _HALF) & mask
        while True:
            first = table[place] - 1
            if first < 0:
                table[place] = at + 1
                names[at] = at
                counts[at] = 1
                break
            if hashes[begin + first] == left and hashes[begin + first + 1] == right:
                names[at] = first
                counts[first] += 1
                break
            place = (place + np.uint64(1)) & mask


@njit(nogil=True, cache=True)
def _name_longer(old, where, number, table, names, counts):
    """Name and count the n-grams at `number` positions by the names of their (n-1)-grams."""
    mask = np.uint64(len(table) - 1)
    table[:] = 0
    for index in range(number):
        at = where[index]
        left, right = old[at], old[at + 1]
        place = ((np.uint64(left) * _K1 + np.uint64(right) * _K2) >> _HALF) & mask
        while True:
            first = table[place] - 1
            if first < 0:
                table[place] = at + 1
                names[at] = at
                counts[at] = 1
                break
            if old[first] == left and old[first + 1] == right:
                names[at] = first
                counts[first] += 1
                break
            place = (place + np.uint64(1)) & mask


@njit(nogil=True, cache=True)
def _repeats(names, counts, where, number):
    """Keep the positions where an n-gram repeats and the next one does as well; how many they are."""
    kept = 0
    for index in range(number - 1):
        at = where[index]
        if where[index + 1] == at + 1 and counts[names[at]] > 1 and counts[names[at + 1]] > 1:
            where[kept] = at
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _top(names, counts, where, number, lengths, begin, n, longest):
    """Characters of all copies of the most frequent n-gram; among equals the first one, or the longest."""
    best, size = np.int64(1), np.int64(0)
    for index in range(number):
        at = where[index]
        if names[at] != at or counts[at] == 1 or counts[at] < best or (counts[at] == best and not longest):
            continue
        found = _length(lengths, begin + at, n)
        if counts[at] > best or found > size:
            best, size = np.int64(counts[at]), found
    if longest:  # words only, and nothing where nothing repeats
        return best * size
    if best == 1:
        size = _length(lengths, begin, n)
    return best * (size + n - 1)  # with the spaces between them


@njit(nogil=True, cache=True)
def _extra_copies(names, counts, where, number, lengths, begin, n, seen):
    """Characters of the copies behind the first; a copy is passed over as a whole, so that none overlap."""
    total, free = np.int64(0), 0
    for index in range(number):
        seen[where[index]] = 0
    for index in range(number):
        at = where[index]
        name = names[at]
        if at < free or counts[name] == 1:
            continue
        if seen[name]:
            total += _length(lengths, begin + at, n)
            free = at + n
        seen[name] = 1
    return total


@njit(nogil=True, cache=True)
def _covered(names, counts, where, number, lengths, begin, n):
    """Characters of all tokens that stand in a repeated n-gram, the first copy included, none counted twice."""
    total, done = np.int64(0), 0
    for index in range(number):
        at = where[index]
        if counts[names[at]] > 1:
            start = max(at, done)
            total += _length(lengths, begin + start, at + n - start)
            done = at + n
    return total


@njit(nogil=True, cache=True)
def _ngrams(offsets, hashes, lengths, totals, overlapping, tops, duplicates):
    largest = np.int64(0)
    for document in range(len(totals)):
        largest = max(largest, offsets[document + 1] - offsets[document])
    capacity = 64
    while capacity < 2 * largest:
        capacity *= 2
    table = np.empty(capacity, np.int32)
    names, other = np.empty(largest, np.int32), np.empty(largest, np.int32)
    counts, where = np.empty(largest, np.int32), np.empty(largest, np.int32)
    seen = np.empty(largest, np.uint8)
    for document in range(len(totals)):
        begin = offsets[document]
        size = offsets[document + 1] - begin
        number = size - 1
        for n in range(2, 11):
            if n == 2:
                for at in range(number):
                    where[at] = at
            else:
                number = _repeats(names, counts, where, number)
                names, other = other, names
            if size < n or (number <= 0 and (n > 4 or overlapping)):
                break
            capacity = 64
            while capacity < 2 * number:
                capacity *= 2
            if n == 2:
                _name_pairs(hashes, begin, number, table[:capacity], names, counts)
            else:
                _name_longer(other, where, number, table[:capacity], names, counts)
            if n <= 4:
                found = _top(names, counts, where, number, lengths, begin, n, overlapping)
                tops[n - 2, document] = found / totals[document]
            elif overlapping:
                found = _covered(names, counts, where, number, lengths, begin, n)
                duplicates[n - 5, document] = found / totals[document]
            else:
                found = _extra_copies(names, counts, where, number, lengths, begin, n, seen)
                duplicates[n - 5, document] = found / totals[document]
