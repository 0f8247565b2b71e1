"""An index of n-grams of words, and the search for them in batches of documents.

The n-grams of all items become 64-bit keys, from prefix hashes over the words' own hashes (of the lower-cased word):

    key(i, n) = mix(P[i + n] - P[i] B^n),   P[i + 1] = P[i] B + hash(word i)    (mod 2^64)

Where an n-gram of the items begins in a document, so do its first words, as many as the shortest of all n-grams has.
The key of these goes through a Bloom filter (three bits of one 64-bit number, about one in a hundred passes), the keys
of all lengths then into the sorted keys of the items, by their top bits. What matches is compared word for word:
no accident of hashing counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import WORD, lower
from prep.words import Words, split_words, text_buffers

ITEMS_PER_GRAM = 10  # of the items that share an n-gram, so many are told; the document is hit all the same
COMPARED_AT_ONCE = 1 << 18  # words that become Python objects at a time
SIEVE_BITS = 24  # 128 MB at most
BASE = 0x9E3779B97F4A7C15
_WORD = np.uint8(WORD)
_BASE, _MIX, _HALF, _ONE = (np.uint64(n) for n in (BASE, 0xD6E8FEB86659FD93, 32, 1))
_SIX, _TWELVE, _LOW = np.uint64(6), np.uint64(12), np.uint64(63)


class Match(NamedTuple):
    """Bytes [start, stop) of a document's text that an item has too: `grams` n-grams, each one word behind the last."""

    start: int
    stop: int
    item: int
    grams: int


@dataclass(frozen=True)
class Index:
    """The n-grams of items, as entries: entry e stands for the `length[e]` words of `item[e]` from word `place[e]` on.

    Attributes:
        short: bool [items], those with too few words, which have no entries.
        data: text of the items; word w of them all is data[start[w]:stop[w]].
        keys: of the entries, sorted, uint64.
        directory: the entries whose keys begin with the bits b are directory[b]:directory[b + 1].
        lengths: the lengths that entries have, rising.
        sieve: the Bloom filter with the keys of the entries' first `lengths[0]` words, uint64 [a power of two].
    """

    short: np.ndarray
    data: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    keys: np.ndarray
    item: np.ndarray
    place: np.ndarray
    length: np.ndarray
    directory: np.ndarray
    lengths: np.ndarray
    sieve: np.ndarray

    def search(self, texts: pa.Array) -> dict[int, list[Match]]:
        """All matches, by document, in the order of the text.

        Where several items share an n-gram, the first ten of them match.
        """
        if not len(self.keys):
            return {}
        tokens = split_words(texts, ["lower"])
        offsets, token, words = _only_words(tokens)
        table = (self.lengths, _powers(self.lengths), self.sieve, self.directory)
        capacity = 1024
        while True:
            document, place, entry = (np.empty(capacity, np.int64) for _ in range(3))
            n = _search(offsets, words, *table, self.keys, self.length, document, place, entry)
            if n >= 0:
                break
            capacity *= 8
        if n == 0:
            return {}
        order = np.lexsort((place[:n], place[:n] - self.place[entry[:n]], self.item[entry[:n]]))
        place, entry = place[order], entry[order]
        data, borders = text_buffers(texts)
        start, stop = tokens.start[token], tokens.stop[token]
        same = self._same_words(data, start, stop, place, entry)
        place, entry, document = place[same], entry[same], document[order][same]
        first = np.flatnonzero(~self._follows(place, entry))
        grams = np.diff(np.append(first, len(place)))
        begin = borders[document[first]]
        starts = start[place[first]] - begin
        stops = stop[place[first] + grams + self.length[entry[first]] - 2] - begin
        items = self.item[entry[first]]
        found: dict[int, list[Match]] = {}
        for row in np.lexsort((items, starts, document[first])).tolist():
            match = Match(int(starts[row]), int(stops[row]), int(items[row]), int(grams[row]))
            found.setdefault(int(document[first[row]]), []).append(match)
        return found

    def _follows(self, place: np.ndarray, entry: np.ndarray) -> np.ndarray:
        """Of candidates sorted by item, distance and place: which are one word behind the one before, on both sides."""
        follows = np.zeros(len(place), bool)
        follows[1:] = (np.diff(place) == 1) & (np.diff(self.place[entry]) == 1) & (np.diff(self.item[entry]) == 0)
        return follows

    def _same_words(
        self, data: np.ndarray, start: np.ndarray, stop: np.ndarray, place: np.ndarray, entry: np.ndarray
    ) -> np.ndarray:
        """Which candidates, sorted like that, agree in every word; one that follows brings one more word to compare."""
        length = self.length[entry].astype(np.int64)
        new = np.where(self._follows(place, entry), 1, length)
        behind = np.cumsum(new)  # the words of a candidate are the last `length` of the words compared so far
        at = np.arange(behind[-1]) - np.repeat(behind - length, new)
        here, there = np.repeat(place, new) + at, np.repeat(self.place[entry], new) + at
        differences = np.zeros(len(here) + 1, np.int64)
        for first in range(0, len(here), COMPARED_AT_ONCE):
            a, b = here[first : first + COMPARED_AT_ONCE], there[first : first + COMPARED_AT_ONCE]
            spans = np.stack([start[a], stop[a], self.start[b], self.stop[b]], axis=1).tolist()
            differences[first + 1 : first + 1 + len(a)] = [
                _lower_case(data[a:b].tobytes()) != _lower_case(self.data[c:d].tobytes()) for a, b, c, d in spans
            ]
        differences = np.cumsum(differences)
        return differences[behind] == differences[behind - length]


def build_index(items: Sequence[str], ngram: int, min_words: int) -> Index:
    """Index the n-grams of items; an item with fewer words is one entry, one with fewer than `min_words` is none."""
    texts = pa.array(items, pa.large_string())
    data, _ = text_buffers(texts)
    tokens = split_words(texts, ["lower"])
    offsets, token, words = _only_words(tokens)
    sizes = np.diff(offsets)
    keys, heads = np.empty(len(words), np.uint64), np.empty(len(words), np.uint64)
    item, place = np.empty(len(words), np.int32), np.empty(len(words), np.int64)
    lengths = np.unique(sizes[sizes >= min_words].clip(max=ngram))
    head = int(lengths.min(initial=ngram))
    n = _grams(offsets, words, ngram, min_words, head, _powers(np.arange(ngram + 1)), keys, heads, item, place)
    sieve = np.zeros(2 ** min(SIEVE_BITS, max(1, n.bit_length() - 2)), np.uint64)
    _sift_in(heads[:n], sieve)
    order = np.lexsort((place[:n], item[:n], keys[:n]))
    keys, item, place = keys[order], item[order], place[order]
    again = (keys[1:] == keys[:-1]) & (item[1:] == item[:-1])  # an item may repeat itself
    once = np.append(np.ones(min(n, 1), bool), ~again)
    keys, item, place = keys[once], item[once], place[once]
    rank = np.arange(len(keys)) - np.searchsorted(keys, keys)  # among those of the same key
    keys, item, place = (array[rank < ITEMS_PER_GRAM] for array in (keys, item, place))
    bits = max(1, len(keys).bit_length())
    directory = np.searchsorted(keys >> np.uint64(64 - bits), np.arange(2**bits + 1, dtype=np.uint64)).astype(np.int32)
    length = np.minimum(sizes, ngram).astype(np.int16)[item]
    where = (sizes < min_words, data, tokens.start[token], tokens.stop[token])
    return Index(*where, keys, item, place, length, directory, lengths.astype(np.int64), sieve)


def _powers(lengths: np.ndarray) -> np.ndarray:
    return np.array([pow(BASE, length, 2**64) for length in lengths.tolist()], np.uint64)


@lru_cache(maxsize=1 << 16)
def _lower_case(word: bytes) -> str:
    text = word.decode()
    return text.lower() if text.isascii() else "".join(chr(lower()[ord(letter)]) for letter in text)


def _only_words(tokens: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The words of a batch without its symbols: offsets [documents + 1], which tokens they are, and their hashes."""
    token, words = np.empty(len(tokens.kind), np.int32), np.empty(len(tokens.kind), np.uint64)
    offsets = np.zeros(len(tokens.offsets), np.int64)
    assert tokens.lower is not None
    n = _keep_words(tokens.offsets, tokens.kind, tokens.lower, offsets, token, words)
    return offsets, token[:n], words[:n]


@njit(nogil=True, cache=True)
def _keep_words(
    borders: np.ndarray, kind: np.ndarray, lower: np.ndarray, offsets: np.ndarray, token: np.ndarray, words: np.ndarray
) -> int:
    """Fill offsets, tokens and hashes of the words; returns their number."""
    n = 0
    for number in range(len(borders) - 1):
        for at in range(borders[number], borders[number + 1]):
            token[n] = at  # kept only if it is a word: without a branch
            words[n] = lower[at]
            n += (kind[at] & _WORD) != 0
        offsets[number + 1] = n
    return n


@njit(nogil=True, cache=True)
def _bits(size: int) -> int:
    """The bits that number a table of that many places, a power of two."""
    bits = 0
    while 1 << bits < size:
        bits += 1
    return bits


@njit(nogil=True, cache=True, inline="always")
def _three_bits(key: np.uint64) -> np.uint64:
    return _ONE << (key & _LOW) | _ONE << (key >> _SIX & _LOW) | _ONE << (key >> _TWELVE & _LOW)


@njit(nogil=True, cache=True)
def _sift_in(keys: np.ndarray, sieve: np.ndarray) -> None:
    shift = np.uint64(64 - _bits(len(sieve)))
    for key in keys:
        sieve[key >> shift] |= _three_bits(key)


@njit(nogil=True, cache=True, inline="always")
def _key(prefixes: np.ndarray, at: int, length: int, power: np.uint64) -> np.uint64:
    key = prefixes[at + length] - prefixes[at] * power
    key = (key ^ (key >> _HALF)) * _MIX
    return key ^ (key >> _HALF)


@njit(nogil=True, cache=True)
def _prefixes(words: np.ndarray, begin: int, end: int, prefixes: np.ndarray) -> None:
    prefixes[0] = 0
    for at in range(end - begin):
        prefixes[at + 1] = prefixes[at] * _BASE + words[begin + at]


@njit(nogil=True, cache=True)
def _grams(
    offsets: np.ndarray,
    words: np.ndarray,
    ngram: int,
    min_words: int,
    head: int,
    powers: np.ndarray,
    keys: np.ndarray,
    heads: np.ndarray,
    item: np.ndarray,
    place: np.ndarray,
) -> int:
    """Fill keys, keys of the first `head` words, items and places of the n-grams; returns their number."""
    prefixes = np.empty(np.max(np.diff(offsets)) + 1, np.uint64)
    n = 0
    for number in range(len(offsets) - 1):
        begin, end = offsets[number], offsets[number + 1]
        if end - begin < min_words:
            continue
        _prefixes(words, begin, end, prefixes)
        length = min(ngram, end - begin)
        for at in range(end - begin - length + 1):
            keys[n] = _key(prefixes, at, length, powers[length])
            heads[n] = _key(prefixes, at, head, powers[head])
            item[n] = number
            place[n] = begin + at
            n += 1
    return n


@njit(nogil=True, cache=True)
def _search(
    offsets: np.ndarray,
    words: np.ndarray,
    lengths: np.ndarray,
    powers: np.ndarray,
    sieve: np.ndarray,
    directory: np.ndarray,
    keys: np.ndarray,
    size: np.ndarray,
    document: np.ndarray,
    place: np.ndarray,
    entry: np.ndarray,
) -> int:
    """Fill documents, places and entries of all equal keys; their number, or -1 if they do not fit."""
    sieve_shift, directory_shift = np.uint64(64 - _bits(len(sieve))), np.uint64(64 - _bits(len(directory) - 1))
    head = lengths[0]
    longest = 0
    for number in range(len(offsets) - 1):
        longest = max(longest, offsets[number + 1] - offsets[number])
    prefixes = np.empty(longest + 1, np.uint64)
    n = 0
    for number in range(len(offsets) - 1):
        begin, count = offsets[number], offsets[number + 1] - offsets[number]
        _prefixes(words, begin, begin + count, prefixes)
        for at in range(count - head + 1):
            key = _key(prefixes, at, head, powers[0])
            if ~sieve[key >> sieve_shift] & _three_bits(key):
                continue
            for which in range(len(lengths)):
                length = lengths[which]
                if at + length > count:
                    break
                key = _key(prefixes, at, length, powers[which])
                top = key >> directory_shift
                for candidate in range(directory[top], directory[top + _ONE]):
                    if keys[candidate] == key and size[candidate] == length:
                        if n == len(document):
                            return -1
                        document[n] = number
                        place[n] = begin + at
                        entry[n] = candidate
                        n += 1
    return n
