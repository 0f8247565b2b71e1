"""The order of samples as integer arithmetic: keyed permutations, exact shares, and the sample they lead to.

Permutation: a Feistel network with halves of unequal width over the smallest 2^b >= size, walked until the result
falls below size (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). It needs no memory, so the
i-th window of a shuffled source of any size is known at once. The round function is the finaliser of splitmix64.

Shares: a phase gives its sources integer weights that sum to 2^32, with prefix sums P_0 = 0, P_1, ..., P_S = 2^32.

    E_s(k) = (k P_s) >> 32          samples of the first s sources among the first k samples of the phase
    C_s(k) = E_s(k) - E_{s-1}(k)    samples of source s

The C_s(k) sum to k, and each lies within one sample of its exact share k w_s / 2^32, because it is the difference of
two floors. Step by step C_s may fall, so samples come in blocks of B >= 2^32 / min w_s: over a block no quota
C_s(end) - C_s(start) is negative. Inside a block a permutation spreads the quotas.

All functions below work in uint64: numba turns uint64 with int64 into float64, so every constant is a uint64. They
stand in one file because numba's cache does not notice an edit in a callee elsewhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_0, _1, _2, _32 = (np.uint64(value) for value in (0, 1, 2, 32))
_27, _30, _31 = (np.uint64(value) for value in (27, 30, 31))
_LOW_WORD = np.uint64(0xFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)

ROUND_PAIRS = 4  # 8 rounds; Luby and Rackoff need 4 ideal ones
SMALL_ROUND_PAIRS = 16  # halves of one or two bits mix slowly: with 8 rounds a chi-square test finds N <= 32, not above
_SMALL = np.uint64(32)


@njit("uint64(uint64)", cache=True, nogil=True)
def mix(x: np.uint64) -> np.uint64:
    """Finaliser of splitmix64 (Steele, Lea & Flood, OOPSLA 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> _30)) * _MULTIPLIER_1
    x = (x ^ (x >> _27)) * _MULTIPLIER_2
    return x ^ (x >> _31)


@njit("uint64(uint64, uint64, uint64)", cache=True, nogil=True)
def permute(index: np.uint64, size: np.uint64, key: np.uint64) -> np.uint64:
    """Image of `index` under the permutation of [0, size) that `key` selects; all uint64, index < size."""
    bits = _2
    while (_1 << bits) < size:
        bits += _1
    low = bits >> _1
    high_mask = (_1 << (bits - low)) - _1
    low_mask = (_1 << low) - _1
    pairs = SMALL_ROUND_PAIRS if size <= _SMALL else ROUND_PAIRS
    while True:
        a = index >> low
        b = index & low_mask
        round_key = key
        for _ in range(pairs):
            a ^= mix(b + round_key) & high_mask
            b ^= mix(a + round_key + _GOLDEN) & low_mask
            round_key += _GOLDEN + _GOLDEN
        index = (a << low) | b
        if index < size:
            return index


@njit("uint64(uint64, uint64)", cache=True, nogil=True)
def share(k: np.uint64, prefix: np.uint64) -> np.uint64:
    """E(k) = (k * prefix) >> 32, exact for every k < 2^63: the product may not fit 64 bits, its two words do."""
    return (k >> _32) * prefix + (((k & _LOW_WORD) * prefix) >> _32)


@njit("uint64(uint64, uint64)", cache=True, nogil=True)
def derive(key: np.uint64, number: np.uint64) -> np.uint64:
    """Key number `number` of a family of keys."""
    return mix(key + mix(number + _GOLDEN))


@njit("UniTuple(uint64, 3)(uint64, uint64, uint64, uint64)", cache=True, nogil=True)
def window_of_draw(
    draw: np.uint64, windows: np.uint64, source_key: np.uint64, seq_len: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Epoch, window and stream position of a source's draw number `draw`."""
    epoch = draw // windows
    window = permute(draw - epoch * windows, windows, derive(source_key, epoch))
    # Offsets are permuted too: the borders differ in any seq_len epochs that follow each other.
    offset = permute(epoch % seq_len, seq_len, ~source_key)
    return epoch, window, window * seq_len + offset


@njit(
    "void(uint64[::1], uint64[::1], uint64[::1], uint64[:, ::1], uint64[:, ::1], uint64[::1], uint64[::1],"
    "uint64, uint64, int32[::1], int64[::1], int64[::1], int64[::1])",
    cache=True,
    nogil=True,
)
def locate(
    samples: np.ndarray,
    phase_starts: np.ndarray,
    phase_blocks: np.ndarray,
    prefixes: np.ndarray,
    carried: np.ndarray,
    windows: np.ndarray,
    source_keys: np.ndarray,
    block_key: np.uint64,
    seq_len: np.uint64,
    source: np.ndarray,
    epoch: np.ndarray,
    window: np.ndarray,
    start: np.ndarray,
) -> None:
    """Where each sample lies; fills the last four arguments.

    Args:
        samples: global sample numbers [n].
        phase_starts, phase_blocks: first sample and block size of each phase [p].
        prefixes: prefix sums of the integer weights [p, sources + 1].
        carried: draws of each source in earlier phases [p, sources].
        windows, source_keys: windows per epoch and key of each source [sources].
        block_key: key of the order inside blocks.
        seq_len: tokens per window.
        source, epoch, window, start: results [n]; `start` is the stream position of the window's first token.
    """
    sources = windows.shape[0]
    for n in range(samples.shape[0]):
        phase = phase_starts.shape[0] - 1
        while samples[n] < phase_starts[phase]:
            phase -= 1
        k = samples[n] - phase_starts[phase]
        block = phase_blocks[phase]
        lo = k - k % block
        hi = lo + block
        slot = permute(k - lo, block, derive(block_key, phase_starts[phase] + lo))
        # The first source whose cumulative quota in this block exceeds the slot.
        s = 0
        last = sources - 1
        while s < last:
            middle = (s + last) // 2
            prefix = prefixes[phase, middle + 1]
            if slot < share(hi, prefix) - share(lo, prefix):
                last = middle
            else:
                s = middle + 1
        below = share(lo, prefixes[phase, s])
        quotas_below = share(hi, prefixes[phase, s]) - below
        drawn = share(lo, prefixes[phase, s + 1]) - below
        draw = carried[phase, s] + drawn + slot - quotas_below
        source[n] = s
        epoch[n], window[n], start[n] = window_of_draw(draw, windows[s], source_keys[s], seq_len)
