"""Every family and variant against `transformers`, or against plain loops where it has none: logits, loss, gradients.

The weights go from our names to those of the Hugging Face hub by the few lines of `hub_tensors`, which are written
apart from the exporter's, so that each checks the other.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from naive_models import naive_logits
from small_models import VOCAB, build_model, tokens
from torch import Tensor

from train.loss import IGNORE_INDEX
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.hf import hub_parts

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {  # with 8 rotated pairs, theta 500 and 64 positions, all three ranges of frequencies are there
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}

LLAMA = {**TINY, "model_type": "llama"}
QWEN2 = {**TINY, "model_type": "qwen2"}
QWEN3 = {**TINY, "model_type": "qwen3", "head_dim": 12, "rms_norm_eps": 1e-6}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
DEEPSEEK = {
    **TINY,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
}
V2 = {
    **DEEPSEEK,
    "model_type": "deepseek_v2",
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
V2_GROUPS = {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
V3 = {
    **DEEPSEEK,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "n_shared_experts": 1,
}
MINIMIND2 = {**TINY, "model_type": "minimind2"}
MINIMIND2_MOE = {**MINIMIND2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
MINIMIND3 = {**TINY, "model_type": "minimind3", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
MINIMIND3_MOE = {**MINIMIND3, "n_routed_experts": 4, "num_experts_per_tok": 1}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama, as many heads": {**LLAMA, "num_key_value_heads": 4},
    "llama, grouped, tied": {**LLAMA, "tie_word_embeddings": True},
    "llama, one key head, biases": {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {**LLAMA, "head_dim": 24},
    "llama, llama3 rope": {**LLAMA, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-6},
    "llama, yarn rope": {**LLAMA, "head_dim": 16, "rope_scaling": YARN},
    "llama, yarn rope with its own factor": {**LLAMA, "rope_scaling": {**YARN, "attention_factor": 1.0}},
    "qwen2": QWEN2,
    "qwen2, tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3, tied": {**QWEN3, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, weights as they are": {**QWEN3_MOE, "norm_topk_prob": False},
    "qwen3_moe, one expert": {**QWEN3_MOE, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "deepseek_v2": V2,
    "deepseek_v2, query latent": {**V2, "q_lora_rank": 24},
    "deepseek_v2, groups": V2_GROUPS,
    "deepseek_v2, all layers routed": {**V2, "first_k_dense_replace": 0},
    "deepseek_v2, yarn": {**V2, "rope_scaling": DEEPSEEK_YARN},
    "deepseek_v2, no experts": {**V2, "first_k_dense_replace": 3},
    "deepseek_v3": V3,
    "deepseek_v3, one group, direct queries": {**V3, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    "deepseek_v3, yarn": {**V3, "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3, unequal mscales": {**V3, "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0}},
    "deepseek_v3, weights as they are": {**V3, "norm_topk_prob": False},
    "minimind2": MINIMIND2,
    "minimind3": MINIMIND3,
    "minimind3, experts": MINIMIND3_MOE,
    "minimind3, two experts each": {**MINIMIND3_MOE, "num_experts_per_tok": 2},
}
# What the loops are asked: variants that `transformers` lacks, and the intricate ones of those that it has.
NAIVE: dict[str, dict[str, Any]] = {
    "minimind2, experts": MINIMIND2_MOE,
    "minimind2, two shared experts": {**MINIMIND2_MOE, "n_shared_experts": 2},
    "minimind2, experts without shared ones": {**MINIMIND2_MOE, "n_shared_experts": 0, "norm_topk_prob": False},
    "deepseek_v2, normalised weights": {**V2, "norm_topk_prob": True},  # `transformers` does not look at this key
    "deepseek_v2, groups and normalised weights": {**V2_GROUPS, "norm_topk_prob": True},
    **{name: VARIANTS[name] for name in ("deepseek_v2, yarn", "deepseek_v2, groups", "deepseek_v2, query latent")},
    **{name: VARIANTS[name] for name in ("deepseek_v3, yarn", "deepseek_v3, unequal mscales")},
    "deepseek_v3, groups of two": {**V3, "n_group": 2, "topk_group": 1},
}
ALL = {**VARIANTS, **NAIVE}


def hub_tensors(model: BaseModelForCausalLM, tensors: dict[str, Tensor], *, stacked: bool = False) -> dict[str, Tensor]:
    """Slices of tensors by our names under the hub's; `stacked`: experts in one tensor, as `transformers` has them."""
    config, found = model.config, {}
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for name, tensor in tensors.items():
        hub = name if name.startswith("lm_head") else f"model.{name}"
        if ".mlp.experts." in name and not stacked:
            prefix, kind = hub.rsplit(".", 1)
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                parts = {"down_proj": matrix} if kind == "down_proj" else {"gate_proj": gate, "up_proj": up}
                found |= {f"{prefix}.{expert}.{part}.weight": rows for part, rows in parts.items()}
        elif ".shared_experts." in name and config.model_type == "minimind2":  # its own code keeps them apart
            prefix, kind, _ = hub.rsplit(".", 2)
            matrices = {"down_proj": tensor.T}
            if kind == "gate_up_proj":
                matrices = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
            for part, matrix in matrices.items():
                for expert, rows in enumerate(matrix.split(config.intermediate_size)):
                    found[f"{prefix}.{expert}.{part}.weight"] = rows.T if part == "down_proj" else rows
        elif "qkv_proj" in name:
            projections = zip(("q_proj", "k_proj", "v_proj"), tensor.split([query, key, key]), strict=True)
            found |= {hub.replace("qkv_proj", projection): rows for projection, rows in projections}
        elif "gate_up_proj" in name and ".mlp.experts." not in name:
            gate, up = tensor.chunk(2)
            found |= {hub.replace("gate_up_proj", "gate_proj"): gate, hub.replace("gate_up_proj", "up_proj"): up}
        else:
            found[hub] = tensor
    return found


@pytest.mark.parametrize("fields", ALL.values(), ids=ALL)
def test_the_exporter_has_the_same_names(fields: dict[str, Any]):
    model = build_model(fields)
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {part.hub: ours[part.ours][part.place] for part in hub_parts(model)}
    expected = hub_tensors(model, ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def hugging_face_config(fields: dict[str, Any]) -> transformers.PretrainedConfig:
    """The same architecture in `transformers`; minimind's variants are llama's and Qwen3's."""
    fields = dict(fields)
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling", None) or {"rope_type": "default"}
    kind = fields.pop("model_type")
    if kind == "minimind2":
        kind = "llama"
    if kind == "minimind3":
        kind = "qwen3"
        if experts := fields.pop("n_routed_experts", None):
            kind, fields["num_experts"], fields["norm_topk_prob"] = "qwen3_moe", experts, True
            fields["moe_intermediate_size"] = fields["intermediate_size"]
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]  # theirs is 128 if not given
    rope = {**scaling, "rope_theta": theta}
    return transformers.AutoConfig.for_model(kind, **fields, rope_parameters=rope)


def hugging_face(model: BaseModelForCausalLM, fields: dict[str, Any]) -> transformers.PreTrainedModel:
    """The same model in `transformers`, weights included; its plainest attention and loop over experts."""
    config = hugging_face_config(fields)
    other = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    mine = hub_tensors(model, {**dict(model.named_parameters()), **dict(model.named_buffers())}, stacked=True)
    theirs = {**dict(other.named_parameters()), **{n: b for n, b in other.named_buffers() if "inv_freq" not in n}}
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.shape == mine[name].shape, name
        tensor.data.copy_(mine[name].detach())
    return other


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-4 of each one's norm. A gradient that is zero but for rounding has to be that on both sides."""
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm().item()
        assert difference <= 1e-4 * gradient.norm().item() + 1e-8 * total, name


def loss_and_gradients(model: BaseModelForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(ids, labels=labels).loss
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_every_gradient_equal_transformers(fields: dict[str, Any]):
    model = build_model(fields)
    other = hugging_face(model, fields)
    ids = tokens(3, 65)
    logits = model(ids[:, :-1]).logits
    torch.testing.assert_close(logits, other(ids[:, :-1]).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.3  # so that 1e-5 says something

    labels = ids[:, 1:].clone()
    labels[0, :9] = IGNORE_INDEX
    loss, gradients = loss_and_gradients(model, ids[:, :-1], labels)
    # transformers shifts: its labels stand at the position of their own token
    shifted = torch.cat([torch.full((3, 1), IGNORE_INDEX), labels], dim=1)
    expected = other(ids, labels=shifted).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    expected.backward()
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in other.named_parameters()}
    assert_gradients_equal(hub_tensors(model, gradients, stacked=True), theirs)


@pytest.mark.parametrize("fields", NAIVE.values(), ids=NAIVE)
def test_logits_loss_and_every_gradient_equal_plain_loops(fields: dict[str, Any]):
    """The loops run in float64 on a sequence long enough to leave yarn's unstretched range."""
    model = build_model(fields)
    ids = tokens(1, 25)
    leaves = {n: t.detach().double() for n, t in (*model.named_parameters(), *model.named_buffers())}
    for name, _ in model.named_parameters():
        leaves[name].requires_grad_()
    logits = naive_logits(
        {"rms_norm_eps": 1e-5, "norm_topk_prob": True, **fields}, hub_tensors(model, leaves), ids[:, :-1]
    )
    torch.testing.assert_close(model(ids[:, :-1]).logits.double(), logits.detach(), rtol=0, atol=1e-5)

    labels = ids[:, 1:].clone()
    labels[0, :5] = IGNORE_INDEX
    loss, gradients = loss_and_gradients(model, ids[:, :-1], labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    expected.backward()
    assert_gradients_equal(gradients, {n: leaves[n].grad for n, _ in model.named_parameters()})


@pytest.mark.parametrize("fields", ALL.values(), ids=ALL)
def test_documents_do_not_see_each_other(fields: dict[str, Any]):
    """A document in a row gives the logits that it gives alone, whatever the others hold."""
    model, length, ends = build_model(fields), 50, [13, 14, 40]
    ids = tokens(2, length)
    borders = list(itertools.pairwise([0, *ends, length]))
    positions = torch.cat([torch.arange(b - a) for a, b in borders]).expand(2, length)
    logits = model(ids, position_ids=positions, mask_documents=True).logits
    for start, stop in borders:
        torch.testing.assert_close(logits[:, start:stop], model(ids[:, start:stop]).logits, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[:, 14:40] = (changed[:, 14:40] + 1) % VOCAB
    again = model(changed, position_ids=positions, mask_documents=True).logits
    torch.testing.assert_close(again[:, :14], logits[:, :14], rtol=0, atol=1e-6)
    torch.testing.assert_close(again[:, 40:], logits[:, 40:], rtol=0, atol=1e-6)
    open_row = model(changed, position_ids=positions).logits  # without the mask the last document sees the change
    assert (open_row[:, 40:] - model(ids, position_ids=positions).logits[:, 40:]).abs().max() > 1e-3


COMPILED = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE, "deepseek_v3": V3, "minimind2, experts": MINIMIND2_MOE}


@pytest.mark.slow
@pytest.mark.parametrize("fields", COMPILED.values(), ids=COMPILED)
def test_a_compiled_block_equals_eager(fields: dict[str, Any]):
    """One graph, forward and backward, with a document mask: of the last block, the one with experts."""
    torch.compiler.reset()
    ids, positions = tokens(2, 33), torch.cat([torch.arange(12), torch.arange(20)]).expand(2, 32)
    found = []
    for compiled in (False, True):
        model = build_model(fields)
        if compiled:
            model.layers[-1].compile(fullgraph=True)
        loss = model(ids[:, :-1], labels=ids[:, 1:], position_ids=positions, mask_documents=True).objective
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    assert_gradients_equal(found[1][1], found[0][1])


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_config_that_transformers_wrote_is_a_model_file(fields: dict[str, Any], tmp_path: Path):
    """Every default that `transformers` writes is known or refused; what comes back is the same architecture."""
    hugging_face_config(fields).save_pretrained(tmp_path)
    config, expected = ModelRegistry.load_config(tmp_path / "config.json"), ModelRegistry.parse_config(fields, "test")
    with torch.device("meta"):
        model, same = (ModelRegistry.create_model(c.model_type, c) for c in (config, expected))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in same.named_parameters()}
    torch.testing.assert_close(model.rotary_frequencies(), same.rotary_frequencies())
    kept = {"rms_norm_eps", "tie_word_embeddings", "num_experts_per_tok", "first_k_dense_replace", "topk_group"}
    kept |= {"n_group", "topk_method", "routed_scaling_factor", "norm_topk_prob", "max_position_embeddings"}
    if config.model_type == expected.model_type:  # minimind's come back as llama and qwen
        assert config.model_dump(include=kept) == expected.model_dump(include=kept)
