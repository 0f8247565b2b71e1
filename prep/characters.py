"""Classes of characters and lower case, from one table of a stated Unicode version.

Python's own tables change with its version, and with them the words of a text and so the documents that a filter keeps.
Here they come from `characters.tsv`, which lies beside this file; the kernels and the plain-Python references of the
tests read the same arrays. `python -m prep.characters` prints the table of the running Python.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

UNICODE_VERSION = "14.0.0"
SPACE, LETTER, NUMBER, WORD, UPPER, PUNCTUATION, SYMBOL, MARK = (1 << bit for bit in range(8))
_TABLE = Path(__file__).with_name("characters.tsv")
_CODE_POINTS = sys.maxunicode + 1


@lru_cache(maxsize=1)
def classes() -> np.ndarray:
    """Class bits of every code point, uint8 [0x110000].

    SPACE is what `str.isspace` takes, LETTER `str.isalpha`, NUMBER the rest of `str.isalnum`, WORD both and "_" (the
    `\\w` of `re`), UPPER `str.isupper`; PUNCTUATION, SYMBOL and MARK are the general categories P*, S* and M*.
    """
    found = np.zeros(_CODE_POINTS, np.uint8)
    for start, stop, bits in _rows("class"):
        found[start:stop] = bits
    return found


@lru_cache(maxsize=1)
def lower() -> np.ndarray:
    """Lower case of every code point that has one of a single code point, else the code point itself; int32."""
    found = np.arange(_CODE_POINTS, dtype=np.int32)
    for start, stop, shift in _rows("lower"):
        found[start:stop] += shift
    return found


def _rows(kind: str) -> list[tuple[int, int, int]]:
    lines = (line.split("\t") for line in _TABLE.read_text(encoding="ascii").splitlines())
    return [(int(start, 16), int(stop, 16), int(value)) for name, start, stop, value in lines if name == kind]


def make_table() -> str:
    """The table of the running Python: runs of code points [start, stop) with their class bits, or shift to lower."""
    letters = [chr(code) for code in range(_CODE_POINTS)]
    shifts = [ord(small) - ord(letter) if len(small := letter.lower()) == 1 else 0 for letter in letters]
    lines = []
    for kind, values in (("class", [_bits(letter) for letter in letters]), ("lower", shifts)):
        for value, run in groupby(range(_CODE_POINTS), key=values.__getitem__):
            codes = list(run)
            if value:
                lines.append(f"{kind}\t{codes[0]:x}\t{codes[-1] + 1:x}\t{value}")
    return "\n".join(lines) + "\n"


def _bits(letter: str) -> int:
    category = unicodedata.category(letter)
    return (
        SPACE * letter.isspace()
        | LETTER * letter.isalpha()
        | NUMBER * (letter.isalnum() and not letter.isalpha())
        | WORD * (letter.isalnum() or letter == "_")
        | UPPER * letter.isupper()
        | PUNCTUATION * category.startswith("P")
        | SYMBOL * category.startswith("S")
        | MARK * category.startswith("M")
    )


if __name__ == "__main__":
    sys.stdout.write(make_table())
