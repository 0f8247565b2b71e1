"""Kernel of C4's line cleaning: one walk over the bytes of each line."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from prep.characters import LETTER, PUNCTUATION, SPACE, UPPER, WORD, classes
from prep.filters.phrases import make_phrases, phrases_at
from prep.filters.spans import cut_spaces, last_start, next_break, skip_spaces
from prep.words import decode

COUNTS = (
    "lorem_ipsum",
    "curly_brackets",
    "sentences",
    "lines",
    "lines.word_length",
    "lines.end",
    "lines.words",
    "lines.javascript",
    "lines.policy",
    "citations",
)
PHRASES = make_phrases(
    (
        "lorem ipsum",
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
)
_CURLY, _SQUARE = np.uint32(1 << 30), np.uint32(1 << 31)
_LOREM, _JAVASCRIPT, _POLICY = np.uint32(1), np.uint32(2), np.uint32(0b11111100)
# A full stop behind one of these does not end a sentence.
_WORDS = """adm apr aug bros co corp dec dr feb gen gov inc jan jr jul jun ltd mar messrs mr mrs ms nov oct prof rep rev
sen sep sept sr st vs"""
ABBREVIATIONS = np.array(sorted(int.from_bytes(word.encode("ascii"), "big") for word in _WORDS.split()), np.uint64)
_SPACE, _LETTER, _UPPER, _WORD = np.uint8(SPACE), np.uint8(LETTER), np.uint8(UPPER), np.uint8(WORD)
_PUNCTUATION = np.uint8(PUNCTUATION)
_EDIT, _NEEDED = np.frombuffer(b"[edit]", np.uint8), np.frombuffer(b"[citation needed]", np.uint8)


@lru_cache(maxsize=1)
def scan_table() -> np.ndarray:
    """What a byte is to the kernel, in bits: 2 the anchor of a phrase, 4 ASCII punctuation, or the first byte of a
    character that is not ASCII."""
    table = np.zeros(256, np.uint8)
    table[np.flatnonzero(PHRASES.anchors)] = 2
    table[0xC2:] |= 4
    table[:128][classes()[:128] & PUNCTUATION != 0] |= 4
    return table


@njit(nogil=True, cache=True)
def _has_words(data, a, b, fewest, table):
    """Whether [a, b) has at least so many words."""
    words, inside = 0, False
    while a < b and words < fewest:
        code, size = decode(data, a)
        space = (table[code] & _SPACE) != 0
        words += not (space or inside)
        inside = not space
        a += size
    return words >= fewest


@njit(nogil=True, cache=True)
def _has_longer_word(data, a, b, longest, table):
    """Whether a word of [a, b) has more characters than `longest`.

    It would have more bytes than that, so wherever white space stands within so many bytes, none begins before it:
    most bytes are never looked at.
    """
    while b - a > longest:
        at, space = a + longest + 1, False
        while at > a and not space:
            at = last_start(data, a, at)
            code, size = decode(data, at)
            space = (table[code] & _SPACE) != 0
        if space:
            a = at + size
            continue
        characters = np.int64(0)  # bytes enough: count the characters of this word
        while a < b:
            code, size = decode(data, a)
            a += size
            if table[code] & _SPACE:
                break
            characters += 1
        if characters > longest:
            return True
    return False


@njit(nogil=True, cache=True)
def _equal(data, at, b, text):
    if b - at < len(text):
        return False
    equal = True
    for number in range(len(text)):
        equal &= data[at + number] == text[number]
    return equal


@njit(nogil=True, cache=True)
def _citation(data, at, b):
    """Bytes of the citation at a "[": [12], [], [edit], [citation needed]; 0 if it is none."""
    end = at + 1
    while end < b:
        byte = data[end]
        if byte == 0x5D:
            return end + 1 - at
        if not 0x30 <= byte <= 0x39:
            break
        end += 1
    if _equal(data, at, b, _EDIT):
        return len(_EDIT)
    return len(_NEEDED) if _equal(data, at, b, _NEEDED) else 0


@njit(nogil=True, cache=True)
def _without_citations(data, a, b, out, begin):
    """Copy [a, b) to out[begin:] without citations; the end of the copy and how many there were."""
    at, removed = begin, 0
    while a < b:
        size = _citation(data, a, b) if data[a] == 0x5B else 0
        if size:
            removed += 1
            a += size
        else:
            out[at] = data[a]
            at += 1
            a += 1
    return at, removed


@njit(nogil=True, cache=True)
def _abbreviated(data, a, at, table, abbreviations):
    """Whether the full stop at a byte stands behind a single letter or an abbreviation."""
    first, value, letters = at, np.uint64(0), 0
    while first > a:
        before = last_start(data, a, first)
        code, _ = decode(data, before)
        if not table[code] & _WORD:
            break
        if not table[code] & _LETTER or letters == 7:
            return False
        letters += 1
        sign = np.uint64(code | 0x20 if code < 0x80 else 0x80)  # 0x80: no abbreviation has such a letter
        value |= sign << np.uint64(8 * (letters - 1))
        first = before
    if letters <= 1:
        return letters == 1
    place = np.searchsorted(abbreviations, value)
    return place < len(abbreviations) and abbreviations[place] == value


@njit(nogil=True, cache=True)
def _look(data, a, b, table, stops, ends, abbreviations, phrases):
    """Bits of the phrases and brackets in a line, and its sentences, at least one; docs/FILTERS.md defines them."""
    found, sentences, ended = np.uint32(0), np.int64(1), False
    at = a
    while at < b:
        if not ended:
            while at < b and not stops[data[at]]:
                at += 1
            if at == b:
                break
        byte = data[at]
        if stops[byte] & 2 and at + 1 < b:
            hit = phrases.anchors[byte] & phrases.follows[data[at + 1]]
            if hit:
                found |= phrases_at(data, a, b, at, hit, phrases)
        code, size = decode(data, at)
        bits = table[code]
        if not (bits & _PUNCTUATION or ends[code]):
            if ended and not bits & _SPACE:
                sentences += 1
                ended = False
            at += size
            continue
        close, stop = at, False  # a run of punctuation up to `close`, and whether a character in it ends a sentence
        while close < b:
            code, size = decode(data, close)
            if code == 0x2E:
                while close + size < b and data[close + size] == 0x2E:
                    size += 1
                stop |= size == 1 and not (close == at and _abbreviated(data, a, at, table, abbreviations))
            elif ends[code]:
                stop = True
            elif not table[code] & _PUNCTUATION:
                break
            elif code == 0x7B:
                found |= _CURLY
            elif code == 0x5B:
                found |= _SQUARE
            close += size
        if stop and close < b:
            code, _ = decode(data, close)
            if table[code] & _SPACE:
                ended = True
            elif data[at] == 0x2E and close == at + 1 and at > a and table[code] & _UPPER:
                left, _ = decode(data, last_start(data, a, at))
                ended |= (table[left] & (_LETTER | _UPPER)) == _LETTER
        at = close
    return found, sentences


@njit(nogil=True, cache=True)
def clean(
    data,
    offsets,
    limits,
    switches,
    table,
    line_breaks,
    ends_sentence,
    stops,
    marks,
    abbreviations,
    phrases,
    out,
    ends,
    found,
):
    """Write the kept lines of each document, joined by newlines, and count; see `prep.filters.lines.clean_c4`."""
    longest, fewest = limits[0], limits[1]
    citations, need_end, no_javascript, no_policy, count_after = switches
    for document in range(found.shape[1]):
        at, end = offsets[document], offsets[document + 1]
        begin = to = ends[document]
        while at < end:
            found[3, document] += 1
            b, skip = next_break(data, at, end, line_breaks)
            a = skip_spaces(data, at, b, table)
            at = b + skip
            b = cut_spaces(data, a, b, table)
            if a == b:
                found[5 if need_end else 6, document] += need_end or fewest > 0
                continue
            if b - a > longest and _has_longer_word(data, a, b, longest, table):
                found[4, document] += 1
                continue
            bits, sentences = _look(data, a, b, table, stops, ends_sentence, abbreviations, phrases)
            enough = _has_words(data, a, b, fewest, table)
            first = to + (to > begin)  # behind a newline
            removed = 0
            if citations and bits & _SQUARE:
                last, removed = _without_citations(data, a, b, out, first)
            if removed:
                found[9, document] += removed
                bits, sentences = _look(out, first, last, table, stops, ends_sentence, abbreviations, phrases)
                if count_after:
                    enough = _has_words(out, first, last, fewest, table)
            else:
                last = first + b - a
                for number in range(b - a):
                    out[first + number] = data[a + number]
            if need_end and (
                last == first
                or not marks[out[last - 1]]
                or (last - first >= 3 and out[last - 1] == 0x2E and out[last - 2] == 0x2E and out[last - 3] == 0x2E)
            ):
                found[5, document] += 1
            elif not enough:
                found[6, document] += 1
            elif bits & _LOREM:
                found[0, document] += 1
            elif no_javascript and bits & _JAVASCRIPT:
                found[7, document] += 1
            elif bits & _CURLY:
                found[1, document] += 1
            elif no_policy and bits & _POLICY:
                found[8, document] += 1
            else:
                found[2, document] += sentences
                if to > begin:
                    out[to] = 0x0A
                to = last
        a = skip_spaces(out, begin, to, table)
        b = cut_spaces(out, a, to, table)
        if a > begin:
            for number in range(b - a):
                out[begin + number] = out[a + number]
        ends[document + 1] = begin + b - a
