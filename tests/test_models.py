"""The llama family against `transformers`, and what every model promises: cache, masks, generation, initial weights."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from training_runs import MODEL, ROOT
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM as HuggingFaceLlama

from shards.errors import UserError
from train.distributed import Ranks
from train.loss import IGNORE_INDEX
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.attention import KeyValueCache, attend, blocked_attention, causal_mask, document_mask, plain_attention
from train.models.transformer import sample_token
from train.parallel import initialize, shard

ALONE = Ranks(0, 1, torch.device("cpu"), None)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "as many heads": {"num_key_value_heads": 4},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one key head, biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 24},
    "llama 3 rope": {"num_key_value_heads": 2, "rope_theta": 500.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-6},
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> BaseModelForCausalLM:
    """A small llama whose weights, norms and biases too, are large enough to matter."""
    model = ModelRegistry.create_model(
        "llama",
        ModelRegistry.parse_config({**MODEL, "vocab_size": 97, "max_position_embeddings": 64, **fields}, "test"),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    model.compute_dtype = dtype
    return model


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


# Parity with transformers


def hugging_face(model: BaseModelForCausalLM) -> HuggingFaceLlama:
    """The same model in transformers, weights included."""
    fields = model.config.model_dump(exclude={"use_flash_attention", "gradient_checkpointing", "model_type"})
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    other = HuggingFaceLlama(HuggingFaceConfig(**fields, rope_parameters=rope, attn_implementation="eager"))
    mine = split_names(model, {name: p.detach() for name, p in model.named_parameters()})
    theirs = dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.shape == mine[name].shape, name
        parameter.data.copy_(mine[name])
    return other


def split_names(model: BaseModelForCausalLM, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by our parameter names under transformers' names, the fused projections split."""
    config, split = model.config, {}
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    fused = {"qkv_proj": (["q_proj", "k_proj", "v_proj"], [query, key, key])}
    fused["gate_up_proj"] = (["gate_proj", "up_proj"], [config.intermediate_size] * 2)
    for name, tensor in tensors.items():
        hf_name = name if name.startswith("lm_head") else f"model.{name}"
        for ours, (names, sizes) in fused.items():
            if ours in name:
                split |= {hf_name.replace(ours, n): t for n, t in zip(names, tensor.split(sizes), strict=True)}
                break
        else:
            split[hf_name] = tensor
    return split


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_every_gradient_equal_transformers(shape):
    model = make_model(**shape)
    other = hugging_face(model)
    ids = tokens(3, 65)
    torch.testing.assert_close(model(ids[:, :-1]).logits, other(ids[:, :-1]).logits, rtol=0, atol=1e-5)

    labels = ids[:, 1:].clone()
    labels[0, :9] = IGNORE_INDEX
    loss = model(ids[:, :-1], labels=labels).loss
    # transformers shifts: its labels stand at the position of their own token
    shifted = torch.cat([torch.full((3, 1), IGNORE_INDEX), labels], dim=1)
    expected = other(ids, labels=shifted).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

    loss.backward()
    expected.backward()
    gradients = split_names(model, {name: p.grad for name, p in model.named_parameters()})
    for name, parameter in other.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        # a bias of the keys shifts all scores of a query alike, so its gradient is all rounding
        assert error < 1e-4 or (name.endswith("k_proj.bias") and parameter.grad.norm() < 1e-6), (name, error)


def test_a_config_json_of_transformers_is_a_model_file(tmp_path):
    model = make_model(**SHAPES["llama 3 rope"])
    hugging_face(model).config.save_pretrained(tmp_path)
    assert ModelRegistry.load_config(tmp_path / "config.json") == model.config


# Parameter counts and the registry


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("7b", 6_738_415_616), ("3b", 2_917_051_392), ("1b", 1_038_682_112), ("29m", 28_975_616)],
)
def test_parameter_counts(size, parameters):
    path = ROOT / "configs" / "model" / "llama" / f"{size}.yaml"
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(path)
    assert model.get_num_params() == parameters
    assert f"{parameters:,}" in path.read_text()  # the file says so too


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "model_type is missing; known: llama"),
        ({"hiden_size": 32}, "hiden_size: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: Input should be a valid integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        ({"rope_scaling": {"rope_type": "llama4"}}, "rope_scaling.rope_type: Input should be 'default' or 'llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu'"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Input should be greater than"),
        ({"num_attention_heads": 0}, "num_attention_heads: Input should be greater than"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_mistakes_in_a_model_file(tmp_path, fields, message):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({**MODEL, **fields}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ModelRegistry.create_from_yaml(path)
    assert str(path) in str(caught.value)


def test_overrides_replace_fields(tmp_path):
    model = ModelRegistry.create_from_yaml(ROOT / "configs/model/llama/29m.yaml", {"num_hidden_layers": 1})
    assert len(model.layers) == 1


# Attention, masks and the cache


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 300),
    past=st.integers(0, 40),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**31),
)
def test_the_attention_paths_agree(length, past, groups, seed):
    """SDPA, plain and blocked attention against a loop over the queries."""
    heads, kv_heads = groups
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, length, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, past + length, 8, generator=generator) for _ in range(2))
    expected = torch.empty_like(query)
    for position in range(length):
        for head in range(heads):
            k, v = (t[:, head * kv_heads // heads, : past + position + 1] for t in (key, value))
            scores = (query[:, head, position, None] * k).sum(-1) / 8**0.5
            expected[:, head, position] = (scores.softmax(-1)[..., None] * v).sum(1)
    mask = causal_mask(length, past + length, query.device)
    for found in (plain_attention(query, key, value, None), attend(query, key, value, mask)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if past == 0:
        for found in (attend(query, key, value, None), blocked_attention(query, key, value, None)):
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(blocked_attention(query, key, value, mask), expected, rtol=0, atol=2e-6)


def positions_of(ends: list[int], length: int) -> torch.Tensor:
    """Position ids of one row whose documents end at `ends`."""
    begins = [0, *ends, length]
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(begins)])[None]


def test_document_mask_is_block_diagonal():
    mask = document_mask(positions_of([2, 3], 6))[0, 0]
    assert mask.int().tolist() == [[int(a == b) for b in (0, 0, 1, 2, 2, 2)] for a in (0, 0, 1, 2, 2, 2)]


@pytest.mark.parametrize("path", ["sdpa", "plain", "blocked"])
def test_documents_do_not_see_each_other(path, monkeypatch):
    """Documents of one row give what each gives alone, and nothing of one changes another."""
    length, ends = 300, [70, 71, 200]
    model = make_model(max_position_embeddings=length, use_flash_attention=path != "plain")
    if path == "blocked":
        monkeypatch.setattr("train.models.attention.attend", blocked_attention)
    ids, positions = tokens(1, length), positions_of(ends, length)
    logits = model(ids, position_ids=positions, mask_documents=True).logits
    for start, stop in zip([0, *ends], [*ends, length], strict=True):
        alone = model(ids[:, start:stop]).logits
        torch.testing.assert_close(logits[:, start:stop], alone, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[:, 71:200] = (changed[:, 71:200] + 1) % 97
    again = model(changed, position_ids=positions, mask_documents=True).logits
    untouched = [*range(71), *range(200, length)]
    assert (again[:, untouched] == logits[:, untouched]).all()
    assert (again[:, 71:200] != logits[:, 71:200]).any(dim=-1).all()
    crossing = model(changed, position_ids=positions).logits  # without the mask they do
    assert (crossing[:, 200:] != model(ids, position_ids=positions).logits[:, 200:]).any()


@pytest.mark.slow
@pytest.mark.parametrize("mask_documents", [False, True])
def test_compiled_blocks_equal_eager(mask_documents):
    """The path that compiled CPU training takes, loss and gradients, over several blocks of queries."""
    length = 300
    ids, positions = tokens(2, length + 1), positions_of([70, 71, 200], length).repeat(2, 1)
    found = []
    for compiled in (False, True):
        model = make_model(max_position_embeddings=length)
        for layer in model.layers:
            if compiled:
                layer.compile(fullgraph=True)
        options = {"position_ids": positions, "mask_documents": mask_documents}
        loss = model(ids[:, :-1], labels=ids[:, 1:], **options).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, eager in found[0].items():
        assert (found[1][name] - eager).norm() <= 1e-5 * eager.norm(), name


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 5, 7], [20]])
def test_decoding_with_a_cache_equals_the_whole_pass(pieces, flash):
    model = make_model(use_flash_attention=flash)
    ids, cache = tokens(2, 20), KeyValueCache()
    parts = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flash", [True, False])
def test_padding_changes_nothing(flash):
    """Rows padded on either side have the logits of the row alone: rotary positions are relative."""
    model = make_model(use_flash_attention=flash)
    ids = tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 8:], mask[2, :5] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, kept in ((0, slice(0, 12)), (1, slice(0, 8)), (2, slice(5, 12))):
        torch.testing.assert_close(logits[row, kept], model(ids[row : row + 1, kept]).logits[0], rtol=0, atol=1e-5)


def test_padding_with_a_cache():
    model, ids, cache = make_model(), tokens(2, 12), KeyValueCache()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    parts = [model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits for a, b in ((0, 8), (8, 11), (11, 12))]
    expected = model(ids[1:, 5:]).logits[0]
    torch.testing.assert_close(torch.cat(parts, dim=1)[1, 5:], expected, rtol=0, atol=1e-5)


# Generation


def test_greedy_generation_equals_a_naive_loop():
    model, ids = make_model(tie_word_embeddings=True), tokens(3, 5)
    expected = ids
    for _ in range(25):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert (model.generate(ids, max_length=30, temperature=0) == expected).all()
    assert model.generate(ids, max_length=1000, temperature=0).shape == (3, 64)  # no further than the positions go

    end = int(expected[1, 9])
    found = model.generate(ids, max_length=30, temperature=0, eos_token_id=end)
    for row, whole in zip(found, expected, strict=True):
        stop = next((t for t in range(5, 30) if whole[t] == end), 29) + 1
        assert (row[:stop] == whole[:stop]).all()
        assert (row[stop:] == end).all()
    assert model.generate(ids[1:2], max_length=30, temperature=0, eos_token_id=end).shape[1] <= 10


def test_sampling_is_seeded_and_follows_the_probabilities():
    model, ids = make_model(), tokens(1, 4)
    assert (model.generate(ids, seed=3) == model.generate(ids, seed=3)).all()
    assert (model.generate(ids, seed=3) != model.generate(ids, seed=4)).any()
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (2.0, None), (1.0, 2)):
        expected = (logits[0, :top_k] / temperature).softmax(0)
        drawn = sample_token(logits, temperature, top_k, generator).flatten().bincount(minlength=4) / 20_000
        assert (drawn[: len(expected)] - expected).abs().max() < 0.02
        assert drawn[len(expected) :].sum() == 0


# Loss reductions, precision, recomputation


def test_reductions_agree():
    model, ids = make_model(), tokens(2, 21)
    labels = ids[:, 1:].clone()
    labels[1, 3:9] = IGNORE_INDEX
    outputs = {how: model(ids[:, :-1], labels=labels, reduction=how).loss for how in ("sum", "mean", "none")}
    logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 20)
    torch.testing.assert_close(outputs["none"], expected)
    torch.testing.assert_close(outputs["sum"], expected.sum())
    torch.testing.assert_close(outputs["mean"], expected.sum() / 34)
    assert model(ids[:, :-1], labels=labels).logits is None  # they are never built with labels


def test_gradient_checkpointing_changes_no_bit():
    gradients = []
    for recompute in (False, True):
        model = make_model(gradient_checkpointing=recompute).train()
        ids = tokens(2, 33)
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all((a == b).all() for a, b in zip(*gradients, strict=True))


def test_bf16_keeps_master_weights_and_stays_close():
    ids = tokens(2, 65)
    exact, rough = make_model(), make_model(dtype=torch.bfloat16)
    losses = [model(ids[:, :-1], labels=ids[:, 1:]).loss for model in (exact, rough)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    for loss in losses:
        loss.backward()
    for a, b in zip(exact.parameters(), rough.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm()


# Initial weights


def fresh(seed: int, **fields) -> BaseModelForCausalLM:
    with torch.device("meta"):
        model = make_model(**fields)
    model.to_empty(device="cpu")
    initialize(model, seed, ALONE)
    return model


def test_initial_weights_follow_from_seed_and_name():
    first, second, other = (dict(fresh(seed, hidden_size=64).named_parameters()) for seed in (7, 7, 8))
    for name, weight in first.items():
        assert (weight == second[name]).all()
        if "norm" in name:
            assert (weight == 1).all()
            continue
        assert (weight != other[name]).any()
        std = 0.02 * (0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)  # 1 / sqrt(2 x 2 layers)
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5
    assert (first["layers.0.mlp.down_proj.weight"] != first["layers.1.mlp.down_proj.weight"]).any()
    assert all((p == 0).all() for n, p in fresh(7, attention_bias=True).named_parameters() if n.endswith("bias"))


@pytest.fixture
def process_group(tmp_path):
    """A process group of one: enough for DTensor and FSDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_slices_of_any_world_size_make_up_the_same_weights(world_size, process_group):
    """What each rank of a sharded model would draw, put together; 97 rows leave the last of 8 ranks short."""
    whole = dict(fresh(7).named_parameters())
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in whole}
    mesh = init_device_mesh("cpu", (1,))
    for rank in range(world_size):
        model = make_model()
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                chunks = parameter.detach().chunk(world_size)
                mine = torch.zeros_like(chunks[rank] if rank < len(chunks) else parameter.detach()[:0])
                sharded = DTensor.from_local(
                    mine, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                setattr(module, name, torch.nn.Parameter(sharded))
        initialize(model, 7, Ranks(rank, world_size, torch.device("cpu"), None))
        for name, parameter in model.named_parameters():
            parts[name].append(parameter.to_local().detach())
    for name, weight in whole.items():
        assert (torch.cat(parts[name]) == weight).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharding_changes_no_bit(dtype, process_group):
    """FSDP casts the weights and nothing else: on one rank, outputs and gradients are those of the plain model."""
    ids, found = tokens(2, 65), []
    for sharded in (False, True):
        model = make_model(dtype=dtype, max_position_embeddings=4096)
        if sharded:
            shard(model, ALONE)
        positions = torch.arange(4000, 4064).expand(2, 64)  # far enough for bf16 angles to be wrong
        loss = model(ids[:, :-1], labels=ids[:, 1:], position_ids=positions, reduction="sum").loss
        loss.backward()
        gradients = {name: p.grad.full_tensor() if sharded else p.grad for name, p in model.named_parameters()}
        found.append((loss.detach(), gradients))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        # the plain model sums the two uses of a bf16 weight in float32, FSDP in bf16
        error = (gradient - found[1][1][name]).norm() / gradient.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2), name
