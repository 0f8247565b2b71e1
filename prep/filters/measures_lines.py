"""Kernels for lines and paragraphs: copies of earlier ones, bullets, ellipses, short lines, line ends, lengths.

Three kinds of lines are in use, because the sources of the rules use them: `str.splitlines` (Gopher's bullets and
ellipses, code), runs of newlines (Gopher's repetition), and "\\n" alone (FineWeb, DCLM).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from prep.characters import LETTER, NUMBER, SPACE, UPPER, WORD, classes
from prep.filters.spans import (
    breaks,
    count_characters,
    cut_spaces,
    ends_in_dots,
    hash_span,
    insert,
    last_start,
    next_break,
    next_newline,
    skip_spaces,
    terminal,
)
from prep.words import decode

SHORT_LINE = 30  # characters, newline not counted (FineWeb)
_SPACE, _LETTER, _UPPER, _ALNUM = np.uint8(SPACE), np.uint8(LETTER), np.uint8(UPPER), np.uint8(LETTER | NUMBER)
_WORD, _BOTH = np.uint8(WORD), np.uint8(WORD | SPACE)


def characters(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Code points of each document, int64 [documents]."""
    found = np.zeros(len(offsets) - 1, np.int64)
    _characters(data, offsets, found)
    return found


def count_tokens(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Tokens of each document (see `prep.words`), int64 [documents], without their hashes."""
    found = np.zeros(len(offsets) - 1, np.int64)
    _count_tokens(data, offsets, classes(), found)
    return found


def count_words(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Tokens with a letter or number of each document, int64 [documents]."""
    found = np.zeros(len(offsets) - 1, np.int64)
    _count_words(data, offsets, classes(), found)
    return found


def copies(data: np.ndarray, offsets: np.ndarray, *, newlines: int, stripped: bool) -> dict[str, np.ndarray]:
    """Copies among the pieces between runs of at least `newlines` newlines; int64 [documents] each.

    Args:
        data: UTF-8.
        offsets: borders of the documents.
        newlines: 1 for lines, 2 for paragraphs.
        stripped: False as in datatrove: paragraphs are those of the stripped text, empty pieces count, and the first
            copy is free. True as in DCLM: pieces are stripped, blank ones are left out, all copies count.

    Returns:
        `pieces`, their `characters` (where `stripped`), `copies` and `copied_characters`.
    """
    found = np.zeros((4, len(offsets) - 1), np.int64)
    _copies(data, offsets, classes(), newlines, stripped, found)
    return dict(zip(("pieces", "characters", "copies", "copied_characters"), found, strict=True))


def edges(data: np.ndarray, offsets: np.ndarray, *, splitlines: bool) -> dict[str, np.ndarray]:
    """Lines that begin with a bullet or end in an ellipsis; int64 [documents] each: `lines`, `bullets`, `ellipses`.

    With `splitlines` all lines of `str.splitlines`, bullets • and -; else (DCLM) lines at "\\n" that are not blank,
    bullets ● • * and -, and ". . ." is an ellipsis too. White space at the ends of a line does not matter.
    """
    found = np.zeros((3, len(offsets) - 1), np.int64)
    _edges(data, offsets, classes(), breaks(), splitlines, found)
    return dict(zip(("lines", "bullets", "ellipses"), found, strict=True))


def plain_lines(data: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """FineWeb's counts over lines at "\\n" that are not blank; int64 [documents] each.

    `lines`, `terminal` (the last character ends a sentence), `short` (at most 30 characters), `copied_characters` (in
    lines equal to an earlier one), and `newlines`, all of them.
    """
    found = np.zeros((5, len(offsets) - 1), np.int64)
    _plain_lines(data, offsets, classes(), terminal(), found)
    return dict(zip(("lines", "terminal", "short", "copied_characters", "newlines"), found, strict=True))


def line_lengths(data: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """`lines` of `str.splitlines`, `characters` in all and in the `longest`; int64 [documents] each."""
    found = np.zeros((3, len(offsets) - 1), np.int64)
    _line_lengths(data, offsets, breaks(), found)
    return dict(zip(("lines", "characters", "longest"), found, strict=True))


def character_kinds(data: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Characters by class; int64 [documents] each: `letters`, `alphanumeric`, `upper`, `numbers`, `spaces`."""
    found = np.zeros((5, len(offsets) - 1), np.int64)
    _kinds(data, offsets, classes(), found)
    return dict(zip(("letters", "alphanumeric", "upper", "numbers", "spaces"), found, strict=True))


@njit(nogil=True, cache=True)
def _characters(data, offsets, found):
    for document in range(len(found)):
        found[document] = count_characters(data, offsets[document], offsets[document + 1])


@njit(nogil=True, cache=True)
def _count_tokens(data, offsets, table, found):
    for document in range(len(found)):
        tokens = np.int64(0)
        at, end = offsets[document], offsets[document + 1]
        previous, outside = np.int32(-1), np.int64(1)
        while at < end:
            code, size = np.int32(data[at]), 1
            if code >= 0x80:
                code, size = decode(data, at)
            bits = table[code]
            word = np.int64((bits & _WORD) != 0)  # numbers instead of branches: every third one would be guessed wrong
            symbol = np.int64((bits & _BOTH) == 0)
            tokens += (word & outside) + (symbol & np.int64(code != previous))
            outside, previous = 1 - word, code
            at += size
        found[document] = tokens


@njit(nogil=True, cache=True)
def _count_words(data, offsets, table, found):
    for document in range(len(found)):
        words = np.int64(0)
        at, end = offsets[document], offsets[document + 1]
        counted = False
        while at < end:
            code, size = decode(data, at)
            full = (table[code] & _ALNUM) != 0
            words += full and not counted
            counted = full or (counted and (table[code] & _WORD) != 0)
            at += size
        found[document] = words


@njit(nogil=True, cache=True)
def _copies(data, offsets, table, newlines, stripped, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        if newlines > 1 and not stripped:
            at = skip_spaces(data, at, end, table)
            end = cut_spaces(data, at, end, table)
        keys, used = np.zeros(64, np.uint64), 0
        pieces = total = copied = copied_characters = np.int64(0)
        more = True
        while more:
            a = b = at
            more = False
            while at < end and not more:  # find the end of the piece [a, b), and the start of the next one
                b = at = next_newline(data, at, end)
                while at < end and data[at] == 0x0A:
                    at += 1
                more = at - b >= newlines
            if not more:
                b = end
            if stripped:
                a = skip_spaces(data, a, b, table)
                b = cut_spaces(data, a, b, table)
                if a == b:
                    continue
            pieces += 1
            keys, used, known = insert(keys, used, hash_span(data, a, b))
            if stripped or known:
                size = count_characters(data, a, b)
                total += size
                if known:
                    both = 2 if stripped and known == 1 else 1
                    copied += both
                    copied_characters += both * size
        found[0, document] = pieces
        found[1, document] = total
        found[2, document] = copied
        found[3, document] = copied_characters


@njit(nogil=True, cache=True)
def _edge(data, a, b, table, splitlines, found, document):
    """Count one line."""
    a = skip_spaces(data, a, b, table)
    b = cut_spaces(data, a, b, table)
    if a == b:
        found[0, document] += splitlines
        return
    found[0, document] += 1
    first = data[a]
    if first == 0x2D or (first == 0x2A and not splitlines):
        found[1, document] += 1
    elif first == 0xE2:
        bullet = data[a + 1] == 0x80 and data[a + 2] == 0xA2
        bullet |= not splitlines and data[a + 1] == 0x97 and data[a + 2] == 0x8F
        found[1, document] += bullet
    if ends_in_dots(data, a, b):
        found[2, document] += 1
    elif not splitlines and b - a >= 5 and data[b - 1] == 0x2E and data[b - 3] == 0x2E and data[b - 5] == 0x2E:
        found[2, document] += data[b - 2] == 0x20 and data[b - 4] == 0x20


@njit(nogil=True, cache=True)
def _edges(data, offsets, table, stops, splitlines, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            if splitlines:
                b, size = next_break(data, at, end, stops)
            else:
                b, size = next_newline(data, at, end), 1
            _edge(data, at, b, table, splitlines, found, document)
            at = b + size


@njit(nogil=True, cache=True)
def _plain_lines(data, offsets, table, ends, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        keys, used = np.zeros(64, np.uint64), 0
        lines = terminals = short = copied = newlines = np.int64(0)
        while at < end:
            a = at
            b = at = next_newline(data, at, end)
            if at < end:
                newlines += 1
                at += 1
            if skip_spaces(data, a, b, table) == b:
                continue
            lines += 1
            last, _ = decode(data, last_start(data, a, b))
            terminals += ends[last]
            size = np.int64(-1)
            if b - a <= 4 * SHORT_LINE:
                size = count_characters(data, a, b)
                short += size <= SHORT_LINE
            keys, used, known = insert(keys, used, hash_span(data, a, b))
            if known:
                copied += size if size >= 0 else count_characters(data, a, b)
        found[0, document] = lines
        found[1, document] = terminals
        found[2, document] = short
        found[3, document] = copied
        found[4, document] = newlines


@njit(nogil=True, cache=True)
def _line_lengths(data, offsets, stops, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        lines = total = longest = np.int64(0)
        while at < end:
            b, skip = next_break(data, at, end, stops)
            size = count_characters(data, at, b)
            lines += 1
            total += size
            longest = max(longest, size)
            at = b + skip
        found[0, document] = lines
        found[1, document] = total
        found[2, document] = longest


@njit(nogil=True, cache=True)
def _kinds(data, offsets, table, found):
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        letters = alphanumeric = upper = spaces = np.int64(0)
        while at < end:
            code, size = decode(data, at)
            bits = table[code]
            letters += (bits & _LETTER) != 0
            alphanumeric += (bits & _ALNUM) != 0
            upper += (bits & _UPPER) != 0
            spaces += (bits & _SPACE) != 0
            at += size
        found[0, document] = letters
        found[1, document] = alphanumeric
        found[2, document] = upper
        found[3, document] = alphanumeric - letters
        found[4, document] = spaces
