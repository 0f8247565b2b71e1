"""The arithmetic of the order against plain Python integers, and the quality of the permutation."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_order import mix, permute, share

from shards import permutation

WORD = st.integers(0, 2**64 - 1)


def call(kernel, *numbers: int) -> int:
    return int(kernel(*(np.uint64(number) for number in numbers)))


def test_mix_is_the_finaliser_of_splitmix64():
    """First outputs of splitmix64 from seed 0, as published with its C code."""
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [call(permutation.mix, golden * n % 2**64) for n in (1, 2, 3)] == expected


@given(WORD)
def test_mix_equals_reference(x):
    assert call(permutation.mix, x) == mix(x)


@given(st.integers(0, 2**63), st.integers(0, 2**32))
def test_share_is_exact_beyond_64_bit_products(k, prefix):
    assert call(permutation.share, k, prefix) == share(k, prefix) == k * prefix // 2**32


@given(st.data(), st.one_of(st.integers(1, 100), st.integers(1, 2**45)), WORD)
def test_permute_equals_reference(data, size, key):
    index = data.draw(st.integers(0, size - 1))
    image = call(permutation.permute, index, size, key)
    assert image == permute(index, size, key)
    assert 0 <= image < size


@settings(max_examples=60)
@given(st.integers(1, 3000), WORD)
def test_permute_is_a_bijection(size, key):
    assert sorted(call(permutation.permute, index, size, key) for index in range(size)) == list(range(size))


def chi_square_z(counts: list[int], outcomes: int) -> float:
    """Chi-square of equal frequencies over `outcomes` cells, as standard deviations above its mean."""
    expected = sum(counts) / outcomes
    statistic = sum((count - expected) ** 2 for count in counts) / expected + (outcomes - len(counts)) * expected
    return (statistic - (outcomes - 1)) / math.sqrt(2 * (outcomes - 1))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_give_all_permutations_equally_often(size):
    keys = 200 * math.factorial(size)
    seen = Counter(
        tuple(call(permutation.permute, index, size, mix(key)) for index in range(size)) for key in range(keys)
    )
    assert set(seen) == set(itertools.permutations(range(size)))
    assert chi_square_z(list(seen.values()), math.factorial(size)) < 5


@pytest.mark.parametrize("size", [6, 16, 33, 64, 100])
def test_neighbours_part_and_places_are_even(size):
    """Every element lands everywhere equally often, and so do the differences between images of neighbours."""
    places: Counter[tuple[int, int]] = Counter()
    steps: Counter[int] = Counter()
    for key in range(40_000 // size):
        images = [call(permutation.permute, index, size, mix(key + 10**6)) for index in range(size)]
        places.update(enumerate(images))
        steps.update((b - a) % size for a, b in itertools.pairwise(images))
    assert chi_square_z(list(places.values()), size * size) < 5
    assert chi_square_z(list(steps.values()), size - 1) < 5


def test_no_serial_correlation_in_a_large_domain():
    size, key = 244_140_625, mix(7)
    images = np.array([call(permutation.permute, index, size, key) for index in range(20_000)], float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(images, np.arange(20_000))[0, 1]) < 0.03
