"""Exact copies: documents whose normalised texts are the same.

The normalised text is lower-cased (one code point to one, by `prep.characters`), each run of white space becomes one
space, and none is left at either end. Its 128-bit xxh3 stands for it. Since white space and letter case do not touch
its words, exact copies have the same shingles as well.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from numba import njit

from prep.characters import SPACE, classes, lower
from prep.words import decode, text_buffers

_SPACE, _BLANK = np.uint8(SPACE), np.uint8(0x20)


def normalise(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Normalised texts of a batch: UTF-8 data, uint8, and the borders between documents, int64 [n + 1]."""
    data, offsets = text_buffers(texts)
    out = np.empty(len(data) + len(data) // 2 + 4, np.uint8)  # U+023A, two bytes, has a lower case of three
    ends = np.zeros(len(offsets), np.int64)
    _normalise(data, offsets, classes(), lower(), out, ends)
    return out[: ends[-1]], ends


def make_digests(texts: pa.Array) -> np.ndarray:
    """128-bit xxh3 of the normalised texts: uint64 [2, n], the upper half first."""
    data, ends = normalise(texts)
    view, borders, digest = data.data, ends.tolist(), xxhash.xxh3_128_digest
    found = b"".join([digest(view[borders[i] : borders[i + 1]]) for i in range(len(texts))])
    return np.ascontiguousarray(np.frombuffer(found, ">u8").reshape(-1, 2).T.astype(np.uint64))


def load_kernels() -> None:
    """Have numba load, and the kernels of `find_copies`."""
    find_copies(np.zeros((2, 1), np.uint64), np.zeros(1, np.uint32))


def find_copies(digests: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The best-ranked document among those with the same digest.

    Args:
        digests: uint64 [2, n].
        ranks: [n], all different; the lowest is the best.

    Returns:
        keeper, int64 [n]; a document that is its own keeper stays.
    """
    keeper = np.arange(digests.shape[1])
    if len(keeper):
        order = np.argsort(digests[0])
        _find_copies(digests[0], digests[1], order, ranks, keeper)
    return keeper


@njit(nogil=True, cache=True)
def _normalise(
    data: np.ndarray, offsets: np.ndarray, table: np.ndarray, small: np.ndarray, out: np.ndarray, ends: np.ndarray
) -> None:
    ascii = np.empty(128, np.uint8)
    for byte in range(128):
        ascii[byte] = _BLANK if table[byte] & _SPACE else small[byte]
    n = 0
    for document in range(len(offsets) - 1):
        begin, at, end = n, offsets[document], offsets[document + 1]
        before = _BLANK  # what was written last; a blank behind a blank is written over
        while at < end:
            first = data[at]
            if first < 0x80:
                letter = ascii[first]
                out[n] = letter
                n += (letter != _BLANK) | (before != _BLANK)
                before = letter
                at += 1
                continue
            code, size = decode(data, at)
            at += size
            if table[code] & _SPACE:
                out[n] = _BLANK
                n += before != _BLANK
                before = _BLANK
                continue
            character = small[code]
            before = np.uint8(0)
            if character < 0x80:
                out[n] = character
                n += 1
            elif character < 0x800:
                out[n] = 0xC0 | character >> 6
                out[n + 1] = 0x80 | character & 0x3F
                n += 2
            elif character < 0x10000:
                out[n] = 0xE0 | character >> 12
                out[n + 1] = 0x80 | character >> 6 & 0x3F
                out[n + 2] = 0x80 | character & 0x3F
                n += 3
            else:
                out[n] = 0xF0 | character >> 18
                out[n + 1] = 0x80 | character >> 12 & 0x3F
                out[n + 2] = 0x80 | character >> 6 & 0x3F
                out[n + 3] = 0x80 | character & 0x3F
                n += 4
        if before == _BLANK and n > begin:
            n -= 1
        ends[document + 1] = n


@njit(nogil=True, cache=True)
def _find_copies(
    upper: np.ndarray, lower_half: np.ndarray, order: np.ndarray, ranks: np.ndarray, keeper: np.ndarray
) -> None:
    """`order` sorts by the upper halves; equal ones with other lower halves are next to impossible, yet told apart."""
    n = len(order)
    begin = 0
    while begin < n:
        end = begin + 1
        while end < n and upper[order[end]] == upper[order[begin]]:
            end += 1
        if end - begin > 1:
            run = order[begin:end]
            run = run[np.argsort(lower_half[run])]
            first = 0
            while first < len(run):
                last = first
                best = run[first]
                while last < len(run) and lower_half[run[last]] == lower_half[run[first]]:
                    if ranks[run[last]] < ranks[best]:
                        best = run[last]
                    last += 1
                for i in range(first, last):
                    keeper[run[i]] = best
                first = last
        begin = end
