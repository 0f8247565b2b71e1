"""Tokenizer training: reproducible, complete, and usable by both encoders."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prep_data import prose, write_rows
from tokenizers import Tokenizer

from prep.encoder import NASTY, Encoder, end_of_document
from prep.train_tokenizer import SmallestHashes, train_tokenizer
from shards.errors import UserError

DOCUMENTS = [{"id": f"d{n}", "text": prose(n, 200)} for n in range(400)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("corpus") / "rows.jsonl", DOCUMENTS)


def train(corpus, out, vocab_size=320, **options):
    return train_tokenizer([str(corpus)], out, vocab_size, sample_bytes=200_000, **options)


def test_file_report_and_control_tokens(corpus, tmp_path):
    report = train(corpus, tmp_path / "tokenizer.json", special_tokens=["<|endoftext|>", "<|user|>"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == report.vocab_size == 320
    assert [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|user|>")] == [0, 1]
    assert report.sample_bytes == 200_000
    held_out = [row["text"] for row in DOCUMENTS]
    assert 1.3 < report.bytes_per_token < 4
    packed = sum(map(len, held_out)) / sum(len(tokenizer.encode(text).ids) for text in held_out)
    assert report.bytes_per_token == pytest.approx(packed, rel=0.05)
    assert report.measured_on == "held-out documents"


def test_any_bytes_go_through_and_both_encoders_agree(corpus, tmp_path):
    train(corpus, tmp_path / "tokenizer.json")
    content = (tmp_path / "tokenizer.json").read_bytes()
    encoder = Encoder(content, "test", lambda: [prose(9, 99)])
    assert encoder.backend.startswith("fastokens")
    tokenizer = Tokenizer.from_str(content.decode())
    ids, offsets = encoder.encode(NASTY)
    for index, text in enumerate(NASTY):
        assert tokenizer.decode(ids[offsets[index] : offsets[index + 1]].tolist()) == text
    assert end_of_document(encoder.special_tokens, None, tmp_path / "tokenizer.json") == 0


def test_numbers_are_cut_into_groups_of_three(tmp_path):
    corpus = write_rows(tmp_path / "numbers.jsonl", [{"text": "123456 " * 500}] * 20)
    train(corpus, tmp_path / "tokenizer.json", 263)
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("123456").tokens
    assert tokens == ["123", "456"]


def test_same_file_for_any_order_and_any_number_of_threads(corpus, tmp_path):
    shuffled = write_rows(tmp_path / "shuffled.jsonl", random.Random(0).sample(DOCUMENTS, len(DOCUMENTS)))
    outputs = []
    for source, threads in ((corpus, "1"), (corpus, "4"), (shuffled, "2")):
        out = tmp_path / f"{len(outputs)}.json"
        arguments = ["-m", "prep.cli", "train-tokenizer", str(source), "--out", str(out), "--vocab-size", "330"]
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "bytes per token" in done.stdout
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(json.loads(outputs[0])["model"]["vocab"]) == 330


def test_a_single_document_is_enough(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 5_000))
    report = train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "tokenizer.json", 300)
    assert "too few documents" in report.measured_on


def test_mistakes(corpus, tmp_path):
    out = tmp_path / "tokenizer.json"
    (tmp_path / "short.txt").write_text("aaa")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="259"):
        train(corpus, out, 200)
    with pytest.raises(UserError, match="gives only"):
        train_tokenizer([str(tmp_path / "short.txt")], out, 1_000)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([str(tmp_path / "empty.txt")], out, 1_000)
    with pytest.raises(UserError, match="--special-token"):
        train(corpus, out, special_tokens=["<a>", "<a>"])
    with pytest.raises(UserError, match="no column 'body'"):
        train(corpus, out, text_column="body")
    assert not out.exists()


def test_broken_files_and_bad_rows_follow_the_rules_of_tokenize(corpus, tmp_path):
    out = tmp_path / "tokenizer.json"
    packed = gzip.compress(corpus.read_bytes())
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(packed[: len(packed) // 2])
    few = write_rows(tmp_path / "few.jsonl", [*DOCUMENTS, b"{", b"null"])
    many = write_rows(tmp_path / "many.jsonl", [*[{"text": prose(n, 20)} for n in range(1_500)], *[b"{"] * 15])
    command = [sys.executable, "-m", "prep.cli", "train-tokenizer", "--vocab-size", "300", "-o", str(out)]
    for arguments, message in [
        ([broken], r"error: .*broken\.jsonl\.gz: truncated.*--keep-going"),
        (
            [many],
            r"error: 15 of 1,515 rows are bad, more than --max-bad-rows 0\.001.*many\.jsonl:1501 \(not valid JSON",
        ),
    ]:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 2
        assert re.search(message, done.stderr), done.stderr
        assert not out.exists()
    options = ["--keep-going", "--max-bad-rows", "0.02"]
    done = subprocess.run([*command, *options, str(broken), str(few)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"bad rows +2 of \d+\n", done.stdout)
    assert re.search(r"broken files +\S*broken\.jsonl\.gz: truncated", done.stdout)
    assert "few.jsonl:401 (not valid JSON" in done.stderr
    report = train(many, tmp_path / "other.json", 300, max_bad_rows=0.02, say=lambda line: None)
    assert (report.rows, report.bad, report.broken) == (1_515, 15, ())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), unique_by=lambda pair: pair[0]), st.integers(1, 60))
def test_the_sample_is_the_smallest_hashes(pairs, limit):
    sample = SmallestHashes(limit)
    for value, size in pairs:
        sample.add(value, b"x" * size)
    text = "".join("x" * size for _, size in sorted(pairs))
    assert "".join(sample.texts()) == text[:limit]
