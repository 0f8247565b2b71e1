"""Statistics and cleaning: kernels against plain Python, on real text and on anything that is Unicode."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filter_reference import clean_c4, clean_dclm, count_sentences, statistics
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prep.filters import lines, measures
from prep.filters.measures import STATISTICS
from prep.words import split_words

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
C4_ON = {"citations": (0, 0), "line_word_length": (0, 1000), "line_words": (3, 0), "line_javascript": (0, 0)}
C4_ON |= {"line_policy": (0, 0), "line_end": (0, 0)}
DCLM_ON = {"newlines": (0, 2), "upper_case": (0, 0.5), "numbers": (0, 0.999999), "counters": (0, 0), "words": (2, 0)}
DCLM_ON |= {"cart": (0, 10), "read_more": (0, 10), "sign_in": (0, 10)}

PIECES = st.sampled_from(
    [
        *(" ", "\n", "\n\n", "\r\n", "\r", "\t", "\x00", "\x1c", "\x85", "\u2028"),
        *("\u3000", "\xa0", "\u200b", ".", "...", "…", ". . ."),
        *("!", "?", "#", "-", "•", "●", "*", "'", "’", '"', ",", "。", "[1]", "[edit]", "[citation needed]", "["),
        *("{", "_", "the", "The", "be", "to", "of", "that", "a", "b", "word", "Mr", "U.S.", "3.5", "1,000", "don't"),
        *(
            "IL-3",
            "é",
            "e\u0301",
            "中文",
            "日本語",
            "😀",
            "👨‍👩‍👧",
            "ß",
            "İ",
            "K",
            "lorem ipsum",
            "JavaScript",
            "Privacy Policy",
            "use cookies",
        ),
        *("3 likes", "1.2K views", "items in cart", "Read more...", "Sign-in", "HELLO WORLD", "12345", "do not edit"),
        *("x" * 31, "y" * 1001, "é" * 600, "the word of the word of the word of "),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=60).map("".join),
    st.lists(PIECES, min_size=1, max_size=60).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80),
    st.text("ab \n", min_size=1, max_size=200),
    st.text("ab.", min_size=1, max_size=60),
).filter(bool)


def check_statistics(texts: list[str], kind: pa.DataType | None = None) -> None:
    found = measures.statistics(pa.array(texts, kind or pa.string()), STATISTICS)
    for number, text in enumerate(texts):
        expected = statistics(text)
        assert expected.keys() == STATISTICS.keys()
        wrong = {name: (found[name][number], value) for name, value in expected.items() if found[name][number] != value}
        assert not wrong, (wrong, text[:200])


def check_cleaning(texts: list[str]) -> None:
    column = pa.array(texts)
    for ends, after, words, marks in ((True, False, 3, ".?!\"'"), (False, False, 3, ".?!\"'"), (True, True, 5, '.?!"')):
        active = C4_ON | {"line_words": (words, 0)}
        if not ends:
            del active["line_end"]
        cleaned = lines.clean_c4(column, active, end_marks=marks, count_after=after)
        for number, text in enumerate(texts):
            expected, counts = clean_c4(text, words=words, ends=ends, marks=marks, after=after)
            assert cleaned.texts[number].as_py() == expected
            assert {name: values[number] for name, values in cleaned.statistics.items()} == counts, text[:300]
    cleaned = lines.clean_dclm(column, DCLM_ON)
    for number, text in enumerate(texts):
        expected, removed = clean_dclm(text)
        assert cleaned.texts[number].as_py() == expected
        assert cleaned.statistics["words_removed"][number] == removed


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(["\n"])
@example(["\n\n", " ", "\r\n", "\x00", "a"])
@example(["a\n\na", "\na\n", "a\n \n\n a"])
@example(["a b a b a b a b a b a b a b a b a b a b", "......", ". . . . . ."])
def test_statistics_equal_the_reference(texts):
    check_statistics(texts)


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
@example(["a b c [1]\n[2] d e f.", "[1] [2] [3]", "x y z {"])
@example(["two items in cart", "items in cart", "a b\n\n\n\n\nc d", "Sign-in Read more..."])
def test_cleaning_equals_the_reference(texts):
    check_cleaning(texts)


def test_real_text():
    texts = rows(SHARED / "c4-300.jsonl", 300)
    check_statistics(texts)
    check_cleaning(texts)
    check_statistics(texts[:20], pa.large_string())


@pytest.mark.slow
def test_books():
    texts = rows(SHARED / "books.jsonl.zst", 2000)
    check_statistics(texts)
    check_cleaning(texts)


def rows(path: Path, number: int) -> list[str]:
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    if path.suffix == ".zst":
        import zstandard

        file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb")))
    else:
        file = path.open("rb")
    with file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(number), strict=False)]


def test_batches_do_not_matter():
    texts = ["a b c " * 50, "\n", "x", "the dog.\nthe dog.\n" * 9, "é" * 70]
    together = measures.statistics(pa.array(texts), STATISTICS)
    for number, text in enumerate(texts):
        alone = measures.statistics(pa.array(["other", text]).slice(1), STATISTICS)
        assert all(alone[name][0] == together[name][number] for name in STATISTICS)


@given(st.lists(TEXTS, min_size=1, max_size=3))
@settings(deadline=None)
def test_words_with_one_hash_or_both(texts):
    both = split_words(pa.array(texts))
    for name, other in (("hash", "lower"), ("lower", "hash")):
        alone = split_words(pa.array(texts), (name,))
        assert getattr(alone, other) is None
        for field in ("offsets", "start", "stop", "characters", "kind", name):
            assert np.array_equal(getattr(alone, field), getattr(both, field))


def test_only_the_wanted_statistics():
    assert list(measures.statistics(pa.array(["a b"]), ["words", "lines"])) == ["words", "lines"]


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("One.", 1),
        ("One. Two.", 2),
        ("One? Two! Three", 3),
        ('"One." "Two," she said.', 2),
        ("Mr. Smith of the U.S. paid $3.50 at 5 a.m. today", 1),
        ("Wait... what?! Yes.", 2),
        ("end.Start of it", 2),
        ("example.com is. It", 2),
        ("第一句。 第二句。", 2),
    ],
)
def test_sentences(line, sentences):
    assert count_sentences(line) == sentences
    cleaned = lines.clean_c4(pa.array([line]), {})
    assert cleaned.statistics["sentences"][0] == sentences


def test_licence_headers():
    header = "/*\n * Copyright 2020 Somebody\n */\n\n"
    code = "int main() {}\n"
    texts = [
        header + code,
        "#!/bin/sh\n# Licensed under the MIT terms\n# more\n\necho\n",
        "# What it does\ncode\n",
        code,
        "// Copyright A\n\n// Does something\nfoo();\n",
        "#include <x>\n// Copyright A\n",
        "/* Copyright, never closed\n",
        header,
    ]
    cleaned = lines.remove_licences(pa.array(texts), {"licence": (0, 0)})
    assert cleaned.texts.to_pylist() == [
        *(code, "#!/bin/sh\necho\n", texts[2], code, "// Does something\nfoo();\n", texts[5], texts[6], "")
    ]
    assert cleaned.counts["licence_headers"] == 4


@pytest.mark.parametrize(
    "text",
    [part * (3_000_000 // len(part)) for part in ("\n", "a", "!?", "a\n", "the ", "[1", "!.")],
    ids=["newlines", "letter", "symbols", "lines", "words", "brackets", "stops"],
)
def test_long_documents_take_linear_time(text):
    """Anything quadratic would take hours."""
    column = pa.array([text])
    measures.statistics(pa.array(["warm up"]), STATISTICS)
    begin = time.perf_counter()
    found = measures.statistics(column, STATISTICS)
    lines.clean_c4(column, C4_ON)
    lines.clean_dclm(column, DCLM_ON)
    lines.remove_licences(column, {"licence": (0, 0)})
    assert time.perf_counter() - begin < 30
    assert found["characters"][0] == len(text)
    assert all(np.isfinite(values).all() for values in found.values())
