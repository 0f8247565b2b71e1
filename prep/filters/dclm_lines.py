"""Kernel of DCLM's line cleaning (RefinedWeb's rules on lines, as DCLM writes them down)."""

from __future__ import annotations

import numpy as np
from numba import njit

from prep.characters import NUMBER, SPACE, UPPER, WORD
from prep.filters.spans import cut_spaces, last_start, same_letters, skip_spaces
from prep.words import decode

COUNTS = ("lines", "lines.upper_case", "lines.numbers", "lines.counters", "lines.words", "lines.phrase", "phrases")
_COUNTED = "likes shares comments retweets reposts quotes bookmarks upvotes downvotes downloads views followers"
_NOUNS = _COUNTED.split()
_LETTERS = np.zeros((len(_NOUNS), 16), np.uint8)
for _number, _noun in enumerate(_NOUNS):
    _LETTERS[_number, : len(_noun)] = list(_noun.encode("ascii"))
NOUNS = (_LETTERS, np.array([len(noun) for noun in _NOUNS], np.int64))
_CART, _MORE, _SIGN = (np.frombuffer(text, np.uint8) for text in (b"items in cart", b"read more...", b"sign-in"))
_SPACE, _UPPER, _NUMBER, _WORD = np.uint8(SPACE), np.uint8(UPPER), np.uint8(NUMBER), np.uint8(WORD)


@njit(nogil=True, cache=True)
def _is_counter(data, a, b, table, nouns, sizes):
    """Whether a line is a counter, such as "3 likes" or "1.2K views", with anything but words around it."""
    while a < b:
        code, size = decode(data, a)
        if table[code] & _WORD:
            break
        a += size
    if a == b or not 0x30 <= data[a] <= 0x39:
        return False
    while a < b and (0x30 <= data[a] <= 0x39 or data[a] == 0x2C or data[a] == 0x2E):
        a += 1
    if a < b and (data[a] | 0x20) in (0x6B, 0x6D, 0x62):
        a += 1
    noun = skip_spaces(data, a, b, table)
    if noun == a:
        return False
    for number in range(len(sizes)):
        if same_letters(data, noun, b, nouns[number], sizes[number]):
            a = noun + sizes[number]
            while a < b:
                code, size = decode(data, a)
                if table[code] & _WORD:
                    return False
                a += size
            return True
    return False


@njit(nogil=True, cache=True)
def _remove(data, a, b, table, limits, words):
    """Remove phrases from the line [a, b) in place, as far as its number of words allows; its end and how many."""
    removed = 0
    if words <= limits[4]:  # "items in cart", with the white space in front of it
        at = to = a
        while at < b:
            if same_letters(data, at, b, _CART, len(_CART)):
                if to > a:
                    last = last_start(data, a, to)
                    code, _ = decode(data, last)
                    to = last if table[code] & _SPACE else to
                at += len(_CART)
                removed += 1
            else:
                data[to] = data[at]
                to += 1
                at += 1
        b = to
    if words <= limits[5] and b - a >= len(_MORE) and same_letters(data, b - len(_MORE), b, _MORE, len(_MORE)):
        b -= len(_MORE)
        removed += 1
        if b > a:
            last = last_start(data, a, b)
            code, _ = decode(data, last)
            b = last if table[code] & _SPACE else b
    if words <= limits[6] and same_letters(data, a, b, _SIGN, len(_SIGN)):
        at = a + len(_SIGN)
        removed += 1
        if at < b:
            code, size = decode(data, at)
            at += size if table[code] & _SPACE else 0
        for number in range(b - at):
            data[a + number] = data[at + number]
        b = a + b - at
    return b, removed


@njit(nogil=True, cache=True)
def clean(data, offsets, limits, counters, table, nouns, sizes, out, ends, found):
    """Write the kept lines of each document and count; see `prep.filters.lines.clean_dclm`."""
    for document in range(found.shape[1]):
        end = offsets[document + 1]
        at = skip_spaces(data, offsets[document], end, table)
        end = cut_spaces(data, at, end, table)
        begin = to = ends[document]
        run = 0  # newlines in a row
        while at < end:
            a = at
            total = upper = numbers = words = np.int64(0)
            inside = False
            while at < end and data[at] != 0x0A:
                code, size = decode(data, at)
                bits = table[code]
                total += 1
                upper += (bits & _UPPER) != 0
                numbers += (bits & _NUMBER) != 0
                space = (bits & _SPACE) != 0
                words += inside and space
                inside = not space
                at += size
            words += inside
            b = at
            at += 1
            if a == b:
                run += 1
                if run <= limits[0] and to > begin:
                    out[to] = 0x0A
                    to += 1
                continue
            run = 1
            found[0, document] += 1
            if upper > limits[1] * total:
                found[1, document] += 1
            elif numbers > limits[2] * total:
                found[2, document] += 1
            elif counters and _is_counter(data, a, b, table, nouns, sizes):
                found[3, document] += 1
            elif words < limits[3]:
                found[4, document] += 1
            else:
                out[to : to + b - a] = data[a:b]
                last, removed = _remove(out, to, to + b - a, table, limits, words)
                found[6, document] += removed
                if removed and skip_spaces(out, to, last, table) == last:
                    found[5, document] += 1
                    continue
                out[last] = 0x0A
                to = last + 1
        a = skip_spaces(out, begin, to, table)
        b = cut_spaces(out, a, to, table)
        if a > begin:
            for number in range(b - a):
                out[begin + number] = out[a + number]
        ends[document + 1] = begin + b - a
