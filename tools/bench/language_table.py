"""Accuracy of the language rule on real text of this machine: translated manual pages and messages.

Texts come from the manual pages below --man (Debian: `apt-get install manpages-de manpages-fr manpages-ja …`) and from
the translations of programs below --locale. What the translators left in English is taken out (paragraphs with a good
share of English function words; in other scripts, those with mostly Latin letters), and so are lists of options and
code (less than two thirds of the signs are letters). Documents of at least 200 characters are made of consecutive
paragraphs or messages; `minigpt-prep filter` judges them, and their first 50 and 100 characters.

    python -m tools.bench language
    python -m tools.bench language --documents 50
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError

LEAST_CHARACTERS, LEAST_MESSAGE, LEAST_DOCUMENTS = 200, 30, 20
LENGTHS = (50, 100, 0)  # 0: the whole document, of which the rule sees 300
THRESHOLD = 0.65
PAGES = 1_000  # manual pages of a language that are read
LATIN = "en de fr es it pt nl pl cs sv da fi hu ro tr id vi"
OTHER_SCRIPTS = "ru uk bg sr el ar he fa hi bn ta te th ko ja zh"
ENGLISH = frozenset({"the", "this", "that", "with", "and", "which", "are", "you", "will"})
ENGLISH_SHARE, LETTER_SHARE = 0.06, 2 / 3
WITHIN_TEXT = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB", "R"}
CODE = {"nf": "fi", "EX": "EE", "TS": "TE", "ig": "."}
ESCAPES = [
    (re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[+-]?\d+|\\[&,/|^:%{}]|\\k.|\\h'[^']*'|\\c"), ""),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]|\\\*\(Aq"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*\([LR]q"), '"'),
    (re.compile(r"\\\(em|\\\[em\]|\\\(en|\\\[en\]"), "–"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[~ 0]"), " "),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(?:\(..|\[[^\]]*\]|\*\(..|\*\[[^\]]*\]|\*.)"), ""),
]


class Judged(NamedTuple):
    """What the rule said about a document."""

    language: str
    label: str
    score: float
    length: int


def main() -> None:
    """Collect texts, judge them, print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench language", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--man", type=Path, default=Path("/usr/share/man"))
    parser.add_argument("--locale", type=Path, default=Path("/usr/share/locale"))
    parser.add_argument("--languages", default=f"{LATIN} {OTHER_SCRIPTS}", help="labels of the model")
    parser.add_argument("--documents", type=int, default=400, help="of each language and kind")
    options = parser.parse_args()
    texts = collect(options.man, options.locale, options.languages.split(), options.documents)
    if not texts:
        raise UserError(
            f"no texts in at least two languages below {options.man} and {options.locale}; "
            f"install some (Debian: apt-get install manpages-de manpages-fr manpages-ja), or name other folders"
        )
    with tempfile.TemporaryDirectory(prefix="bench-language-") as name:
        begin = time.perf_counter()
        judged = judge(texts, Path(name))
        print_tables(texts, judged)
        print(f"\n{sum(map(len, texts.values())):,} documents; {time.perf_counter() - begin:.1f} s for all lengths")


def collect(man: Path, locale: Path, languages: list[str], most: int) -> dict[str, list[str]]:
    """Label -> documents, at most so many of manual pages and of messages each, chosen by their checksums."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in (man, locale):
        kinds: dict[str, set[str]] = defaultdict(set)
        for path in sorted(path for path in folder.glob("*") if path.is_dir()):
            label = "en" if path.name.startswith("man") else path.name.split("_")[0].replace("nb", "no")
            if label in languages and not {"@", "."} & set(path.name):  # not: other scripts and encodings
                for parts in map(paragraphs, pages(path)) if folder == man else catalogues(path):
                    kinds[label].update(documents(part for part in parts if is_text(part, label)))
        for label, texts in kinds.items():
            found[label] += by_checksum(texts)[:most]
    return {label: found[label] for label in languages if len(found[label]) >= LEAST_DOCUMENTS}


def by_checksum(names: Iterable[str]) -> list[str]:
    """In an order that is always the same and tells nothing."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


def pages(folder: Path) -> Iterator[str]:
    """Sources of the manual pages below a folder, some of them where there are many."""
    for name in by_checksum(str(path) for path in folder.rglob("*.gz"))[:PAGES]:
        try:
            yield gzip.decompress(Path(name).read_bytes()).decode()
        except (OSError, UnicodeDecodeError):  # a link to nowhere; an old encoding
            continue


def catalogues(folder: Path) -> Iterator[list[str]]:
    """Translated messages of each program."""
    for path in sorted(folder.glob("LC_MESSAGES/*.mo")):
        try:
            with path.open("rb") as file:
                catalogue = vars(gettext.GNUTranslations(file))["_catalog"]
        except (OSError, ValueError, IndexError):  # another encoding, or damaged in the way of plural forms
            continue
        pairs = ((str(key), text) for key, text in catalogue.items() if isinstance(text, str))
        yield [text.strip() for key, text in pairs if len(text) >= LEAST_MESSAGE and key and key != text]


def paragraphs(source: str) -> Iterator[str]:
    """Running text of a manual page, without its macros, tables and code."""
    lines: list[str] = []
    until = ""
    for line in source.splitlines():
        macro, _, rest = line[1:].strip().partition(" ") if line[:1] in (".", "'") else ("", "", "")
        if until:
            until = "" if macro == until else until
        elif macro in WITHIN_TEXT:
            lines.append(plain(rest.replace('"', "")))
        elif not line or line[:1] in (".", "'"):
            if macro.startswith('\\"'):
                continue
            until = CODE.get(macro, "")
            if lines:
                yield "\n".join(lines)
            lines = []
        else:
            lines.append(plain(line))
    if lines:
        yield "\n".join(lines)


def plain(line: str) -> str:
    """A line without the escapes of roff."""
    for pattern, replacement in ESCAPES:
        line = pattern.sub(replacement, line)
    return line


def is_text(text: str, label: str) -> bool:
    """Whether a paragraph is running text, and not left in English."""
    text = text[:LEAST_CHARACTERS]
    letters = [sign for sign in text if unicodedata.category(sign)[0] in "LM"]
    if len(letters) < LETTER_SHARE * len("".join(text.split())):
        return False
    if label in OTHER_SCRIPTS.split():
        return sum(sign.isascii() for sign in letters) < len(letters) / 2
    words = re.findall(r"\w+", text.lower())
    return label == "en" or sum(word in ENGLISH for word in words) < ENGLISH_SHARE * len(words)


def documents(parts: Iterable[str]) -> Iterator[str]:
    """Consecutive parts, joined until they are long enough."""
    text = ""
    for part in parts:
        text = f"{text}\n{part}" if text else part
        if len(text) >= LEAST_CHARACTERS:
            yield text
            text = ""


def judge(texts: dict[str, list[str]], folder: Path) -> list[Judged]:
    """Let `minigpt-prep filter` judge the documents at all lengths."""
    source = folder / "texts.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for label, found in texts.items():
            for number, text in enumerate(found):
                for length in LENGTHS:
                    row = {"id": f"{label}/{length}/{number}", "text": text[:length] if length else text}
                    file.write(json.dumps(row) + "\n")
    out = folder / "out"
    command = [sys.executable, "-m", "prep.cli", "filter", str(source), "--language", f"en:{THRESHOLD}"]
    done = subprocess.run([*command, "--language-columns", "--out", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"minigpt-prep filter failed: {done.stderr.strip()}")
    columns = ["id", "language", "language_score"]
    files = sorted([*out.glob("part-*.parquet"), *out.glob("rejected/part-*.parquet")])
    rows = pa.concat_tables([pq.read_table(path, columns=columns) for path in files]).to_pylist()
    judged = []
    for row in rows:
        label, length, _ = row["id"].split("/")
        judged.append(Judged(label, row["language"], row["language_score"], int(length)))
    return judged


def print_tables(texts: dict[str, list[str]], judged: list[Judged]) -> None:
    """By language: how many are recognised, and recognised with a sufficient score; and both by length."""
    print(
        f"{'language':<10}{'documents':>10}{'correct':>10}{f'kept at {THRESHOLD}':>14}{'median score':>14}   taken for"
    )
    whole = [row for row in judged if row.length == 0]
    for label in texts:
        rows = [row for row in whole if row.language == label]
        right = [row.score for row in rows if row.label == label]
        wrong = Counter(row.label for row in rows if row.label != label).most_common(3)
        print(
            f"{label:<10}{len(rows):>10,}{len(right) / len(rows):>10.1%}{kept(rows):>14.1%}"
            f"{sorted(row.score for row in rows)[len(rows) // 2]:>14.2f}   "
            + ", ".join(f"{name} {number}" for name, number in wrong)
        )
    print(f"\n{'length':<20}{'correct':>10}{f'kept at {THRESHOLD}':>14}{'wrong and kept':>16}")
    for length in LENGTHS:
        rows = [row for row in judged if row.length == length]
        right_share = sum(row.label == row.language for row in rows) / len(rows)
        sure = sum(row.label != row.language and row.score >= THRESHOLD for row in rows) / len(rows)
        name = f"{length} characters" if length else "whole (first 300)"
        print(f"{name:<20}{right_share:>10.1%}{kept(rows):>14.1%}{sure:>16.2%}")


def kept(rows: list[Judged]) -> float:
    """Share of documents that a rule for their own language keeps."""
    return sum(row.label == row.language and row.score >= THRESHOLD for row in rows) / len(rows)


if __name__ == "__main__":
    main()
