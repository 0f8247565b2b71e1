"""Some ASCII phrases, found in any case while a kernel walks over bytes; each is tried at a rare letter of it only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from prep.filters.spans import same_letters

_RARITY = "zqjxkvbpygwfumcdhrlsnioate- "  # letters of English text, the rarest first


class Phrases(NamedTuple):
    """Up to 32 lower-case ASCII phrases.

    Attributes:
        anchors: for each byte the bits of the phrases that are tried there, uint32 [256].
        follows: for each byte the bits of the phrases in which it comes behind the anchor, uint32 [256].
        letters: all phrases, one behind the other.
        start, size, anchor: of each phrase; `anchor` is the place in it of the byte at which it is tried.
    """

    anchors: np.ndarray
    follows: np.ndarray
    letters: np.ndarray
    start: np.ndarray
    size: np.ndarray
    anchor: np.ndarray


def make_phrases(phrases: Sequence[str]) -> Phrases:
    """Tables for `phrases_at`."""
    anchors, follows = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    places = []
    for number, phrase in enumerate(phrases):
        rank = [_RARITY.find(letter) for letter in phrase]
        places.append(min((at for at in range(len(phrase) - 1) if rank[at] >= 0), key=lambda at: rank[at]))
        for table, letter in ((anchors, phrase[places[-1]]), (follows, phrase[places[-1] + 1])):
            for case in {ord(letter), ord(letter.upper())}:
                table[case] |= np.uint32(1 << number)
    sizes = [len(phrase) for phrase in phrases]
    return Phrases(
        anchors,
        follows,
        np.frombuffer("".join(phrases).encode("ascii"), np.uint8),
        np.cumsum([0, *sizes[:-1]]).astype(np.int64),
        np.array(sizes, np.int64),
        np.array(places, np.int64),
    )


@njit(nogil=True, cache=True)
def phrases_at(data, a, b, at, bits, phrases):
    """Which of the phrases `bits` stand in [a, b) with their anchor at byte `at`, as bits."""
    found = np.uint32(0)
    number = 0
    while bits:
        if bits & np.uint32(1):
            first = at - phrases.anchor[number]
            letters, size = phrases.letters[phrases.start[number] :], phrases.size[number]
            if first >= a and same_letters(data, first, b, letters, size):
                found |= np.uint32(1) << np.uint32(number)
        bits >>= np.uint32(1)
        number += 1
    return found


@njit(nogil=True, cache=True)
def find_phrases(data, a, b, phrases):
    """Bits of the phrases that stand in [a, b)."""
    found = np.uint32(0)
    for at in range(a, b - 1):
        bits = phrases.anchors[data[at]] & phrases.follows[data[at + 1]]
        if bits:
            found |= phrases_at(data, a, b, at, bits, phrases)
    return found
