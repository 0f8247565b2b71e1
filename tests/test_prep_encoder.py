"""The encoder: equal to `tokenizers`, never a control token out of text."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_data import SHARED, prose, small_tokenizer
from tokenizers import Tokenizer

from prep import encoder as encoder_module
from prep import fast
from prep.encoder import NASTY, Encoder, end_of_document
from prep.fast import FastEncoder, load_tokenizer
from shards.errors import UserError

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]", "</s>")


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    return small_tokenizer(SPECIALS)


@pytest.fixture(scope="module")
def encoder(tokenizer_json) -> Encoder:
    return Encoder(tokenizer_json, "test", lambda: [prose(1, 50)])


def use(monkeypatch, fast_encoder) -> None:
    """Let another class stand in for `FastEncoder`."""
    monkeypatch.setattr(fast, "FastEncoder", fast_encoder)
    monkeypatch.setattr(encoder_module, "load_fast_encoder", fast.load_fast_encoder.__wrapped__)


def reference(tokenizer_json: bytes, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def split(encoded: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, offsets = encoded
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_fast_encoder_is_used_and_equal(encoder, tokenizer_json):
    assert encoder.backend.startswith("fastokens ")
    assert encoder.notice is None
    texts = [*NASTY, *(prose(seed, 200) for seed in range(20))]
    assert split(encoder.encode(texts)) == reference(tokenizer_json, texts)


@given(st.lists(st.text(max_size=60) | st.lists(st.sampled_from([*SPECIALS, "a", " ", "\n", "<|", "|>"])).map("".join)))
@settings(max_examples=200, deadline=None)
def test_any_text(encoder, tokenizer_json, texts):
    ids, offsets = encoder.encode(texts)
    assert split((ids, offsets)) == reference(tokenizer_json, texts)
    assert not set(ids.tolist()) & set(encoder.special_tokens.values())


@pytest.mark.parametrize("name", ["gpt2-tokenizer.json", "minimind-tokenizer.json"])
def test_known_tokenizers(name):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    content = (SHARED / name).read_bytes()
    encoder = Encoder(content, name)
    assert encoder.backend.startswith("fastokens ")
    texts = [f"a{special} {special}{special}b" for special in encoder.special_tokens] + NASTY
    assert split(encoder.encode(texts)) == reference(content, texts)
    assert not set(encoder.encode(texts)[0].tolist()) & set(encoder.special_tokens.values())


def test_a_differing_fast_encoder_is_not_used(tokenizer_json, monkeypatch):
    class Wrong(FastEncoder):
        def encode(self, texts):
            ids, offsets = super().encode(texts)
            wrong = ids.copy()
            wrong[offsets[next(i for i, text in enumerate(texts) if "123" in text)]] += 1
            return wrong, offsets

    use(monkeypatch, Wrong)
    encoder = Encoder(tokenizer_json, "test", lambda: ["x"])
    assert encoder.backend.startswith("tokenizers ")
    assert encoder.notice
    assert "differs" in encoder.notice
    texts = [*NASTY, "<|endoftext|>"]
    assert split(encoder.encode(texts)) == reference(tokenizer_json, texts)
    assert encoder.encode([])[0].dtype == np.uint32


def test_a_difference_in_the_sample_alone_is_found(tokenizer_json, monkeypatch):
    class WrongOnSample(FastEncoder):
        def encode(self, texts):
            return super().encode([text.replace("zebra", "zebr") for text in texts])

    use(monkeypatch, WrongOnSample)
    assert Encoder(tokenizer_json, "test", lambda: ["no stripes"]).backend.startswith("fastokens")
    assert Encoder(tokenizer_json, "test", lambda: ["ok", "a zebra"]).backend.startswith("tokenizers")


def test_a_failing_fast_encoder_is_not_used(tokenizer_json, monkeypatch):
    def fail(content: bytes) -> None:
        raise ValueError("unsupported model")

    use(monkeypatch, fail)
    encoder = Encoder(tokenizer_json, "test")
    assert encoder.backend.startswith("tokenizers ")
    assert "unsupported model" in str(encoder.notice)


def test_truncation_and_padding_in_the_file_do_not_cut_documents(tokenizer_json):
    data = json.loads(tokenizer_json)
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    encoder = Encoder(json.dumps(data).encode(), "test")
    text = prose(3, 300)
    for encode in (encoder.encode, encoder._encode_reference):
        assert split(encode([text, "a"])) == reference(tokenizer_json, [text, "a"])


def test_literal_control_tokens_are_counted(encoder):
    texts = pa.array(["a<|endoftext|>b<|endoftext|>", "[PAD]", "nothing", "<|im_start|", "<|im_end|>"])
    assert encoder.count_specials(texts) == {"<|endoftext|>": 2, "[PAD]": 1, "<|im_end|>": 1}


def test_vocab_size_is_one_above_the_largest_id(tokenizer_json):
    data = json.loads(tokenizer_json)
    assert Encoder(tokenizer_json, "test").vocab_size == len(data["model"]["vocab"])
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = 7_000  # a gap in the ids
    assert Encoder(json.dumps(data).encode(), "test").vocab_size == 7_001


def test_end_of_document(tmp_path):
    path = tmp_path / "tokenizer.json"
    assert end_of_document({"<|endoftext|>": 5, "<|im_end|>": 6}, None, path) == 5
    assert end_of_document({"<|im_end|>": 6, "<|x|>": 1}, None, path) == 6
    assert end_of_document({"<|endoftext|>": 5, "<|x|>": 1}, "<|x|>", path) == 1
    with pytest.raises(UserError, match=r"</s>.*--eos"):
        end_of_document({"<|endoftext|>": 5, "</s>": 6}, None, path)
    with pytest.raises(UserError, match=r"control tokens: <\|a\|>, <\|b\|>"):
        end_of_document({"<|a|>": 5, "<|b|>": 6}, None, path)
    with pytest.raises(UserError, match=r"did you mean '<\|endoftext\|>'"):
        end_of_document({"<|endoftext|>": 5}, "<|endoftxt|>", path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert end_of_document({"<|endoftext|>": 5, "<|im_end|>": 6}, None, path) == 6


def test_not_a_tokenizer(tmp_path):
    for content in (b"no", b"{}", b"\xff"):
        with pytest.raises(UserError, match=r"mine\.json: not a tokenizer"):
            Encoder(content, "mine.json")
    with pytest.raises(UserError, match="train-tokenizer"):
        load_tokenizer(tmp_path)
