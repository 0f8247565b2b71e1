"""What every model promises: clear mistakes, masks, loss reductions, recomputation, precision, initial weights."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import yaml
from small_models import FAMILIES, make_model, shard_alone, tokens
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from training_runs import MODEL, ROOT

from shards.errors import UserError
from train.loss import IGNORE_INDEX
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.positions import document_borders, document_mask
from train.parallel import initialize

# Model files


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'?"),
        ({"model_type": "qwen3moe"}, "unknown model_type 'qwen3moe'; did you mean 'qwen3_moe'?"),
        ({"model_type": "qwen"}, "model_type 'qwen' is a family; it has qwen2, qwen3, qwen3_moe"),
        ({"model_type": None}, "model_type is missing; known: deepseek_v2, deepseek_v3, llama"),
        ({"model_type": "qwen3", "num_experts": 8}, "qwen3 has no experts; model_type qwen3_moe has"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe needs num_experts, num_experts_per_tok and moe_intermediate_size"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True is not supported, only False"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported, only 0"),
        (
            {"model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 8},
            "n_routed_experts needs num_experts_per_tok",
        ),
        ({"model_type": "minimind2", "n_shared_experts": 1}, "n_shared_experts and num_experts_per_tok need n_routed"),
        ({"hiden_size": 32}, "hiden_size: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"hidden_size": "wide"}, "hidden_size: Input should be a valid integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: Input should be a valid integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of num_attention_heads 4"),
        (
            {"rope_scaling": {"rope_type": "llama4"}},
            "rope_scaling.rope_type: Input should be 'default', 'llama3' or 'yarn'",
        ),
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


def test_a_file_that_is_not_there_names_the_nearest():
    folder = ROOT / "configs" / "model" / "qwen"
    with pytest.raises(UserError, match=re.escape(f"no such file; did you mean {folder / '3-0.6b.yaml'}?")):
        ModelRegistry.load_config(folder / "3-0.6.yaml")


def test_overrides_replace_fields(tmp_path):
    model = ModelRegistry.create_from_yaml(ROOT / "configs/model/llama/29m.yaml", {"num_hidden_layers": 1})
    assert len(model.layers) == 1


# Documents and padding


def positions_of(ends: list[int], length: int) -> torch.Tensor:
    """Position ids of one row whose documents end at `ends`."""
    begins = [0, *ends, length]
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(begins)])[None]


def test_document_mask_is_block_diagonal():
    mask = document_mask(positions_of([2, 3], 6))[0, 0]
    assert mask.int().tolist() == [[int(a == b) for b in (0, 0, 1, 2, 2, 2)] for a in (0, 0, 1, 2, 2, 2)]


def test_document_borders_include_the_rows():
    """A row that begins inside a document (a window of a stream) begins a piece as well."""
    positions = torch.cat([positions_of([2, 3], 6), torch.tensor([[4, 5, 0, 1, 2, 3]])])
    assert document_borders(positions).tolist() == [0, 2, 3, 6, 8, 12]


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, flash):
    """Rows padded on either side have the logits of the row alone: rotary positions are relative."""
    model = make_model(family, use_flash_attention=flash)
    ids = tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 8:], mask[2, :5] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, kept in ((0, slice(0, 12)), (1, slice(0, 8)), (2, slice(5, 12))):
        torch.testing.assert_close(logits[row, kept], model(ids[row : row + 1, kept]).logits[0], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family):
    """Nor is the load of the experts counted twice."""
    found = []
    for recompute in (False, True):
        model = make_model(family, gradient_checkpointing=recompute).train()
        ids = tokens(2, 33)
        output = model(ids[:, :-1], labels=ids[:, 1:])
        output.objective.backward()
        loads = [] if output.expert_load is None else [output.expert_load]
        found.append([p.grad for p in model.parameters()] + loads)
    assert all((a == b).all() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", [name for name in FAMILIES if make_model(family=name).experts()])
def test_the_balance_loss_is_part_of_training_only(family):
    """Its weight is that of the configuration, and each sequence counts by its valid labels."""
    model, ids = make_model(family), tokens(2, 21)
    labels = ids[:, 1:].clone()
    labels[1, :15] = IGNORE_INDEX
    assert model.eval()(ids[:, :-1], labels=labels).balance_loss is None
    whole = model.train()(ids[:, :-1], labels=labels)
    rows = [model(ids[row : row + 1, :-1], labels=labels[row : row + 1], reduction="sum") for row in (0, 1)]
    balance = sum(row.balance_loss for row in rows) / 25
    torch.testing.assert_close(whole.balance_loss, balance)
    torch.testing.assert_close(whole.expert_load, sum(row.expert_load for row in rows))
    layers, weight = len(model.experts()), model.config.balance_loss_weight
    assert whole.balance_loss > 0.9 * layers * weight  # 1 a layer where the experts are used alike
    gate = model.experts()[-1].gate.weight
    alone = torch.autograd.grad(whole.balance_loss, gate, retain_graph=True)[0]
    both = torch.autograd.grad(whole.objective, gate, retain_graph=True)[0]
    torch.testing.assert_close(both - torch.autograd.grad(whole.loss, gate)[0], alone, rtol=1e-3, atol=1e-6)


def test_bf16_keeps_master_weights_and_stays_close():
    ids = tokens(2, 65)
    exact, rough = make_model(), make_model()
    rough.compute_dtype = torch.bfloat16
    losses = [model(ids[:, :-1], labels=ids[:, 1:]).loss for model in (exact, rough)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    for loss in losses:
        loss.backward()
    for a, b in zip(exact.parameters(), rough.parameters(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm()


# Initial weights


def fresh(seed: int, family: str = "llama", **fields) -> BaseModelForCausalLM:
    with torch.device("meta"):
        model = make_model(family, **fields)
    model.to_empty(device="cpu")
    initialize(model, seed)
    return model


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "minimind2 with experts"])
def test_initial_weights_follow_from_seed_and_name(family):
    first, second, other = (dict(fresh(seed, family, hidden_size=64).named_parameters()) for seed in (7, 7, 8))
    for name, weight in first.items():
        assert (weight == second[name]).all()
        if "norm" in name:
            assert (weight == 1).all()
            continue
        assert (weight != other[name]).any()
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
        std = 0.02 * (0.5 if residual else 1.0)  # 1 / sqrt(2 x 2 layers)
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5
    assert (first["layers.0.self_attn.o_proj.weight"] != first["layers.1.self_attn.o_proj.weight"]).any()
    assert all((buffer == 0).all() for buffer in fresh(7, family).buffers())
    assert all((p == 0).all() for n, p in fresh(7, attention_bias=True).named_parameters() if n.endswith("bias"))


@pytest.fixture
def process_group(tmp_path):
    """A process group of one: enough for DTensor and FSDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_slices_of_any_world_size_make_up_the_same_weights(world_size, family, process_group, monkeypatch):
    """What each rank of a sharded model would draw, put together; 97 rows leave the last of 8 ranks short."""
    whole = dict(fresh(7, family, vocab_size=97).named_parameters())
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in whole}
    mesh = init_device_mesh("cpu", (1,))
    for rank in range(world_size):
        model = make_model(family, vocab_size=97)
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                chunks = parameter.detach().chunk(world_size)
                mine = torch.zeros_like(chunks[rank] if rank < len(chunks) else parameter.detach()[:0])
                sharded = DTensor.from_local(
                    mine, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                setattr(module, name, torch.nn.Parameter(sharded))
        with monkeypatch.context() as patch:
            patch.setattr(DeviceMesh, "size", lambda self, dim: world_size)
            patch.setattr(DeviceMesh, "get_local_rank", lambda self, dim, rank=rank: rank)
            initialize(model, 7)
        for name, parameter in model.named_parameters():
            parts[name].append(parameter.to_local().detach())
    for name, weight in whole.items():
        assert (torch.cat(parts[name]) == weight).all(), name


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharding_changes_no_bit(family, dtype, process_group):
    """FSDP casts the weights and nothing else: on one rank, outputs and gradients are those of the plain model."""
    ids, found = tokens(2, 65), []
    for sharded in (False, True):
        model = make_model(family, max_position_embeddings=4096)
        model.compute_dtype = dtype
        if sharded:
            shard_alone(model)
        positions = torch.arange(4000, 4064).expand(2, 64)  # far enough for bf16 angles to be wrong
        loss = model(ids[:, :-1], labels=ids[:, 1:], position_ids=positions, reduction="sum").loss
        loss.backward()
        gradients = {
            name: p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for name, p in model.named_parameters()
        }
        found.append((loss.detach(), gradients))
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        # the plain model sums the two uses of a bf16 weight in float32, FSDP in bf16
        error = (gradient - found[1][1][name]).norm() / gradient.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2), name
