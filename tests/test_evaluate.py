"""Validation: bytes per token, the loss against a plain loop, and each target token counted once at any world size."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from training_runs import EOS, MODEL, SEQ_LEN, texts, train_tokenizer, write_tokens

from shards.errors import UserError
from shards.mixture import MixtureConfig, MixturePlan
from shards.reader import TokenDataset
from train.config import EvaluationSection
from train.distributed import Ranks
from train.evaluate import Validation, token_bytes
from train.layout import Layout
from train.models import ModelRegistry
from train.passes import Passes

ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))
TEXT = texts()
NASTY = [
    "",
    " ",
    "naïve café 日本語 👩‍👩‍👧\t\r\n\x00\u2028",
    "a  b   c\n\n\n    d",
    "é" * 50,
]

VALIDATION = [text[:400] for text in TEXT["code"][:8]]

# Bytes per token


def sentencepiece_like(model: str) -> Tokenizer:
    """Spaces as ▁ and bytes as a fallback, like Llama 2's tokenizer, without its extra space at the start."""
    fallback = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    documents = [text.replace("é", "") for text in TEXT["prose"][:100]]
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=fallback, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=fallback, unk_token="<unk>", show_progress=False, max_piece_length=8
        )
    tokenizer.train_from_iterator(documents, trainer)
    if model == "unigram":  # the trainer cannot be asked for byte_fallback
        content = json.loads(tokenizer.to_str())
        content["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(content))
    # The trainers make special tokens of the bytes too; only these two are control tokens.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in ("<unk>", EOS)]
    return Tokenizer.from_str(json.dumps(content))


TOKENIZERS = {
    "byte-level": train_tokenizer([*TEXT["code"], *TEXT["prose"]]),
    "byte fallback": sentencepiece_like("bpe"),
    "unigram": sentencepiece_like("unigram"),
}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which a control token's name is ordinary text."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_the_tokens_are_those_of_the_text(kind):
    tokenizer = TOKENIZERS[kind]
    sizes = token_bytes(tokenizer.to_str().encode(), tokenizer.get_vocab_size())
    names = [] if kind == "unigram" else [f"a {EOS} b"]  # unigram finds the name of a control token in any text
    for text in [*NASTY, *names, *TEXT["code"][:50], *TEXT["prose"][:50]]:
        assert sizes[encode(tokenizer, text)].sum() == len(text.encode()), repr(text[:50])
    assert sizes[tokenizer.token_to_id(EOS)] == 0


@given(st.text(max_size=50))
def test_bytes_of_any_text(text):
    for kind, tokenizer in TOKENIZERS.items():
        if "▁" in text and kind != "byte-level":
            continue  # is a space to them
        sizes = token_bytes(tokenizer.to_str().encode(), tokenizer.get_vocab_size())
        assert sizes[encode(tokenizer, text)].sum() == len(text.encode())


def test_added_tokens_and_unused_ids():
    tokenizer = train_tokenizer(TEXT["code"][:20])
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken("naïve", special=False), AddedToken("<|pad|>", special=True)])
    sizes = token_bytes(tokenizer.to_str().encode(), size + 10)
    assert sizes[size:].tolist() == [6, 0, *[0] * 8]


# The loss


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sources `code` and `prose`, the second without `val/`, their plan, and a model."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = TOKENIZERS["byte-level"]
    write_tokens(folder / "code", tokenizer, TEXT["code"][10:])
    write_tokens(folder / "code" / "val", tokenizer, VALIDATION, shard_tokens=500)
    write_tokens(folder / "prose", tokenizer, TEXT["prose"][10:])
    write_tokens(folder / "held-out", tokenizer, [TEXT["prose"][0][:1000]])
    sources = [{"name": name, "path": str(folder / name), "weight": 1} for name in ("code", "prose")]
    plan = MixturePlan.build(MixtureConfig.model_validate({"sources": sources}), SEQ_LEN)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ModelRegistry.create_model("llama", ModelRegistry.parse_config(MODEL, "test"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, plan=plan, model=model)


def section(**fields) -> EvaluationSection:
    return EvaluationSection.model_validate({"metrics": ["loss", "bpb", "perplexity"], **fields})


def naive(data, dataset: TokenDataset, starts: list[int], documents: bool = False) -> tuple[float, int, int]:
    """Nats, tokens and text bytes of the targets of some windows, one at a time; documents each on their own."""
    nats = tokens = size = 0
    names = {index: token for token, index in data.tokenizer.get_vocab().items()}
    end = data.tokenizer.token_to_id(EOS)
    for start in starts:
        window = torch.from_numpy(dataset.read(start, min(start + SEQ_LEN + 1, dataset.tokens)).astype(np.int64))
        ids, targets = window[:-1], window[1:]
        borders = [i + 1 for i, token in enumerate(ids[:-1].tolist()) if token == end] if documents else []
        pieces = [data.model(piece[None]).logits[0] for piece in ids.tensor_split(borders)]
        nats += F.cross_entropy(torch.cat(pieces).double(), targets, reduction="sum").item()
        tokens += len(targets)
        size += sum(len(names[t]) for t in targets.tolist() if t != end)  # byte-level: one character, one byte
    return nats, tokens, size


def passes(data) -> Passes:
    """Passes through the model in this process."""
    return Passes(data.model, ALONE, batch_size=4, length=SEQ_LEN)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_loss_and_bits_per_byte_equal_a_plain_loop(data, batch_size, documents):
    validation = Validation(section(), data.plan, batch_size, documents, ALONE)
    assert [one.name for one in validation.sets] == ["code"]  # prose has no val/
    dataset = TokenDataset(data.folder / "code" / "val")
    starts = list(range(0, dataset.tokens - 1, SEQ_LEN))
    with torch.no_grad():
        nats, tokens, size = naive(data, dataset, starts, documents)
    assert tokens == dataset.tokens - 1  # every token but the first is a target, once
    assert size == sum(len(text.encode()) for text in VALIDATION) - len(
        data.tokenizer.id_to_token(int(dataset.read(0, 1)[0]))
    )
    found = validation.run(passes(data))
    assert found["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert found["val_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["val"]["code"] == {key: found[f"val_{key}"] for key in ("loss", "bpb", "perplexity")}


def test_document_mask_changes_the_loss(data):
    losses = [Validation(section(), data.plan, 8, mask, ALONE).run(passes(data))["val_loss"] for mask in (False, True)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 20])
@pytest.mark.parametrize("documents", [False, True])
def test_ranks_share_the_windows(data, world_size, documents, monkeypatch):
    """Sums of simulated ranks, more ranks than windows among them, add up to those of one."""
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "sum_", lambda self, tensor: sums.append(tensor.clone()))
    monkeypatch.setattr(Validation, "_summarise", lambda self, row: {"loss": 0.0})
    datasets = [{"name": name, "path": str(data.folder / name)} for name in ("code/val", "held-out")]
    batches = set()
    ranks = [Ranks(rank, world_size, ALONE.ranks.device, None) for rank in range(world_size)]
    for layout in [ALONE, *(Layout(one, dp_replicate=world_size) for one in ranks)]:
        validation = Validation(section(datasets=datasets, max_tokens=600), data.plan, 4, documents, layout)
        calls = []
        forward = data.model.forward
        monkeypatch.setattr(data.model, "forward", lambda *a, f=forward, c=calls, **k: c.append(1) or f(*a, **k))
        validation.run(passes(data))
        monkeypatch.setattr(data.model, "forward", forward)
        batches.add((layout.data_size, len(calls)))
    assert len(batches) == 2  # as many forward passes on every rank, or FSDP would wait for ever
    torch.testing.assert_close(torch.stack(sums[1:]).sum(0), sums[0], rtol=1e-9, atol=1e-9)
    assert (sums[0][:, 1] > 0).all()


def test_max_tokens_spreads_over_the_set(data):
    dataset = TokenDataset(data.folder / "code" / "val")
    whole = Validation(section(), data.plan, 4, False, ALONE).sets[0].starts
    few = Validation(section(max_tokens=5 * SEQ_LEN + 3), data.plan, 4, False, ALONE).sets[0].starts
    assert len(whole) == -(-(dataset.tokens - 1) // SEQ_LEN)
    assert len(few) == 5
    assert set(few) < set(whole)
    gaps = np.diff([*few, dataset.tokens])
    assert gaps.max() - gaps.min() <= 2 * SEQ_LEN
    validation = Validation(section(max_tokens=1), data.plan, 4, False, ALONE)
    with torch.no_grad():
        nats, tokens, _ = naive(data, dataset, [0])
    assert validation.run(passes(data))["val_loss"] == pytest.approx(nats / tokens, rel=1e-6)


def test_configured_datasets_replace_the_default_ones(data):
    datasets = [{"name": "a", "path": str(data.folder / "held-out")}, {"name": "b", "path": str(data.folder / "code")}]
    found = Validation(section(datasets=datasets, metrics=["loss"], max_tokens=500), data.plan, 4, False, ALONE).run(
        passes(data)
    )
    assert found.keys() == {"val_loss", "val"}
    assert found["val"].keys() == {"a", "b"}


def test_unusable_datasets_are_refused(data, tmp_path):
    def message(path) -> str:
        with pytest.raises(UserError) as caught:
            Validation(section(datasets=[{"name": "v", "path": str(path)}]), data.plan, 4, False, ALONE)
        return str(caught.value)

    assert "has no dataset.json" in message(tmp_path / "nowhere")
    write_tokens(tmp_path / "foreign", train_tokenizer(TEXT["prose"][:30], 300), TEXT["prose"][:5])
    assert "was made with another tokenizer than the training data" in message(tmp_path / "foreign")
    write_tokens(tmp_path / "empty", data.tokenizer, [""])
    assert "has 1 token(s); at least 2 are needed" in message(tmp_path / "empty")


def test_the_model_trains_on_afterwards(data):
    data.model.train()
    Validation(section(max_tokens=100), data.plan, 4, False, ALONE).run(passes(data))
    assert data.model.training
    assert all(parameter.grad is None for parameter in data.model.parameters())
