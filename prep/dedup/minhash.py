"""MinHash signatures of whole batches, bit-identical to datasketch 2.0's `affine32` scheme, and the keys of LSH bands.

A document is the set of its shingles: SHINGLE_WORDS consecutive words of the lower-cased text (the `\\w+` of
`prep.words`). A document with fewer words is one shingle of all of them; one without a word has none, and so no
near-duplicates. The hash of a shingle of k words with hashes w_1 .. w_k (`Words.lower`) is, modulo 2^64,

    fmix64((..((k P + w_1) P + w_2) P ..) + w_k),     P = 0x9E3779B97F4A7C15

Exact similarities are those of the sets of these 64-bit hashes. The 32 bits that MinHash sees are the upper ones: with
h = fmix32(hash >> 32), value p of a signature is the minimum over the shingles of a_p h + b_p modulo 2^32, where a
(odd) and b come from `numpy.random.RandomState(seed)` as in datasketch; an empty set gives 2^32 - 1. So a row loads as
`datasketch.MinHash(hashvalues=row, seed=seed, scheme="affine32")`.

The key of band i is a hash of i and of `rows` values of the signature. The key 0 says: no candidate.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numba import njit

from prep.characters import WORD, classes, lower
from prep.words import FNV_PRIME, FNV_START, MIX_1, MIX_2, decode, mix, text_buffers

SHINGLE_WORDS = 5
PERMUTATIONS = 128
SEED = 1  # datasketch's default
BANDS, ROWS = 18, 7
POLYNOMIAL = 0x9E3779B97F4A7C15  # odd, bits of the golden ratio
EMPTY = 2**32 - 1
_BLOCK = 256  # hashes of a block stay in the first-level cache while all permutations pass over them
_FEW = 24  # below, lanes are permutations instead of shingles
_START, _PRIME = np.uint64(FNV_START), np.uint64(FNV_PRIME)
_BUCKET_BITS, _LARGE_BUCKET = 16, 24
_P, _MIX_1, _MIX_2, _SHIFT = np.uint64(POLYNOMIAL), np.uint64(MIX_1), np.uint64(MIX_2), np.uint64(33)
_MIX_32_1, _MIX_32_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_S13, _S16, _S32 = np.uint32(13), np.uint32(16), np.uint64(32)
_WORD, _EMPTY = np.uint8(WORD), np.uint32(EMPTY)


def permutations(count: int = PERMUTATIONS, seed: int = SEED) -> np.ndarray:
    """The parameters a (odd) and b of datasketch's `affine32` permutations, uint32 [2, count]."""
    generator = np.random.RandomState(seed)
    a = generator.randint(0, 1 << 31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return np.array([a, generator.randint(0, 1 << 32, count, dtype=np.uint32)])


def make_signatures(texts: pa.Array, parameters: np.ndarray) -> np.ndarray:
    """MinHash signatures of a batch, in one pass over its bytes; memory does not grow with the number of shingles.

    Args:
        texts: string or large_string, n documents, no nulls.
        parameters: uint32 [2, p], of `permutations`.

    Returns:
        uint32 [n, p].
    """
    data, offsets = text_buffers(texts)
    found = np.full((len(texts), parameters.shape[1]), _EMPTY)
    _signatures(data, offsets, classes(), lower(), parameters[0], parameters[1], found)
    return found


def make_band_keys(signatures: np.ndarray, bands: int = BANDS, rows: int = ROWS) -> np.ndarray:
    """LSH keys: two documents are candidates where they share one in a band.

    Args:
        signatures: uint32 [n, p].
        bands: number of bands; bands * rows <= p.
        rows: signature values in each.

    Returns:
        uint64 [bands, n]; 0 for a document without shingles, and for no other.
    """
    if bands * rows > signatures.shape[1]:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} hashes, there are {signatures.shape[1]}")
    keys = np.empty((bands, len(signatures)), np.uint64)
    _band_keys(signatures, rows, keys)
    return keys


def make_shingles(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The sets of shingle hashes of documents, for exact similarities.

    Args:
        texts: string or large_string, n documents, no nulls.

    Returns:
        hashes, uint64 [m], of each document sorted and without repetition, and their borders, int64 [n + 1].
    """
    data, offsets = text_buffers(texts)
    hashes = np.empty(len(data) // 2 + len(texts) + 1, np.uint64)  # a word and what ends it are two bytes or more
    ends = np.zeros(len(texts) + 1, np.int64)
    _shingle_sets(data, offsets, classes(), lower(), hashes, ends)
    return hashes[: ends[-1]].copy(), ends


@njit(nogil=True, cache=True)
def _ascii(table: np.ndarray, small: np.ndarray) -> np.ndarray:
    """The lower case of ASCII, 0 for what is not of a word, uint8 [128]."""
    found = np.zeros(128, np.uint8)
    for code in range(128):
        if table[code] & _WORD:
            found[code] = small[code]
    return found


@njit(nogil=True, cache=True)
def _shingles(
    data: np.ndarray,
    position: int,
    end: int,
    ascii: np.ndarray,
    table: np.ndarray,
    small: np.ndarray,
    state: np.ndarray,
    out: np.ndarray,
) -> tuple:
    """Shingles of a document from its byte `position` on, until `end` or `out` is full.

    `state` is the window: the last four words, oldest first, and how many words were seen. Gives the position where it
    goes on and the number of shingles.
    """
    a, b, c, d, seen = state[0], state[1], state[2], state[3], state[4]
    n = 0
    begin = np.uint64(SHINGLE_WORDS) * _P
    while position < end and n < len(out):
        word = _START
        while position < end:
            first = data[position]
            if first < 0x80:
                letter = ascii[first]
                position += 1
                if not letter:
                    break
                word = (word ^ np.uint64(letter)) * _PRIME
            else:
                code, size = decode(data, position)
                position += size
                if not table[code] & _WORD:
                    break
                word = (word ^ np.uint64(small[code])) * _PRIME
        if word == _START:
            continue
        e = mix(word)
        seen += np.uint64(1)
        if seen >= SHINGLE_WORDS:
            out[n] = mix(((((begin + a) * _P + b) * _P + c) * _P + d) * _P + e)
            n += 1
        a, b, c, d = b, c, d, e
    if position >= end and 0 < seen < SHINGLE_WORDS:
        value = seen
        if seen > 3:
            value = value * _P + a
        if seen > 2:
            value = value * _P + b
        if seen > 1:
            value = value * _P + c
        out[n] = mix(value * _P + d)
        n += 1
    state[0], state[1], state[2], state[3], state[4] = a, b, c, d, seen
    return position, n


@njit(nogil=True, cache=True)
def _lower_minima(hashes: np.ndarray, n: int, a: np.ndarray, b: np.ndarray, minima: np.ndarray) -> None:
    """Lower each permutation's minimum by n hashes; both loops compile to 8 or 16 lanes."""
    if n < _FEW:
        for i in range(n):
            h = hashes[i]
            for p in range(len(a)):
                minima[p] = min(np.uint32(a[p] * h + b[p]), minima[p])
        return
    for p in range(len(a)):
        a_p, b_p = a[p], b[p]
        least = minima[p]
        for i in range(n):
            least = min(np.uint32(a_p * hashes[i] + b_p), least)
        minima[p] = least


@njit(nogil=True, cache=True)
def _signatures(
    data: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    small: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    found: np.ndarray,
) -> None:
    block = np.empty(_BLOCK, np.uint64)
    mixed = np.empty(_BLOCK, np.uint32)
    state, ascii = np.zeros(5, np.uint64), _ascii(table, small)
    for document in range(len(offsets) - 1):
        position, end = offsets[document], offsets[document + 1]
        state[:] = 0
        while position < end:
            position, n = _shingles(data, position, end, ascii, table, small, state, block)
            for i in range(n):
                h = np.uint32(block[i] >> _S32)
                h = np.uint32((h ^ (h >> _S16)) * _MIX_32_1)
                h = np.uint32((h ^ (h >> _S13)) * _MIX_32_2)
                mixed[i] = h ^ (h >> _S16)
            _lower_minima(mixed, n, a, b, found[document])


@njit(nogil=True, cache=True)
def _band_keys(signatures: np.ndarray, rows: int, keys: np.ndarray) -> None:
    for document in range(len(signatures)):
        empty = True
        for p in range(signatures.shape[1]):
            if signatures[document, p] != _EMPTY:
                empty = False
                break
        for band in range(len(keys)):
            value = np.uint64(band + 1) * _P
            for row in range(rows):
                value = mix(value ^ np.uint64(signatures[document, band * rows + row])) * _P
            value = mix(value)
            keys[band, document] = np.uint64(0) if empty else max(value, np.uint64(1))


@njit(nogil=True, cache=True)
def _sort(values: np.ndarray, found: np.ndarray, counts: np.ndarray) -> None:
    """Sort hashes into `found`: by their upper bits into buckets of about one, which are then put in order.

    Three times as fast as a general sort, since hashes are spread evenly; what is not (a shingle that comes very often)
    gets one.
    """
    n = len(values)
    bits = 1
    while bits < _BUCKET_BITS and 1 << bits < n:
        bits += 1
    shift = np.uint64(64 - bits)
    counts[: (1 << bits) + 1] = 0
    for i in range(n):
        counts[(values[i] >> shift) + np.uint64(1)] += 1
    for bucket in range(1 << bits):
        counts[bucket + 1] += counts[bucket]
    for i in range(n):
        bucket = values[i] >> shift
        found[counts[bucket]] = values[i]
        counts[bucket] += 1
    begin = 0
    for bucket in range(1 << bits):
        end = counts[bucket]
        if end - begin > _LARGE_BUCKET:
            found[begin:end] = np.sort(found[begin:end])
        else:
            for i in range(begin + 1, end):
                value = found[i]
                j = i
                while j > begin and found[j - 1] > value:
                    found[j] = found[j - 1]
                    j -= 1
                found[j] = value
        begin = end


@njit(nogil=True, cache=True)
def _shingle_sets(
    data: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    small: np.ndarray,
    hashes: np.ndarray,
    ends: np.ndarray,
) -> None:
    state, ascii = np.zeros(5, np.uint64), _ascii(table, small)
    found, counts = np.empty(1024, np.uint64), np.empty((1 << _BUCKET_BITS) + 1, np.int64)
    at = 0
    for document in range(len(offsets) - 1):
        state[:] = 0
        _, n = _shingles(data, offsets[document], offsets[document + 1], ascii, table, small, state, hashes[at:])
        if len(found) < n:
            found = np.empty(2 * n, np.uint64)
        _sort(hashes[at : at + n], found, counts)
        for i in range(n):
            if i == 0 or found[i] != found[i - 1]:
                hashes[at] = found[i]
                at += 1
        ends[document + 1] = at
