"""`minigpt-generate` on a folder that `transformers` wrote, against `transformers`, and its answers to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from shards.errors import UserError
from tools.generate import app, load

BOS, EOS = "<s>", "</s>"
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small llama with a tokenizer of bytes that puts BOS in front."""
    folder = tmp_path_factory.mktemp("model")
    bytes_ = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**bytes_, BOS: 256, EOS: 257}, []))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=[257, 7],
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run(*arguments: str, stdin: str | None = None) -> str:
    result = runner.invoke(app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_greedy_text_is_that_of_transformers(folder):
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = ["--temperature", "0", "--max-new-tokens", "20", "--repetition-penalty", "1.2", "--json"]
    lines = run(str(folder), "-p", "Hello", "-p", "-", *options, stdin="many words\n").splitlines()
    for prompt, line in zip(["Hello", "many words\n"], lines, strict=True):
        ids = tokenizer.encode(prompt).ids
        assert ids[0] == 256
        expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, repetition_penalty=1.2)
        new = expected[0, len(ids) :].tolist()
        found = json.loads(line)
        assert found["prompt"] == prompt
        assert found["token_ids"] == new
        assert found["text"] == tokenizer.decode(new)
        assert len(found["logprobs"]) == len(new)
        assert found["finish_reason"] == ("stop" if new[-1] in (257, 7) else "length")


def test_a_single_prompt_is_streamed_with_the_same_text(folder):
    """Many of the bytes that are drawn are pieces of characters."""
    options = ["--max-new-tokens", "40", "--seed", "3", "--top-p", "0.9", "--min-p", "0.01"]
    text = json.loads(run(str(folder), "-p", "é", *options, "--json"))["text"]
    assert run(str(folder), "-p", "é", *options) == f"é{text}\n"
    both = run(str(folder), "-p", "é", "-p", "other", *options)  # the company and the place change nothing
    assert both.startswith(f"é{text}\n{'─' * 80}\nother")
    assert run(str(folder), "-p", "é", *options[:3], "4", *options[4:]) != f"é{text}\n"


def test_log_probabilities_are_shown(folder):
    options = ["-p", "a", "--max-new-tokens", "5"]
    found = json.loads(run(str(folder), *options, "--json"))
    table = run(str(folder), *options, "--logprobs").rsplit("token\n", 1)[1].splitlines()
    assert [float(row.split()[1]) for row in table] == pytest.approx(found["logprobs"], abs=1e-4)


def test_a_stop_token(folder):
    options = ["-p", "a", "--max-new-tokens", "30", "--temperature", "0", "--json"]
    free = json.loads(run(str(folder), *options))["token_ids"]
    stop = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(free[1])
    found = json.loads(run(str(folder), *options, "--stop", stop))
    assert found["token_ids"] == free[: free.index(free[1]) + 1]
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "a" * 70], "prompt 'a.*': a prompt must have 1 to 63 tokens"),
        (["-p", "a", "--top-p", "0"], "top_p must be above 0 and at most 1, not 0"),
        (["-p", "a", "--stop", "two words"], "--stop 'two words': not one token"),
        (["-p", "a", "--checkpoint", "x"], "has no checkpoints"),
        (["-p", "-", "-p", "-"], "can be read once"),
    ],
)
def test_mistakes(folder, options, message):
    with pytest.raises(UserError, match=message):
        run(str(folder), *options)


def test_other_folders(folder, tmp_path):
    with pytest.raises(UserError, match="neither a run"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not readable as a tokenizer"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
