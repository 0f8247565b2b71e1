"""Ids that come more than once: whatever names documents by id alone (rejects, audits, shards) is then ambiguous.

Within a part they are counted. Over the parts they are estimated from a sample that is the same everywhere: each part
keeps the SAMPLE smallest of its ids' 64-bit hashes. Up to the smallest of the last hashes that full samples have, every
part has told all its hashes; so R hashes that come from several parts, up to the hash T, stand for about R 2^64 / T ids
of that kind. Where no part has more than SAMPLE ids, this counts them. Memory: 8 bytes for each document of one part,
and less than 1 kB for each part.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from prep.words import FNV_PRIME, FNV_START, MIX_1, MIX_2, text_buffers

SAMPLE = 64
_START, _PRIME = np.uint64(FNV_START), np.uint64(FNV_PRIME)
_MIX_1, _MIX_2, _SHIFT = np.uint64(MIX_1), np.uint64(MIX_2), np.uint64(33)


class IdCounter:
    """Counts the ids of one part."""

    def __init__(self) -> None:
        self._hashes = [np.zeros(0, np.uint64)]

    def add(self, ids: pa.Array) -> None:
        """Take the ids of more documents: strings, no nulls."""
        data, offsets = text_buffers(ids)
        hashes = np.empty(len(ids), np.uint64)
        _hash(data, offsets, hashes)
        self._hashes.append(hashes)

    def found(self) -> dict[str, Any]:
        """How many ids come more than once, how many there are, and the sample, ready for JSON."""
        hashes, counts = np.unique(np.concatenate(self._hashes), return_counts=True)
        sample = b64encode(hashes[:SAMPLE].astype("<u8").tobytes()).decode()
        return {"repeated": int((counts > 1).sum()), "distinct": len(hashes), "sample": sample}


def count_repeated(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Ids that come more than once in parts, of which each is what `IdCounter.found` gave.

    Returns:
        `within`: ids that come again in one and the same part; `across`: ids of several parts, an estimate unless
        `exact`. An id of both kinds counts in both.
    """
    within, bound, samples, exact = 0, 2**64 - 1, [np.zeros(0, np.uint64)], True
    for part in parts:
        within += part["repeated"]
        sample = np.frombuffer(b64decode(part["sample"]), "<u8")
        samples.append(sample)
        if part["distinct"] > len(sample):
            bound, exact = min(bound, int(sample[-1])), False
    known = np.concatenate(samples)
    _, counts = np.unique(known[known <= np.uint64(bound)], return_counts=True)
    several = int((counts > 1).sum())
    return {"within": within, "across": several if exact else round(several * 2**64 / (bound + 1)), "exact": exact}


@njit(nogil=True, cache=True)
def _hash(data: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    """FNV-1a over the bytes, and MurmurHash3's `fmix64`, so that small hashes are a fair sample."""
    for row in range(len(out)):
        value = _START
        for at in range(offsets[row], offsets[row + 1]):
            value = (value ^ np.uint64(data[at])) * _PRIME
        value = (value ^ (value >> _SHIFT)) * _MIX_1
        value = (value ^ (value >> _SHIFT)) * _MIX_2
        out[row] = value ^ (value >> _SHIFT)
