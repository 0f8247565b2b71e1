"""Kernels for lists: an Aho-Corasick automaton over lower-cased text, and hashes of addresses.

The automaton reads the bytes of each lower-cased character; a run of white space counts as one space. For whole words
it also reads a border sign wherever a word begins or ends, and the entries hold the same signs: `new york` is read as
|new| |york|, so it cannot match inside of `renew yorkshire`. One pass, whatever the number of entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import SPACE, WORD, classes, lower
from prep.filters.spans import hash_span
from prep.words import decode, text_buffers

BORDER = 256  # the sign for the border of a word, behind all bytes
_SPACE, _WORD = np.uint8(SPACE), np.uint8(WORD)


class Automaton(NamedTuple):
    """A compiled list.

    Attributes:
        entries: the list.
        kinds: what a byte or BORDER is to the table: int32 [257], 0 for all that stands in no entry.
        table: the next state, int32 [states, kinds]; state 0 is the start.
        entry: the longest entry that ends in a state, or -1; int32 [states].
        whole_words: whether it reads borders.
    """

    entries: list[str]
    kinds: np.ndarray
    table: np.ndarray
    entry: np.ndarray
    whole_words: bool


def build(entries: Sequence[str], *, whole_words: bool) -> Automaton:
    """Compile a list of words or phrases; case does not matter."""
    letters, borders, nothing = lower(), classes(), -1
    readings = [_reading(entry, letters, borders, whole_words) for entry in entries]
    signs = sorted({sign for reading in readings for sign in reading})
    kinds = np.zeros(257, np.int32)
    kinds[signs] = np.arange(1, len(signs) + 1)
    children: list[dict[int, int]] = [{}]
    ends = [nothing]
    for number, reading in enumerate(readings):
        state = 0
        for sign in reading:
            if sign not in children[state]:
                children[state][sign] = len(children)
                children.append({})
                ends.append(nothing)
            state = children[state][sign]
        if ends[state] == nothing:
            ends[state] = number
    table = np.zeros((len(children), len(signs) + 1), np.int32)
    entry = np.array(ends, np.int32)
    fallback = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        if state:
            table[state] = table[fallback[state]]
            if entry[state] == nothing:
                entry[state] = entry[fallback[state]]
        for sign, child in children[state].items():
            fallback[child] = int(table[state, kinds[sign]]) if state else 0
            table[state, kinds[sign]] = child
            queue.append(child)
    return Automaton(list(entries), kinds, table, entry, whole_words)


def _reading(entry: str, letters: np.ndarray, table: np.ndarray, whole_words: bool) -> list[int]:
    """What the automaton reads where an entry stands."""
    signs: list[int] = []
    in_word = in_space = False
    for letter in entry:
        bits = table[ord(letter)]
        word, space = bool(bits & _WORD), bool(bits & _SPACE)
        if whole_words and word != in_word:
            signs.append(BORDER)
        if not (space and in_space):
            signs += b" " if space else chr(letters[ord(letter)]).encode()
        in_word, in_space = word, space
    return [*signs, BORDER] if whole_words and in_word else signs


def count_matches(texts: pa.Array, automaton: Automaton) -> tuple[np.ndarray, np.ndarray]:
    """Places in each text where an entry ends, int64 [n], and the number of the first entry found or -1, int64 [n]."""
    data, offsets = text_buffers(texts)
    found = np.zeros((2, len(texts)), np.int64)
    tables = (automaton.kinds, automaton.table, automaton.entry)
    _walk(data, offsets, classes(), lower(), *tables, automaton.whole_words, found)
    return found[0], found[1]


def address_hashes(entries: Sequence[str]) -> np.ndarray:
    """Sorted hashes of addresses or domains, for `find_addresses`."""
    data, offsets = text_buffers(pa.array(entries, pa.large_string()))
    found = np.zeros(len(entries), np.uint64)
    _hash_addresses(data.copy(), offsets, found)
    return np.unique(found)


def find_addresses(urls: pa.Array, known: np.ndarray, *, whole: bool) -> np.ndarray:
    """Which addresses are on a list, bool [n]: as a whole, or by their domain or one above it."""
    data, offsets = text_buffers(urls)
    found = np.zeros(len(urls), np.bool_)
    _find_addresses(data.copy(), offsets, known, whole, found)
    return found


@njit(nogil=True, cache=True)
def _walk(data, offsets, table, small_letters, kinds, states, entry, whole_words, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        state, matches, first = np.int64(0), np.int64(0), np.int64(-1)
        in_word = in_space = False
        while at <= end:
            code, size, bits = np.int32(0x20), 1, np.uint8(0)
            if at < end:
                code, size = decode(data, at)
                bits = table[code]
            word, space = (bits & _WORD) != 0, (bits & _SPACE) != 0
            if whole_words and word != in_word:
                state = np.int64(states[state, kinds[BORDER]])
                if entry[state] >= 0:
                    matches += 1
                    first = np.int64(entry[state]) if first < 0 else first
            if at == end:
                break
            if not (space and in_space):
                code = np.int32(0x20) if space else small_letters[code]
                if code < 0x80:
                    state = np.int64(states[state, kinds[code]])
                else:
                    if code < 0x800:
                        state = np.int64(states[state, kinds[0xC0 | code >> 6]])
                    else:
                        if code < 0x10000:
                            state = np.int64(states[state, kinds[0xE0 | code >> 12]])
                        else:
                            state = np.int64(states[state, kinds[0xF0 | code >> 18]])
                            state = np.int64(states[state, kinds[0x80 | (code >> 12 & 0x3F)]])
                        state = np.int64(states[state, kinds[0x80 | (code >> 6 & 0x3F)]])
                    state = np.int64(states[state, kinds[0x80 | (code & 0x3F)]])
                if entry[state] >= 0:
                    matches += 1
                    first = np.int64(entry[state]) if first < 0 else first
            in_word, in_space = word, space
            at += size
        found[0, document] = matches
        found[1, document] = first


@njit(nogil=True, cache=True)
def _address(data, a, b):
    """Normalise an address in place: where its host begins and ends, and where the rest ends.

    White space around it, the scheme, `user:password@`, `#...` and a last `/` are left out, the host is lower-cased.
    """
    while a < b and data[a] <= 0x20:
        a += 1
    while b > a and data[b - 1] <= 0x20:
        b -= 1
    for at in range(a, b - 2):
        if data[at] == 0x3A and data[at + 1] == 0x2F and data[at + 2] == 0x2F:
            a = at + 3
            break
        if data[at] in (0x2F, 0x3F, 0x23):
            break
    if b - a >= 2 and data[a] == 0x2F and data[a + 1] == 0x2F:
        a += 2
    host = a
    while host < b and data[host] not in (0x2F, 0x3F, 0x23):
        if data[host] == 0x40:
            a = host + 1
        host += 1
    for at in range(a, host):
        if 0x41 <= data[at] <= 0x5A:
            data[at] |= 0x20
    for at in range(host, b):
        if data[at] == 0x23:
            b = at
            break
    if b > a and data[b - 1] == 0x2F:
        b -= 1
    return a, min(host, b), b


@njit(nogil=True, cache=True)
def _hash_addresses(data, offsets, found):
    for number in range(len(found)):
        a, _, b = _address(data, offsets[number], offsets[number + 1])
        found[number] = hash_span(data, a, b)


@njit(nogil=True, cache=True)
def _known(data, a, b, known):
    value = hash_span(data, a, b)
    place = np.searchsorted(known, value)
    return place < len(known) and known[place] == value


@njit(nogil=True, cache=True)
def _find_addresses(data, offsets, known, whole, found):
    for number in range(len(found)):
        a, host, b = _address(data, offsets[number], offsets[number + 1])
        if a == b:
            continue
        if whole:
            found[number] = _known(data, a, b, known)
            continue
        for at in range(a, host):  # the port does not belong to the domain
            if data[at] == 0x3A:
                host = at
                break
        if host > a and data[host - 1] == 0x2E:
            host -= 1
        while a < host and not found[number]:
            found[number] = _known(data, a, host, known)
            while a < host and data[a] != 0x2E:
                a += 1
            a += 1
