"""The shipped model files: parameter counts against published numbers and against arithmetic on the file itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_runs import ROOT

from train.models import ModelRegistry

MODELS = ROOT / "configs" / "model"

# Total parameters. deepseek/v3 and 7b_moe: without the router biases, which no gradient changes.
TOTAL = {
    "llama/1b": 1_038_682_112,
    "llama/3b": 2_917_051_392,
    "llama/7b": 6_738_415_616,
    "llama/3.1-8b": 8_030_261_248,
    "llama/3.2-1b": 1_235_814_400,
    "llama/3.2-3b": 3_212_749_824,
    "llama/29m": 28_975_616,
    "llama/demo": 4_000_000,
    "qwen/2.5-0.5b": 494_032_768,
    "qwen/2.5-1.5b": 1_543_714_304,
    "qwen/2.5-7b": 7_615_616_512,
    "qwen/3-0.6b": 596_049_920,
    "qwen/3-1.7b": 1_720_574_976,
    "qwen/3-4b": 4_022_468_096,
    "qwen/3-8b": 8_190_735_360,
    "qwen/3-30b-a3b": 30_532_122_624,
    "deepseek/26m": 25_342_336,
    "deepseek/0.8b-a0.2b": 814_608_384,
    "deepseek/7b_moe": 7_315_362_816,
    "deepseek/v2-lite": 15_706_484_224,
    "deepseek/7b": 6_910_365_696,
    "deepseek/v3": 671_026_404_352,
    "minimind/26m": 25_829_888,
    "minimind/104m": 104_030_976,
    "minimind/moe-145m": 145_029_760,
    "minimind/3-64m": 63_912_192,
    "minimind/3-moe-198m": 198_416_640,
}
ACTIVE = {  # parameters that one token uses, as published or designed: a number and half its last digit
    "qwen/3-30b-a3b": (3.35e9, 0.005e9),
    "deepseek/26m": (13.0e6, 0.05e6),
    "deepseek/0.8b-a0.2b": (209e6, 0.5e6),
    "deepseek/7b_moe": (1.57e9, 0.005e9),
    "deepseek/v2-lite": (2.66e9, 0.005e9),
    "deepseek/v3": (37.6e9, 0.05e9),
    "minimind/3-moe-198m": (63.94e6, 0.005e6),
}


def fields_of(preset: str) -> dict[str, Any]:
    return yaml.safe_load((MODELS / f"{preset}.yaml").read_text())


def count(fields: dict[str, Any]) -> tuple[int, int]:
    """Total and active parameters by arithmetic alone: what each matrix and vector of the architecture holds."""
    kind, hidden, layers = fields["model_type"], fields["hidden_size"], fields["num_hidden_layers"]
    heads = fields["num_attention_heads"]
    if kind.startswith("deepseek"):
        content, rope, value = (fields[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        latent, rank = fields["kv_lora_rank"], fields["q_lora_rank"]
        queries = heads * (content + rope)
        attention = hidden * queries if rank is None else hidden * rank + rank + rank * queries
        attention += hidden * (latent + rope) + latent + latent * heads * (content + value) + heads * value * hidden
    else:
        kv_heads, head_dim = fields["num_key_value_heads"], fields.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        if kind == "qwen2":
            attention += head_dim * (heads + 2 * kv_heads)
        if kind in ("qwen3", "qwen3_moe", "minimind3"):
            attention += 2 * head_dim
    experts = fields.get("n_routed_experts") or fields.get("num_experts") or 0
    dense = fields.get("first_k_dense_replace", 0) if experts else layers
    total = fields["vocab_size"] * hidden * (1 if fields["tie_word_embeddings"] else 2) + hidden
    total += layers * (attention + 2 * hidden) + dense * 3 * hidden * fields["intermediate_size"]
    expert = 3 * hidden * fields.get("moe_intermediate_size", fields["intermediate_size"])
    total += (layers - dense) * (experts * hidden + (experts + fields.get("n_shared_experts", 0)) * expert)
    unused = (layers - dense) * (experts - fields.get("num_experts_per_tok", 0)) * expert
    return total, total - unused


def test_every_preset_is_in_the_table():
    assert {str(path.relative_to(MODELS).with_suffix("")) for path in MODELS.rglob("*.yaml")} == TOTAL.keys()


@pytest.mark.parametrize("preset", TOTAL)
def test_parameter_counts(preset: str):
    """The model built without memory, the published number, arithmetic and the file's own comment say the same."""
    path = MODELS / f"{preset}.yaml"
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(path)
    total, active = count(fields_of(preset))
    assert model.get_num_params() == total == TOTAL[preset]
    assert model.get_num_active_params() == active
    if preset in ACTIVE:
        published, rounding = ACTIVE[preset]
        assert abs(active - published) <= rounding
    comment = " ".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"{total:,} parameters" in comment
    assert active == total or f"{active:,} active per token" in comment
    assert re.search(r"\barXiv\b|\bhub\b|config\.json|github\.com|Ours|for one CPU|few minutes", comment)  # its source


@pytest.mark.parametrize("preset", ["deepseek/v3", "deepseek/0.8b-a0.2b", "deepseek/26m"])
def test_router_biases_are_buffers(preset: str):
    """58 layers of 256 in V3: saved with the weights, changed by the balancing rule, never by the optimiser."""
    fields = fields_of(preset)
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(MODELS / f"{preset}.yaml")
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    layers = fields["num_hidden_layers"] - fields["first_k_dense_replace"]
    assert sum(b.numel() for b in biases.values()) == layers * fields["n_routed_experts"]
    assert biases.keys() <= model.state_dict().keys()
    assert all(b.dtype == torch.float32 for b in biases.values())


def test_llama_7b_has_seven_billion_parameters():
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(MODELS / "llama" / "7b.yaml")
    assert abs(model.get_num_params() - 7e9) < 0.1 * 7e9


def test_logits_of_llama_1b_without_memory():
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(MODELS / "llama" / "1b.yaml")
        x = torch.zeros(2, 128, dtype=torch.int64)
        assert model(x).logits.shape == (2, 128, 32000)


@pytest.mark.parametrize("preset", TOTAL)
def test_a_pass_has_the_right_shape(preset: str):
    """A pass of every preset, on the meta device and with two layers past the dense ones."""
    fields = fields_of(preset)
    layers = min(fields["num_hidden_layers"], fields.get("first_k_dense_replace", 0) + 2)
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(MODELS / f"{preset}.yaml", {"num_hidden_layers": layers})
        x = torch.zeros(2, 16, dtype=torch.int64)
        assert model(x).logits.shape == (2, 16, fields["vocab_size"])
        assert model(x, labels=x).loss.shape == ()


def test_files_hold_no_key_twice():
    """YAML lets the last of two equal keys win, silently."""
    for path in MODELS.rglob("*.yaml"):
        keys = re.findall(r"^(\w+):", Path(path).read_text(), flags=re.MULTILINE)
        assert len(keys) == len(set(keys)), path


# config.json of the hub, as their authors wrote them, years apart and with different versions of transformers.
HUB = json.loads((ROOT / "tests" / "hub_configs.json").read_text())


@pytest.mark.parametrize("preset", HUB)
def test_presets_equal_the_hub_file(preset: str, tmp_path: Path):
    """A published config.json is a model file as it is, and means what the preset means."""
    (tmp_path / "config.json").write_text(json.dumps(HUB[preset]))
    found, expected = (
        ModelRegistry.load_config(path).model_dump() for path in (tmp_path / "config.json", MODELS / f"{preset}.yaml")
    )
    if preset == "deepseek/v3":  # the hub's file says 0.001, the paper (section 4.2) 0.0001
        assert (found.pop("aux_loss_alpha"), expected.pop("aux_loss_alpha")) == (0.001, 0.0001)
    assert found == expected
