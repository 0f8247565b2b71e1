"""Kernels for what the tokens of a document tell: how many words, how long, how many symbols, letters, stop words."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from prep.characters import LETTER, NUMBER, WORD
from prep.words import Words, hash_word

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # Gopher (Rae et al. 2021), A.1.1
_LETTER, _WORD, _ALNUM = np.uint8(LETTER), np.uint8(WORD), np.uint8(LETTER | NUMBER)
_SIX = np.uint64(63)


@lru_cache(maxsize=1)
def _stop_table() -> tuple[np.ndarray, np.uint64]:
    """Hashes of the stop words, each at the place that six of its bits name, and where in the hash these bits begin."""
    hashes = [hash_word(word) for word in STOP_WORDS]
    shift = next(shift for shift in range(58) if len({hashed >> shift & 63 for hashed in hashes}) == len(hashes))
    table = np.zeros(64, np.uint64)
    for hashed in hashes:
        table[hashed >> shift & 63] = hashed
    return table, np.uint64(shift)


def token_counts(data: np.ndarray, words: Words) -> dict[str, np.ndarray]:
    """Counts over all tokens of each document, int64 [documents] each.

    `tokens`, `words` (tokens with a letter or number) and `word_characters` in them, `hashes` ("#"), `dots` ("..." and
    "…"), `stop_words` (different ones, as they are written), `joined` tokens and the `alphabetic` among them (with a
    letter). Joining makes "don't" two tokens, and "U.S", "3.5", "1,000" one each, as spaCy does: an apostrophe that
    touches a word on either side is not counted; so is a full stop, or between numbers a comma, and the word behind
    them belongs to the one before.
    """
    names = ("words", "word_characters", "hashes", "dots", "stop_words", "alphabetic", "joined")
    found = np.zeros((len(names), len(words.offsets) - 1), np.int64)
    _tokens(
        data, words.offsets, words.start, words.stop, words.characters, words.kind, words.hash, *_stop_table(), found
    )
    return {"tokens": np.diff(words.offsets), **dict(zip(names, found, strict=True))}


def chunk_counts(data: np.ndarray, words: Words) -> dict[str, np.ndarray]:
    """Counts over the chunks between white space (what `str.split` gives), int64 [documents] each.

    `chunks`, `characters` in them, `symbols` ("#", "...", ". . ." and "…"), `alphabetic` (chunks with a letter),
    `stop_words` (all of them, in any case).
    """
    names = ("chunks", "characters", "symbols", "alphabetic", "stop_words")
    found = np.zeros((len(names), len(words.offsets) - 1), np.int64)
    _chunks(
        data, words.offsets, words.start, words.stop, words.characters, words.kind, words.lower, *_stop_table(), found
    )
    return dict(zip(names, found, strict=True))


def only_words(words: Words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Borders, hashes and lengths of the tokens that have a letter or number."""
    assert words.hash is not None
    chosen = words.kind & _ALNUM != 0
    return np.concatenate([[0], np.cumsum(chosen)])[words.offsets], words.hash[chosen], words.characters[chosen]


@njit(nogil=True, cache=True)
def _tokens(data, offsets, start, stop, characters, kind, hashes, stop_table, shift, found):
    for document in range(found.shape[1]):
        words = letters = hash_signs = dots = alphabetic = left_out = np.int64(0)
        stops = np.uint64(0)
        before = np.uint8(0)  # classes of the joined token so far
        joins = False
        begin, end = offsets[document], offsets[document + 1]
        for token in range(begin, end):
            bits = kind[token]
            if bits & _WORD:
                if joins:
                    left_out += 2
                    alphabetic += (bits & _LETTER) != 0 and not before & _LETTER
                    before |= bits
                else:
                    alphabetic += (bits & _LETTER) != 0
                    before = bits
                joins = False
                if bits & _ALNUM:
                    words += 1
                    letters += characters[token]
                    place = (hashes[token] >> shift) & _SIX
                    if stop_table[place] == hashes[token]:
                        stops |= np.uint64(1) << place
                continue
            at = start[token]
            first = data[at]
            if first == 0x2E or first == 0x2C or first == 0x27 or first == 0xE2:
                inside = characters[token] == 1 and begin < token < end - 1 and at == stop[token - 1]
                inside = inside and stop[token] == start[token + 1]
                inside = inside and (kind[token - 1] & kind[token + 1] & _WORD) != 0
                if first == 0xE2:
                    if data[at + 1] == 0x80 and data[at + 2] == 0xA6:
                        dots += characters[token]
                    left_out += inside and data[at + 1] == 0x80 and data[at + 2] == 0x99
                elif first == 0x27:
                    left_out += inside
                elif first == 0x2E:
                    dots += characters[token] // 3
                    joins = inside
                else:
                    joins = inside and not (kind[token - 1] | kind[token + 1]) & _LETTER
            elif first == 0x23:
                hash_signs += characters[token]
        different = np.int64(0)
        while stops:
            stops &= stops - np.uint64(1)
            different += 1
        found[0, document] = words
        found[1, document] = letters
        found[2, document] = hash_signs
        found[3, document] = dots
        found[4, document] = different
        found[5, document] = alphabetic
        found[6, document] = end - begin - left_out


@njit(nogil=True, cache=True)
def _chunks(data, offsets, start, stop, characters, kind, lower, stop_table, shift, found):
    for document in range(found.shape[1]):
        chunks = total = symbols = alphabetic = stops = np.int64(0)
        first_token, end = offsets[document], offsets[document + 1]
        spaced = np.int64(0)  # single dots so far, one space between each
        token = first_token
        while token < end:
            opening = token
            bits = np.uint8(0)
            while True:
                bits |= kind[token]
                total += characters[token]
                first = data[start[token]]
                single_dot = False
                if not kind[token] & _WORD:
                    if first == 0x23:
                        symbols += characters[token]
                    elif first == 0x2E:
                        symbols += characters[token] // 3
                        single_dot = characters[token] == 1
                    elif first == 0xE2 and data[start[token] + 1] == 0x80 and data[start[token] + 2] == 0xA6:
                        symbols += characters[token]
                if single_dot:
                    near = token > first_token and start[token] == stop[token - 1] + 1 and data[stop[token - 1]] == 0x20
                    spaced = spaced + 1 if near and spaced > 0 else 1
                    if spaced == 3:
                        symbols += 1
                        spaced = 0
                else:
                    spaced = 0
                token += 1
                if token == end or start[token] != stop[token - 1]:
                    break
            chunks += 1
            alphabetic += (bits & _LETTER) != 0
            if token == opening + 1:
                stops += stop_table[(lower[opening] >> shift) & _SIX] == lower[opening]
        found[0, document] = chunks
        found[1, document] = total
        found[2, document] = symbols
        found[3, document] = alphabetic
        found[4, document] = stops
