"""Decontamination: nothing of an evaluation stays, nothing else goes; against a reference in plain Python."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.characters import WORD, classes, lower
from prep.decontaminate import build, cut_spans
from prep.ngrams import build_index
from prep.stages import Tally
from shards.errors import UserError

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")


def batch_of(texts, kind=None) -> pa.RecordBatch:
    ids = [f"d{number}" for number in range(len(texts))]
    columns = {"id": pa.array(ids, pa.string()), "text": pa.array(texts, kind or pa.string())}
    return pa.RecordBatch.from_pydict({**columns, "source": pa.array(["s"] * len(texts), pa.string())})


def write_items(folder, items, name="bench.jsonl", column="question") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({column: item}) + "\n" for item in items))
    return str(path)


def run(stage, texts, kind=None):
    tally = Tally(stage.name)
    kept = stage(batch_of(texts, kind), tally)
    return kept.column("text").to_pylist(), tally


def words_of(text: str) -> list[str]:
    """Words by the table of characters, lower-cased one character at a time."""
    marked = "".join(chr(lower()[ord(letter)]) if classes()[ord(letter)] & WORD else " " for letter in text)
    return [word for word in marked.split(" ") if word]


def grams_of(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def reference(document: str, items: list[str], ngram: int, min_words: int) -> tuple[set[int], set[tuple[int, int]]]:
    """Items found and n-gram places (first word, words) in a document, by comparing everything with everything."""
    words, found, places = words_of(document), set(), set()
    for number, item in enumerate(items):
        other = words_of(item)
        n = min(ngram, len(other))
        if len(other) < min_words:
            continue
        for at in range(len(words) - n + 1):
            if tuple(words[at : at + n]) in grams_of(other, n):
                found.add(number)
                places.add((at, n))
    return found, places


def letters(number: int) -> list[str]:
    return [f"w{index}" for index in range(number)]


def test_a_document_with_thirteen_words_of_an_item_goes(tmp_path):
    item = " ".join(letters(30))
    stage = build({"against": [write_items(tmp_path, [item])]}, "here")
    inside = "before " + " ".join(letters(30)[9:22]) + " after"
    outside = "before " + " ".join(letters(30)[9:21]) + " after"
    loud = 'before "' + "W9,  W10;\n\n(w11) -- " + " ... ".join(letters(30)[12:22]) + "!!"
    kept, tally = run(stage, [inside, outside, loud, "w1 w2"])
    assert kept == [outside, "w1 w2"]
    assert tally.rules == {"decontaminate.bench": [2, len(inside) + len(loud)]}
    rejected = pa.Table.from_batches(tally.rejected).to_pylist()
    assert [(row["id"], row["value"], row["threshold"]) for row in rejected] == [("d0", 1, 1), ("d2", 1, 1)]
    assert rejected[0]["detail"] == "row 1, question: " + " ".join(letters(30)[9:22])
    assert rejected[1]["detail"].startswith("row 1, question: W9, W10; (w11) -- w12 ...")
    expected = {"items": 1, "skipped": 0, "items_found": 1, "documents": 2, "bytes": len(inside) + len(loud)}
    assert stage.report(tally) == [{"benchmark": "bench", **expected}]


def test_short_items_match_whole(tmp_path):
    items = ["What is the capital of France?", "one two three", "What is the capital of Ghana?"]
    stage = build({"against": [write_items(tmp_path, items)]}, "here")
    texts = ["Q: what is\nthe CAPITAL of france", "what is the capital of", "one two three", "(the capital of Ghana?)"]
    kept, tally = run(stage, texts)
    assert kept == texts[1:]
    report = stage.report(tally)[0]
    assert (report["items"], report["skipped"], report["items_found"]) == (2, 1, 1)
    lower_bound = build({"against": [write_items(tmp_path, items)], "min_words": 3}, "here")
    kept, tally = run(lower_bound, texts)
    assert kept == [texts[1], texts[3]]
    assert tally.sets == {"items.bench": {0, 1}}
    assert lower_bound.describe() != stage.describe()


def test_words_are_compared_and_not_their_hashes(tmp_path):
    """Candidates with the same key but other words do not count."""
    index = build_index([" ".join(letters(14))], 13, 5)
    real = pa.array([" ".join(letters(14))])
    assert index.search(real) == {0: [(0, len(real[0].as_py()), 0, 2)]}
    index.data[:] = np.frombuffer(" ".join(letters(14)).replace("w3", "w9").encode(), np.uint8)
    assert index.search(real) == {}


def test_an_item_shared_by_many_is_told_for_ten(tmp_path):
    items = [" ".join(letters(13)) + f" own{number}" for number in range(30)]
    stage = build({"against": [write_items(tmp_path, items)]}, "here")
    kept, tally = run(stage, [" ".join(letters(13))])
    assert not kept
    assert tally.sets == {"items.bench": set(range(10))}


def test_several_benchmarks(tmp_path):
    first = write_items(tmp_path, [" ".join(letters(14))], "a.jsonl")
    (tmp_path / "other").mkdir()
    second = write_items(tmp_path / "other", ["x " + " ".join(letters(40)[14:34])], "a.jsonl")
    stage = build({"against": [first, second]}, "here")
    text = " ".join(letters(40))
    kept, tally = run(stage, [text, " ".join(letters(13)), "clean"])
    assert kept == ["clean"]
    assert [(rule, numbers[0]) for rule, numbers in tally.rules.items()] == [
        ("decontaminate.a", 1),
        ("decontaminate.other-a", 1),
    ]  # the document with both goes by the one with more matches: 8 against 2
    assert [(row["documents"], row["items_found"]) for row in stage.report(tally)] == [(2, 1), (1, 1)]
    with pytest.raises(UserError, match="two files with items are called"):
        build({"against": [first, second, second]}, "here")


def test_cutting_leaves_the_rest(tmp_path):
    item = " ".join(letters(20))
    settings = {"against": [write_items(tmp_path, [item])], "action": "cut", "margin": 12, "min_characters": 10}
    stage = build(settings, "here")
    text = f"Première phrase entière, ça va. Début {item}! End of it, the last sentence stays."
    kept, tally = run(stage, [text, "clean text here", f"a {item} b"], pa.large_string())
    assert kept == ["Première phrase entière,\n\nthe last sentence stays.", "clean text here"]
    assert tally.counts["cut"] == 1
    assert tally.rules["decontaminate.bench"][0] == 1
    report = stage.report(tally)[0]
    assert report["documents"] == 2
    assert report["bytes"] == len(text.encode()) - len(kept[0].encode()) + len(item) + 4


def test_cut_spans():
    text = b"aaa bbb ccc ddd eee fff"
    assert cut_spans(text, [(8, 11)], 0) == b"aaa bbb\n\nddd eee fff"
    assert cut_spans(text, [(8, 11)], 2) == b"aaa\n\neee fff"
    assert cut_spans(text, [(8, 11), (16, 19)], 1) == b"aaa"
    assert cut_spans(text, [(0, 23)], 5) == b""
    assert cut_spans("ä".encode() * 200, [(200, 202)], 3) == "\n\n".join(["ä" * 97, "ä" * 96]).encode()


WORDS = st.sampled_from(["a", "B", "c", "É", "é", "İ", "日本", "ß", "4", "_x"])
SPACES = st.sampled_from([" ", "\n", ", ", " -- ", "\t…", "'"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=25).map(lambda parts: "".join(a + b for a, b in parts))


@given(st.lists(TEXTS, min_size=1, max_size=6), st.lists(TEXTS, min_size=1, max_size=4), st.integers(2, 5))
@settings(max_examples=150, deadline=None)
def test_equal_to_comparing_everything(texts, items, ngram):
    index = build_index(items, ngram, 2)
    found = index.search(pa.array(texts))
    for number, text in enumerate(texts):
        expected_items, expected_places = reference(text, items, ngram, 2)
        matches = found.get(number, [])
        assert {match.item for match in matches} == expected_items
        raw = text.encode()
        places = set()
        for match in matches:
            first = len(words_of(raw[: match.start].decode()))
            n = len(words_of(raw[match.start : match.stop].decode())) - match.grams + 1
            places |= {(first + number, n) for number in range(match.grams)}
        assert places == expected_places


@given(st.lists(TEXTS, min_size=1, max_size=6), st.lists(TEXTS, min_size=1, max_size=3), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_cutting_leaves_no_ngram(tmp_path_factory, texts, items, margin):
    folder = tmp_path_factory.mktemp("cut")
    items = [*items, "a b c d e f"]
    options = {"ngram": 3, "min_words": 2, "action": "cut", "margin": margin, "min_characters": 0}
    stage = build({"against": [write_items(folder, items)], **options}, "here")
    before = batch_of(texts)
    tally = Tally(stage.name)
    after = stage(before, tally)
    for text in after.column("text").to_pylist():
        assert reference(text, items, 3, 2) == (set(), set())
        assert text or "" in texts
    kept = dict(zip(after.column("id").to_pylist(), after.column("text").to_pylist(), strict=True))
    for name, text in zip(before.column("id").to_pylist(), texts, strict=True):
        if not reference(text, items, 3, 2)[0]:
            assert kept[name] == text
        elif name in kept:
            assert re.sub(r"\s+", "", kept[name]) != re.sub(r"\s+", "", text)


def test_the_result_does_not_depend_on_batches(tmp_path):
    rng = random.Random(3)
    items = [" ".join(rng.choices(letters(9), k=rng.randint(3, 12))) for _ in range(40)]
    texts = [" ".join(rng.choices(letters(9), k=rng.randint(1, 60))) for _ in range(300)]
    texts = [f"{text} {rng.choice(items)} {text[::-1]}" if rng.random() < 0.5 else text for text in texts]
    for action in ("remove", "cut"):
        options = {"ngram": 6, "min_words": 5, "action": action, "margin": 3, "min_characters": 60}
        stage = build({"against": [write_items(tmp_path, items)], **options}, "here")
        whole = batch_of(texts)
        results = []
        for size in (1, 7, 300):
            tally, kept = Tally(stage.name), []
            for start in range(0, 300, size):
                again = pickle.loads(pickle.dumps(stage))
                kept += again(whole.slice(start, size), tally).to_pylist()
            rejected = [row for batch in tally.rejected for row in batch.to_pylist()]
            sets = {name: sorted(numbers) for name, numbers in tally.sets.items()}
            results.append((kept, sorted(rejected, key=lambda row: row["id"]), tally.rules, tally.counts, sets))
        assert results[0] == results[1] == results[2]
        assert 0 < len(results[0][1]) < 300
    assert whole.slice(0, 0).equals(stage(whole.slice(0, 0), Tally(stage.name)))


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.jsonl.zst", "b.json", "b.parquet"])
def test_kinds_of_files(tmp_path, name):
    rows = [
        {"id": 1, "question": "q " + " ".join(letters(9)), "answer": "  ", "choices": ["a"]},
        {"id": 2, "question": None, "answer": "r " + " ".join(letters(9)), "choices": ["b"]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.compress, "jsonl": bytes}[name.split(".")[-1]]
        path.write_bytes(pack(lines.encode()))
    texts = ["Q w0 w1 w2 w3 w4 w5 w6 w7 w8", "r: w0 w1 w2 w3 w4 w5 w6 w7 w8"]
    kept, tally = run(build({"against": [str(path)]}, "here"), texts)
    assert kept == []
    assert tally.rejected[0].to_pylist()[1]["detail"] == f"row 2, answer: {texts[1]}"
    kept, _ = run(build({"against": [f"{path}:answer"]}, "here"), texts)
    assert kept == texts[:1]
    kept, _ = run(build({"against": [f"{path}:question, answer"]}, "here"), texts)
    assert kept == []
    with pytest.raises(UserError, match=r"b\.\w+.*: unknown column 'answr'; did you mean 'answer'"):
        build({"against": [f"{path}:answr"]}, "here")
    with pytest.raises(UserError, match="column 'choices' holds no text; columns with text: question, answer"):
        build({"against": [f"{path}:choices"]}, "here")


def test_the_hash_is_that_of_the_items(tmp_path):
    path = write_items(tmp_path, [" ".join(letters(20))])
    (tmp_path / "elsewhere").mkdir()
    moved = write_items(tmp_path / "elsewhere", [" ".join(letters(20))])
    first, second = build({"against": [path]}, "here"), build({"against": [moved]}, "here")
    assert first.describe() == second.describe()
    assert json.loads(json.dumps(first.describe())) == first.describe()
    assert build({"against": [path], "margin": 5}, "here").describe() == first.describe()
    cut = build({"against": [path], "action": "cut"}, "here")
    assert build({"against": [path], "action": "cut", "margin": 5}, "here").describe() != cut.describe()
    write_items(tmp_path, [" ".join(letters(21))])
    assert build({"against": [path]}, "here").describe() != first.describe()


def test_mistakes_are_named(tmp_path):
    good = write_items(tmp_path, [" ".join(letters(20))])
    (tmp_path / "bad.jsonl").write_text('{"a": "x"}\n{"a": \n')
    (tmp_path / "list.jsonl").write_text('["a"]\n[1]\n')
    (tmp_path / "scalars.jsonl").write_text('"a"\n')
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": "x"}\n' * 50)[:-9])
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    (tmp_path / "what.xyz").write_bytes(b"")
    for name, message in [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("nowhere.parquet:text", "nowhere.parquet: no such file"),
        ("bad.jsonl", "bad.jsonl: line 2 is not JSON"),
        ("list.jsonl", "list.jsonl: the file is not JSON"),
        ("scalars.jsonl", "row 1 is not an object"),
        ("numbers.jsonl", "holds no text; columns: a"),
        ("empty.jsonl", "holds no rows"),
        ("cut.jsonl.gz", "cannot be unpacked"),
        ("no.parquet", "cannot be read as Parquet"),
        ("what.xyz", "cannot tell by its name"),
    ]:
        with pytest.raises(UserError, match=f"stage 2: .*{message}"):
            build({"against": [str(tmp_path / name)]}, "stage 2")
    with pytest.raises(UserError, match=r"none of its 1 items has enough words"):
        build({"against": [good, write_items(tmp_path, ["a b"], "short.jsonl")]}, "here")
    with pytest.raises(UserError, match=r"unknown key 'agianst'; did you mean 'against'\?"):
        build({"agianst": [good]}, "here")
    with pytest.raises(UserError, match="min_words"):
        build({"against": [good], "ngram": 5, "min_words": 6}, "here")
    assert build({"against": [good], "ngram": 3}, "here").describe()["min_words"] == 3
    stage = build({"against": [good], "ngram": 7}, "here")
    write_items(tmp_path, ["other words " * 9])
    with pytest.raises(UserError, match="have changed since the run began"):
        pickle.loads(pickle.dumps(type(stage)(stage.settings, "elsewhere", stage.digest)))(
            batch_of(["text"]), Tally("decontaminate")
        )


@pytest.fixture(scope="module")
def books():
    with open(DATA / "books.jsonl.zst", "rb") as file:
        lines = zstandard.ZstdDecompressor().stream_reader(file).read().split(b"\n", 10_000)[:10_000]
    return [json.loads(line)["text"] for line in lines]


def disguise(text: str, rng: random.Random) -> str:
    """The same words in another dress."""
    parts = re.findall(r"\w+", text)
    gaps = [rng.choice([" ", "  ", "\n", ", ", " – ", "... ", "\r\n\r\n", "; ", " | "]) for _ in parts]
    change = rng.choice([str.upper, str.lower, str.title, str])
    return "".join(change(word) + gap for word, gap in zip(parts, gaps, strict=True))


@needs_data
def test_all_planted_items_are_found_and_no_clean_document_is_hit(books):
    stage = build({"against": [str(DATA / "gsm8k-test.jsonl")]}, "here")
    clean, tally = run(stage, books)
    assert clean == books
    assert (tally.rules, tally.counts, tally.sets) == ({}, {}, {})
    rng = random.Random(1)
    rows = [json.loads(line) for line in (DATA / "gsm8k-test.jsonl").read_text().splitlines()]
    items = [row[column] for row in rows for column in ("question", "answer")]
    assert len(items) == 2638
    planted = []
    for item, text in zip(items, books, strict=False):
        at = rng.randrange(len(text))
        planted.append(f"{text[:at]} {disguise(item, rng)} {text[at:]}")
    tally = Tally(stage.name)
    kept = stage(batch_of([*planted, *books[len(planted) : len(planted) + 100]]), tally)
    assert kept.num_rows == 100
    assert tally.sets["items.gsm8k-test"] == set(range(2638))
    cut = build({"against": [str(DATA / "gsm8k-test.jsonl")], "action": "cut", "margin": 0}, "here")
    left, tally = run(cut, planted[:300])
    assert len(left) > 290
    assert cut(batch_of(left), Tally("again")).num_rows == len(left)
    grams = [grams_of(words_of(item), min(13, len(words_of(item)))) for item in items[:300]]
    for text in left:
        assert not grams_of(words_of(text), 13) & set().union(*grams)
