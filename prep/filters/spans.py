"""Small kernels over a span [a, b) of UTF-8 bytes, which the kernels of this folder are built from.

Numba's cache does not see that a function called from another file has changed: after an edit here, delete
`prep/filters/__pycache__`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from prep.characters import SPACE
from prep.words import decode, mix

# Characters that end a sentence: Unicode's property Sentence_Terminal, as far as FineWeb's list (datatrove 0.10,
# `utils/text.py`, TERMINAL_PUNCTUATION) has it. "..." ends with one of them, "…" and closing quotes do not.
_TERMINAL = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6
17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E
2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52
FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6
111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944
11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16E98 1BC9F
1DA88
"""
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_SPACE = np.uint8(SPACE)
_ONES, _HIGH = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_NEWLINES, _BLANKS = np.uint64(0x0A0A0A0A0A0A0A0A), np.uint64(0x2020202020202020)


@lru_cache(maxsize=1)
def terminal() -> np.ndarray:
    """Which code points end a sentence, uint8 [0x110000]."""
    found = np.zeros(0x110000, np.uint8)
    for run in _TERMINAL.split():
        first, _, last = run.partition("-")
        found[int(first, 16) : int(last or first, 16) + 1] = 1
    return found


@lru_cache(maxsize=1)
def breaks() -> np.ndarray:
    """Bytes with which a line break of `str.splitlines` may begin, uint8 [256]."""
    found = np.zeros(256, np.uint8)
    found[[0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x1D, 0x1E, 0xC2, 0xE2]] = 1
    return found


@intrinsic
def load_eight(context: Any, data: Any, at: Any) -> Any:
    """Eight bytes of a uint8 array from position `at` on as one uint64: numba itself would load them one by one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind = context.get_value_type(types.uint64)
        address = builder.gep(array.data, [arguments[1]])
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)

    return types.uint64(data, at), generate


@njit(nogil=True, cache=True)
def next_newline(data, at, end):
    """The first newline in [at, end), or end; eight bytes at a time."""
    while at + 8 <= end:
        word = load_eight(data, at) ^ _NEWLINES
        if (word - _ONES) & ~word & _HIGH:
            break
        at += 8
    while at < end and data[at] != 0x0A:
        at += 1
    return at


@njit(nogil=True, cache=True)
def next_break(data, at, end, stops):
    """The first line break of `str.splitlines` in [at, end), or end; and its bytes. `stops` is `breaks()`."""
    while at < end:
        if at + 8 <= end:
            word = load_eight(data, at)  # printable ASCII only: none of them is a break
            if not ((word - _BLANKS) | word) & _HIGH:
                at += 8
                continue
        for _ in range(min(8, end - at)):
            if stops[data[at]]:
                size = break_size(data, at, end)
                if size:
                    return at, size
            at += 1
    return end, 0


@njit(nogil=True, cache=True)
def break_size(data, at, end):
    """Bytes of the line break (of `str.splitlines`) at a byte for which `breaks` holds; 0: none."""
    byte = data[at]
    if byte == 0x0D:
        return 2 if at + 1 < end and data[at + 1] == 0x0A else 1
    if byte == 0xC2:
        return 2 if data[at + 1] == 0x85 else 0
    if byte == 0xE2:
        return 3 if data[at + 1] == 0x80 and (data[at + 2] == 0xA8 or data[at + 2] == 0xA9) else 0
    return 1


@njit(nogil=True, cache=True)
def skip_spaces(data, a, b, table):
    """First byte in [a, b) that is not part of white space, or b."""
    while a < b:
        code, size = decode(data, a)
        if not table[code] & _SPACE:
            return a
        a += size
    return a


@njit(nogil=True, cache=True)
def last_start(data, a, b):
    """First byte of the last character in [a, b), which is not empty."""
    at = b - 1
    while at > a and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


@njit(nogil=True, cache=True)
def cut_spaces(data, a, b, table):
    """The end of [a, b) without the white space at its end."""
    while b > a:
        at = last_start(data, a, b)
        code, _ = decode(data, at)
        if not table[code] & _SPACE:
            return b
        b = at
    return b


@njit(nogil=True, cache=True)
def count_characters(data, a, b):
    """Code points in [a, b)."""
    number = np.int64(0)
    for at in range(a, b):
        number += (data[at] & 0xC0) != 0x80
    return number


@njit(nogil=True, cache=True)
def hash_span(data, a, b):
    """A 64-bit hash of the bytes in [a, b), eight at a time."""
    value = np.uint64(b - a) * _FACTOR
    at = a
    while at + 8 <= b:
        value = (value ^ load_eight(data, at)) * _FACTOR
        value ^= value >> _SHIFT
        at += 8
    word = np.uint64(0)
    shift = np.uint64(0)
    while at < b:
        word |= np.uint64(data[at]) << shift
        shift += np.uint64(8)
        at += 1
    return mix((value ^ word) * _FACTOR)


@njit(nogil=True, cache=True)
def ends_in_dots(data, a, b):
    """Whether [a, b) ends in "..." or "…"."""
    if b - a < 3:
        return False
    if data[b - 1] == 0x2E:
        return data[b - 2] == 0x2E and data[b - 3] == 0x2E
    return data[b - 1] == 0xA6 and data[b - 2] == 0x80 and data[b - 3] == 0xE2


@njit(nogil=True, cache=True)
def same_letters(data, a, b, phrase, size):
    """Whether [a, b) begins with a phrase of `size` lower-case ASCII bytes, whatever the case of its ASCII letters."""
    if b - a < size:
        return False
    for number in range(size):
        byte = data[a + number]
        if 0x41 <= byte <= 0x5A:
            byte |= 0x20
        if byte != phrase[number]:
            return False
    return True


@njit(nogil=True, cache=True)
def insert(table, used, key):
    """Look up a key in an open-addressing table of uint64 (0: free) that has a power of two of places, and add it.

    Bit 0 of an entry says whether its key came more than once.

    Returns:
        The table, which grows beyond half full; how many keys it holds; and whether the key was there: 0, 1 for the
        second time, 2 for later ones.
    """
    even = key & ~np.uint64(1)
    if even == 0:
        even = np.uint64(2)
    mask = np.uint64(len(table) - 1)
    place = (even >> np.uint64(1)) & mask
    while table[place] != 0:
        if table[place] & ~np.uint64(1) == even:
            known = 2 if table[place] & np.uint64(1) else 1
            table[place] |= np.uint64(1)
            return table, used, known
        place = (place + np.uint64(1)) & mask
    table[place] = even
    used += 1
    if 2 * used > len(table):
        larger = np.zeros(2 * len(table), np.uint64)
        mask = np.uint64(len(larger) - 1)
        for entry in table:
            if entry:
                place = (entry >> np.uint64(1)) & mask
                while larger[place] != 0:
                    place = (place + np.uint64(1)) & mask
                larger[place] = entry
        table = larger
    return table, used, 0
