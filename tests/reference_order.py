"""The order of a mixture once more, in plain Python integers and the most direct way: the oracle of the tests."""

from __future__ import annotations

import json
from fractions import Fraction

import xxhash

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def permute(index: int, size: int, key: int) -> int:
    """Feistel network over the smallest power of two >= size (at least 4), walked until the image is below size."""
    bits = max(2, (size - 1).bit_length())
    right_bits = bits // 2
    left_bits = bits - right_bits
    rounds = 32 if size <= 32 else 8
    while True:
        left, right = divmod(index, 2**right_bits)
        for number in range(rounds):
            if number % 2 == 0:
                left ^= mix((right + key + number * GOLDEN) & MASK) % 2**left_bits
            else:
                right ^= mix((left + key + number * GOLDEN) & MASK) % 2**right_bits
        index = left * 2**right_bits + right
        if index < size:
            return index


def share(k: int, prefix: int) -> int:
    return k * prefix // 2**32


def integer_weights(weights: list[float]) -> list[int]:
    """Largest remainder: floors of the exact quotas, then one more for the largest remainders."""
    numbers = [Fraction(str(weight)) for weight in weights]
    quotas = [number / sum(numbers) * 2**32 for number in numbers]
    result = [int(quota) for quota in quotas]
    while sum(result) < 2**32:
        index = max(range(len(quotas)), key=lambda i: (quotas[i] - result[i], -i))
        result[index] += 1
    return result


def key_of(*parts: object) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(parts).encode())


def derive(key: int, number: int) -> int:
    return mix((key + mix((number + GOLDEN) & MASK)) & MASK)


class ReferenceOrder:
    """Every sample in turn, from the definition.

    Args:
        seed, seq_len: of the plan.
        sources: (name, windows) of each source.
        phases: (sample from which the phase is asked for, weights of all sources), the first from 0.
    """

    def __init__(self, seed: int, seq_len: int, sources: list[tuple[str, int]], phases: list[tuple[int, list[float]]]):
        self.seed, self.seq_len, self.sources, self.phases = seed, seq_len, sources, phases

    def samples(self, stop: int) -> list[tuple[int, int, int, int]]:
        """(source, epoch, window, start) of samples 0 … stop - 1."""
        result: list[tuple[int, int, int, int]] = []
        drawn = [0] * len(self.sources)
        for number, (_, weights) in enumerate(self.phases):
            asked_end = self.phases[number + 1][0] if number + 1 < len(self.phases) else None
            integers = integer_weights(weights)
            block = max(64, -(-(2**32) // min(weight for weight in integers if weight)))
            lo, phase_start = 0, len(result)
            while (len(result) < asked_end) if asked_end is not None else (len(result) < stop):
                members: list[tuple[int, int]] = []  # (source, draw) of the block's slots, source by source
                for index, weight in enumerate(integers):
                    before = sum(integers[:index])
                    at_lo, at_hi = (share(k, before + weight) - share(k, before) for k in (lo, lo + block))
                    assert at_hi >= at_lo
                    members += [(index, drawn[index] + j) for j in range(at_hi - at_lo)]
                    drawn[index] += at_hi - at_lo
                assert len(members) == block
                key = derive(key_of(self.seed, "blocks"), phase_start + lo)
                result += [self.place(*members[permute(t, block, key)]) for t in range(block)]
                lo += block
        return result[:stop]

    def place(self, source: int, draw: int) -> tuple[int, int, int, int]:
        name, windows = self.sources[source]
        key = key_of(self.seed, "windows", name)
        epoch, i = divmod(draw, windows)
        window = permute(i, windows, derive(key, epoch))
        offset = permute(epoch % self.seq_len, self.seq_len, key ^ MASK)
        return source, epoch, window, window * self.seq_len + offset
