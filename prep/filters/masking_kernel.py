"""One pass over the bytes of a batch that tells which documents may hold something to mask, and of which kind.

It may flag too much, never too little: `addresses` and `credentials` look at the flagged documents with care. A byte
that means nothing to the wanted kinds costs one look into a table.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numba import njit

from prep.words import text_buffers

EMAIL, IPV4, IPV6, PHONE, SECRET = 1, 2, 4, 8, 16
TRIGGERS = {EMAIL: "@", IPV4: ".", IPV6: ":", PHONE: "+-.)", SECRET: "AGJB_-./=:"}
_EMAIL, _IPV4, _IPV6 = np.uint8(EMAIL), np.uint8(IPV4), np.uint8(IPV6)
_PHONE, _SECRET = np.uint8(PHONE), np.uint8(SECRET)
_NOTHING = np.uint8(0)
_LOOK_BACK, _LOOK_AHEAD, _LONGEST_VALUE = 96, 8, 802  # bytes around an assignment's sign


def _word(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


_AWS = tuple(_word(name) for name in (b"AKIA", b"ASIA", b"ABIA", b"ACCA", b"AIza"))
_GITHUB_PAT, _GOOGLE_SECRET, _GOOGLE_TOKEN = _word(b"github_pat_"), _word(b"GOCSPX-"), _word(b"ya29.")
_WEBHOOK, _PEM = _word(b"/services/T"), _word(b"-----BEGIN ")
_NAMES = tuple(_word(name) for name in (b"passw", b"pwd", b"secret", b"token", b"key", b"auth", b"credential"))
_SECRET_KEY = (_word(b"key"), _word(b"secret"))


def find_hints(texts: pa.Array, kinds: int) -> np.ndarray:
    """Which kinds each document may hold.

    Args:
        texts: string [n].
        kinds: the bits to look for.

    Returns:
        uint8 [n], some of these bits.
    """
    data, offsets = text_buffers(texts)
    triggers = np.zeros(256, np.uint8)
    for kind, characters in TRIGGERS.items():
        for character in characters:
            triggers[ord(character)] |= kind & kinds
    return _find(data, offsets, triggers)


@njit(nogil=True, cache=True, inline="always")
def _digit(byte: int) -> bool:
    return 48 <= byte <= 57


@njit(nogil=True, cache=True, inline="always")
def _hex(byte: int) -> bool:
    return 48 <= byte <= 57 or 97 <= byte <= 102 or 65 <= byte <= 70


@njit(nogil=True, cache=True, inline="always")
def _part(byte: int) -> bool:
    """A letter, a digit, or a byte of a character beyond ASCII."""
    return 48 <= byte <= 57 or 97 <= byte <= 122 or 65 <= byte <= 90 or byte >= 128


@njit(nogil=True, cache=True)
def _equals(data: np.ndarray, at: int, end: int, word: np.ndarray) -> bool:
    if at + len(word) > end:
        return False
    index = 0
    while index < len(word) and data[at + index] == word[index]:
        index += 1
    return index == len(word)


@njit(nogil=True, cache=True)
def _contains(data: np.ndarray, begin: int, end: int, word: np.ndarray) -> bool:
    """Whether a word in lower case stands in a stretch of text, however it is written."""
    for at in range(begin, end - len(word) + 1):
        index = 0
        while index < len(word) and (data[at + index] | 32) == word[index]:
            index += 1
        if index == len(word):
            return True
    return False


@njit(nogil=True, cache=True)
def _count_digits(data: np.ndarray, at: int, end: int, most: int) -> int:
    count = 0
    while count < most and at + count < end and _digit(data[at + count]):
        count += 1
    return count


@njit(nogil=True, cache=True)
def _ipv4_at(data: np.ndarray, begin: int, end: int, at: int) -> bool:
    """Whether the point at `at` is the first of three between short numbers."""
    if at == begin or not _digit(data[at - 1]):
        return False
    for point in range(3):
        digits = _count_digits(data, at + 1, end, 3)
        if digits == 0:
            return False
        at += 1 + digits
        if point < 2 and (at >= end or data[at] != 46):
            return False
    return True


@njit(nogil=True, cache=True)
def _ipv6_at(data: np.ndarray, begin: int, end: int, at: int) -> bool:
    """Whether the colon at `at` stands behind a first group of 2000::/3, and another one soon behind it."""
    if at - 4 < begin or at + 2 >= end or not 50 <= data[at - 4] <= 51:
        return False
    if not (_hex(data[at - 3]) and _hex(data[at - 2]) and _hex(data[at - 1])):
        return False
    for after in range(at + 1, min(at + 6, end)):
        if data[after] == 58:
            return True
        if not _hex(data[after]):
            return False
    return False


@njit(nogil=True, cache=True)
def _phone_at(data: np.ndarray, begin: int, end: int, at: int) -> bool:
    if data[at] == 43:
        return at + 1 < end and _digit(data[at + 1])
    if at - 3 < begin or not (_digit(data[at - 1]) and _digit(data[at - 2]) and _digit(data[at - 3])):
        return False
    if data[at] == 41:
        return at - 4 >= begin and data[at - 4] == 40 and at + 1 < end
    if _count_digits(data, at + 1, end, 4) != 3:
        return False
    return at + 4 < end and data[at + 4] == data[at] and _count_digits(data, at + 5, end, 4) == 4


@njit(nogil=True, cache=True)
def _secret_at(data: np.ndarray, begin: int, end: int, at: int) -> bool:
    byte = data[at]
    if byte == 65:
        found = False
        for word in _AWS:
            found |= _equals(data, at, end, word)
        return found
    if byte == 71:
        return _equals(data, at, end, _GOOGLE_SECRET)
    if byte == 74:  # eyJ
        return at - 2 >= begin and data[at - 1] == 121 and data[at - 2] == 101
    if byte == 66:
        return at - 5 >= begin and _equals(data, at - 5, end, _PEM)
    if byte == 95:  # gh?_ and github_pat_
        if at - 3 >= begin and data[at - 3] == 103 and data[at - 2] == 104:
            return True
        return at - 10 >= begin and _equals(data, at - 10, end, _GITHUB_PAT)
    if byte == 45:  # sk- and xox?-
        if at - 2 >= begin and data[at - 2] == 115 and data[at - 1] == 107:
            return True
        return at - 4 >= begin and data[at - 4] == 120 and data[at - 3] == 111 and data[at - 2] == 120
    if byte == 46:
        return at - 4 >= begin and _equals(data, at - 4, end, _GOOGLE_TOKEN)
    if byte == 47:
        return _equals(data, at, end, _WEBHOOK)
    return _assignment_at(data, begin, end, at)


@njit(nogil=True, cache=True)
def _assignment_at(data: np.ndarray, begin: int, end: int, at: int) -> bool:
    """Whether the sign at `at` assigns a string in quotes to a name of a secret, or anything to a secret key."""
    first = max(at - _LOOK_BACK, begin)
    after = at + 1
    while after < min(at + _LOOK_AHEAD, end) and (data[after] <= 32 or data[after] == 61 or data[after] == 62):
        after += 1
    if after < end and (data[after] == 34 or data[after] == 39 or data[after] == 96):
        if not _value_at(data, after, end):
            return False
        found = False
        for name in _NAMES:
            found |= _contains(data, first, at, name)
        return found
    return _contains(data, max(at - 12, begin), at, _SECRET_KEY[0]) and _contains(data, first, at, _SECRET_KEY[1])


@njit(nogil=True, cache=True)
def _value_at(data: np.ndarray, quote: int, end: int) -> bool:
    """Whether the quote at `quote` opens a string of 8 bytes or more with a digit and without white space."""
    digits = 0
    for at in range(quote + 1, min(quote + _LONGEST_VALUE, end)):
        byte = data[at]
        if byte == data[quote]:
            return at - quote > 8 and digits > 0
        if byte == 32 or 9 <= byte <= 13 or byte == 34 or byte == 39 or byte == 96:
            return False
        digits += _digit(byte)
    return False


@njit(nogil=True, cache=True)
def _find(data: np.ndarray, offsets: np.ndarray, triggers: np.ndarray) -> np.ndarray:
    documents = len(offsets) - 1
    hints = np.zeros(documents, np.uint8)
    for document in range(documents):
        begin, end = offsets[document], offsets[document + 1]
        found = _NOTHING
        for at in range(begin, end):
            kinds = triggers[data[at]]
            if kinds == _NOTHING:
                continue
            kinds &= ~found
            if kinds & _EMAIL and begin < at < end - 1:
                before, after = data[at - 1], data[at + 1]
                if (_part(before) or before in (37, 43, 45, 95)) and (_part(after) or after == 91):
                    found |= _EMAIL
            if kinds & _IPV4 and _ipv4_at(data, begin, end, at):
                found |= _IPV4
            if kinds & _IPV6 and _ipv6_at(data, begin, end, at):
                found |= _IPV6
            if kinds & _PHONE and _phone_at(data, begin, end, at):
                found |= _PHONE
            if kinds & _SECRET and _secret_at(data, begin, end, at):
                found |= _SECRET
        hints[document] = found
    return hints
