"""A batch of texts as words: one kernel pass, straight over the UTF-8 buffer, from which all rules and hashes follow.

A *word* is a maximal run of WORD characters (the `\\w` of `re`, see `prep.characters`). A *symbol token* is a maximal
run of one and the same character that is neither WORD nor SPACE: "...", "--", "!". Tokens are both, in order:

    "It's 5 a.m. ..."  ->  It ' s 5 a . m . ...

`decode` and `mix` are built into the kernels of other files: after a change of theirs, remove the `__pycache__` folders
of prep, for numba's cache does not see it.

The hash of a token is FNV-1a (64 bits) over its code points, finished with the mixing steps of MurmurHash3's `fmix64`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import SPACE, WORD, classes, lower

FNV_START, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
MIX_1, MIX_2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_START, _PRIME = np.uint64(FNV_START), np.uint64(FNV_PRIME)
_MIX_1, _MIX_2, _SHIFT = np.uint64(MIX_1), np.uint64(MIX_2), np.uint64(33)
_SPACE, _WORD = np.uint8(SPACE), np.uint8(WORD)
Hash = Literal["hash", "lower"]


class Words(NamedTuple):
    """The tokens of a batch, in flat arrays.

    Attributes:
        offsets: int64 [documents + 1]; the tokens of document d are offsets[d]:offsets[d + 1] of the other arrays.
        start: int32 [n]; first byte of each token in the text data of the batch (see `text_buffers`).
        stop: int32 [n]; the byte behind it.
        characters: int32 [n]; its code points.
        kind: uint8 [n]; class bits of all its characters together. kind & WORD tells words from symbol tokens.
        hash: uint64 [n]; hash of its code points; None if it was not wanted.
        lower: uint64 [n]; hash of its lower-cased code points; likewise.
    """

    offsets: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    characters: np.ndarray
    kind: np.ndarray
    hash: np.ndarray | None
    lower: np.ndarray | None


def text_buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 data of a column, uint8, and the borders of its documents in it, int64 [n + 1]; no nulls, no copy."""
    size = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, borders, data = texts.buffers()
    offsets = np.frombuffer(borders, size)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    raw = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return raw[offsets[0] : offsets[-1]], offsets - offsets[0]


def split_words(texts: pa.Array, hashes: Collection[Hash] = ("hash", "lower")) -> Words:
    """Split the texts of a batch (string or large_string, no nulls, valid UTF-8, below 2 GiB in all).

    Args:
        texts: the batch.
        hashes: which are wanted; with one of the two alone it takes about three quarters of the time.
    """
    data, offsets = text_buffers(texts)
    if len(data) >= 2**31:
        raise ValueError(f"a batch of {len(data):,} bytes; the positions of words are 32-bit numbers")
    ends = np.zeros(len(offsets), np.int64)
    capacity = len(data) // 4 + 64
    while True:
        start, stop, characters = (np.empty(capacity, np.int32) for _ in range(3))
        kind = np.empty(capacity, np.uint8)
        plain, small = (np.empty(capacity, np.uint64) if name in hashes else None for name in ("hash", "lower"))
        n = _split(data, offsets, classes(), lower(), ends, start, stop, characters, kind, plain, small)
        if n >= 0:
            made = [array if array is None else array[:n] for array in (plain, small)]
            return Words(ends, start[:n], stop[:n], characters[:n], kind[:n], *made)
        capacity = min(2 * capacity, len(data))  # no more tokens than bytes


def hash_word(word: str) -> int:
    """The hash of a word in plain Python."""
    value = FNV_START
    for letter in word:
        value = ((value ^ ord(letter)) * FNV_PRIME) % 2**64
    for factor in (MIX_1, MIX_2):
        value = ((value ^ (value >> 33)) * factor) % 2**64
    return value ^ (value >> 33)


@njit(nogil=True, cache=True, inline="always")
def decode(data: np.ndarray, at: int) -> tuple[np.int32, int]:
    """The code point at a byte position of valid UTF-8, and its bytes."""
    first = np.int32(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | (data[at + 1] & 0x3F), 2
    if first < 0xF0:
        return (first & 0x0F) << 12 | np.int32(data[at + 1] & 0x3F) << 6 | (data[at + 2] & 0x3F), 3
    high = (first & 0x07) << 18 | np.int32(data[at + 1] & 0x3F) << 12
    return high | np.int32(data[at + 2] & 0x3F) << 6 | (data[at + 3] & 0x3F), 4


@njit(nogil=True, cache=True, inline="always")
def mix(value: np.uint64) -> np.uint64:
    """MurmurHash3's `fmix64`: spreads every bit over all."""
    value = (value ^ (value >> _SHIFT)) * _MIX_1
    value = (value ^ (value >> _SHIFT)) * _MIX_2
    return value ^ (value >> _SHIFT)


@njit(nogil=True, cache=True)
def _split(
    data: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    small_letters: np.ndarray,
    ends: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    characters: np.ndarray,
    kind: np.ndarray,
    plain: np.ndarray | None,
    small: np.ndarray | None,
) -> int:
    """Fill the arrays; the number of tokens, or -1 if they do not fit. Numba decides at once what tests for None."""
    n = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            code, size = decode(data, at)
            bits = table[code]
            if bits & _SPACE:
                at += size
                continue
            if n == len(start):
                return -1
            start[n] = at
            seen = bits
            length = 1
            value = value_small = _START
            if plain is not None:
                value = (_START ^ np.uint64(code)) * _PRIME
            if small is not None:
                value_small = (_START ^ np.uint64(small_letters[code])) * _PRIME
            at += size
            first = code
            while at < end:
                code, size = decode(data, at)
                bits = table[code]
                if not (bits & _WORD if seen & _WORD else code == first):
                    break
                seen |= bits
                length += 1
                if plain is not None:
                    value = (value ^ np.uint64(code)) * _PRIME
                if small is not None:
                    value_small = (value_small ^ np.uint64(small_letters[code])) * _PRIME
                at += size
            stop[n] = at
            characters[n] = length
            kind[n] = seen
            if plain is not None:
                plain[n] = mix(value)
            if small is not None:
                small[n] = mix(value_small)
            n += 1
        ends[document + 1] = n
    return n
