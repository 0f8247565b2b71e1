"""Weights and configurations of Hugging Face folders: names, places, shards, ranks, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_models import build_model, tokens
from test_parity import ALL, DEEPSEEK_YARN, LLAMA3, MINIMIND2_MOE, QWEN3_MOE, V3, VARIANTS
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from shards.errors import UserError
from train.distributed import Ranks
from train.layout import Layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.hf import hub_parts, load_hf_weights, load_pretrained, model_file
from train.models.hf_config import hf_config
from train.parallel import shard
from train.pieces import pieces
from train.pipeline import keep_stage
from train.tensor_parallel import cut_matrices


def write_folder(folder: Path, model: BaseModelForCausalLM, shards: int = 1) -> dict[str, torch.Tensor]:
    """The folder that a model has on the hub; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tensors = {part.hub: state[part.ours][part.place].clone() for part in hub_parts(model)}
    names = sorted(tensors)
    weight_map = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(names)}
    for file in set(weight_map.values()):
        content = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(content, folder / (file if shards > 1 else "model.safetensors"), metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if model.config.model_type == "minimind2":
        (folder / "model.yaml").write_text(yaml.safe_dump(model.config.model_dump(exclude_none=True)))
    else:
        (folder / "config.json").write_text(json.dumps(hf_config(model.config, "float32")))
    return tensors


@pytest.mark.parametrize("fields", ALL.values(), ids=ALL)
def test_every_number_of_ours_has_one_name_on_the_hub(fields):
    model = build_model(fields)
    parts = hub_parts(model)
    assert len({part.hub for part in parts}) == len(parts)
    seen = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    for part in parts:
        seen[part.ours][part.place] += 1
    assert all((counts == 1).all() for counts in seen.values())
    order = [part.ours for part in parts]
    assert sum(a != b for a, b in zip(order, [None, *order], strict=False)) == len(seen)  # each is visited once


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_names_and_configuration_are_those_that_transformers_writes(fields, tmp_path):
    """Ours -> transformers -> its save_pretrained -> ours: equal names, tensors, configuration and logits."""
    model = build_model(fields).eval()
    tensors = write_folder(tmp_path / "ours", model)
    if fields["model_type"] == "minimind2":
        (tmp_path / "ours" / "config.json").write_text(json.dumps(hf_config(model.config, "float32")))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = tokens(2, 30)
    expected = model(ids).logits
    torch.testing.assert_close(other(ids).logits, expected, rtol=0, atol=1e-5)
    other.save_pretrained(tmp_path / "theirs")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    again = load_pretrained(tmp_path / "theirs")
    assert torch.equal(again(ids).logits, expected)
    if not fields["model_type"].startswith("minimind"):
        ours = ModelRegistry.load_config(tmp_path / "ours" / "config.json")
        assert again.config == model.config == ours


@pytest.mark.parametrize("fields", [QWEN3_MOE, V3, MINIMIND2_MOE], ids=["qwen3_moe", "deepseek_v3", "minimind2"])
def test_shards_torch_files_and_stacked_experts(fields, tmp_path):
    """The same weights in several files, as one file of torch, and with the experts of a layer as one tensor."""
    model, ids = build_model(fields).eval(), tokens(2, 20)
    tensors = write_folder(tmp_path / "shards", model, shards=3)
    expected = model(ids).logits
    assert torch.equal(load_pretrained(tmp_path / "shards")(ids).logits, expected)

    write_folder(tmp_path / "torch", model)
    (tmp_path / "torch" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "torch" / "full_sft_768.pth")
    assert torch.equal(load_pretrained(tmp_path / "torch")(ids).logits, expected)

    if fields is not MINIMIND2_MOE:
        write_folder(tmp_path / "stacked", model)
        kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        stacked = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if ".mlp.experts." in name}
        save_file(kept | stacked, tmp_path / "stacked" / "model.safetensors")
        assert torch.equal(load_pretrained(tmp_path / "stacked")(ids).logits, expected)


def test_dtypes(tmp_path):
    """Weights are cast to the model's dtype; a router's bias stays float32."""
    model = build_model(V3)
    tensors = write_folder(tmp_path, model)
    half = {name: tensor.bfloat16() if "bias" not in name else tensor for name, tensor in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    wide, narrow = load_pretrained(tmp_path), load_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        expected = tensor if "correction_bias" in name else tensor.bfloat16().float()
        assert torch.equal(wide.state_dict()[name], expected)
        assert wide.state_dict()[name].dtype == torch.float32
        assert torch.equal(narrow.state_dict()[name].float(), expected)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert narrow(tokens(1, 5)).logits.isfinite().all()


LAYOUTS = [("fsdp", 1, 1, 3, 1), ("hsdp", 1, 2, 2, 1), ("ddp", 1, 2, 1, 2), ("fsdp", 1, 1, 5, 2), ("fsdp", 2, 1, 2, 2)]


def pieces_of_rank(folder: Path, rank: int, sizes: tuple[Any, ...]) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """What a rank of a layout loads; in a process of its own, as torch keeps meshes of an earlier rank."""
    torch.set_num_threads(1)
    world_size = math.prod(sizes[1:])
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    layout = Layout(Ranks(rank, world_size, torch.device("cpu"), None), *sizes)
    config = ModelRegistry.load_config(model_file(folder))
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    if layout.pp > 1:
        keep_stage(model, layout)
    if layout.tp > 1:
        cut_matrices(model, layout)
    if layout.strategy != "ddp":
        shard(model, layout)
    model.to_empty(device="cpu")
    load_hf_weights(model, folder)
    return [
        (name, piece.offsets, piece.tensor.numpy())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        for piece in pieces(tensor, model.cuts.get(name))
    ]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize("fields", [V3, MINIMIND2_MOE], ids=["deepseek_v3", "minimind2"])
def test_each_rank_of_a_layout_gets_its_pieces(fields, sizes, tmp_path):
    """What the ranks hold, put together, is the whole; 8 experts and 400 rows leave some of them short."""
    whole = build_model(fields)
    write_folder(tmp_path, whole, shards=2)
    expected = whole.state_dict()
    seen = {name: torch.zeros(tensor.shape) for name, tensor in expected.items()}
    ranks = math.prod(sizes[1:])
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(pieces_of_rank, [(tmp_path, rank, sizes) for rank in range(ranks)], chunksize=1)
    for name, offsets, values in itertools.chain.from_iterable(found):
        place = tuple(slice(first, first + size) for first, size in zip(offsets, values.shape, strict=True))
        assert torch.equal(torch.from_numpy(values), expected[name][place]), name
        seen[name][place] += 1
    assert all((counts >= 1).all() for counts in seen.values())


def test_a_head_that_is_the_embedding(tmp_path):
    """A copy of it in the file is no matter where it is tied; where it is not, the file must have it."""
    tied = build_model(ALL["llama, grouped, tied"])
    tensors = write_folder(tmp_path, tied)
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # of Llama 2's files
    save_file({**tensors, **tables, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(tokens(1, 9)).logits, tied(tokens(1, 9)).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: lm_head\.weight\n.*tie_word_embeddings: true"):
        load_pretrained(tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    model = build_model(V3)
    tensors = write_folder(tmp_path, model)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


BAD: dict[str, tuple[str, str]] = {
    "missing": ("missing", r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"),
    "unexpected": ("unexpected", r"unexpected: model\.layers\.7\.extra$"),
    "shape": ("shape", r"of another shape: model\.norm\.weight \[31\] instead of \[32\]$"),
    "quantised": ("quantised", r"quantised.*: model\.norm\.weight F8_E4M3"),
    "no weights": ("no weights", r"no weights here; expected model\.safetensors"),
    "no config": ("no config", r"no model here"),
    "missing shard": ("missing shard", r"names 2 files, of which model-00002-of-00002\.safetensors missing"),
    "bad index": ("bad index", r"not readable as an index"),
    "cut file": ("cut file", r"not readable as safetensors"),
    "pickle": ("pickle", r"not readable as a file of tensors"),
    "no dictionary": ("no dictionary", r"expected a dictionary of tensors"),
    "two files": ("two files", r"2 weight files \(a\.pth, b\.pth\) here"),
    "run folder": ("run folder", r"this is a run folder; minigpt-export"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_folders_that_do_not_fit(damage, message, tmp_path):
    tensors = write_folder(
        tmp_path, build_model(ALL["qwen3"]), shards=2 if damage in ("missing shard", "bad index") else 1
    )
    path = tmp_path / "model.safetensors"
    changed: dict[str, dict[str, Any]] = {
        "missing": {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"},
        "unexpected": {**tensors, "model.layers.7.extra": torch.zeros(2)},
        "shape": {**tensors, "model.norm.weight": torch.zeros(31)},
        "quantised": {**tensors, "model.norm.weight": torch.zeros(32, dtype=torch.float8_e4m3fn)},
    }
    if damage in changed:
        save_file(changed[damage], path)
    elif damage == "no config":
        (tmp_path / "config.json").unlink()
    elif damage == "missing shard":
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
    elif damage == "bad index":
        (tmp_path / "model.safetensors.index.json").write_text("[]")
    elif damage == "cut file":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    if damage == "pickle":
        torch.save({"a": Path("x")}, tmp_path / "a.pth")
    if damage == "no dictionary":
        torch.save([torch.zeros(1)], tmp_path / "a.pth")
    if damage == "two files":
        torch.save(tensors, tmp_path / "a.pth")
        torch.save(tensors, tmp_path / "b.pth")
    if damage == "run folder":
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


NONE = {
    "minimind2, experts": "minimind 2 with experts",
    "deepseek_v2, normalised weights": "norm_topk_prob",
}


@pytest.mark.parametrize(("name", "reason"), NONE.items())
def test_models_that_transformers_lacks_are_refused(name, reason):
    with pytest.raises(UserError, match=f"{reason}.*--format pth"):
        hf_config(build_model(ALL[name]).config, "float32")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**V3, "n_shared_experts": None}, "without shared experts"),
        ({**V3, "n_group": 8, "topk_group": 4}, "groups of one expert"),
        ({**V3, "scoring_func": "softmax", "topk_method": "greedy"}, "other than sigmoid"),
        ({**V3, "model_type": "deepseek_v2", "norm_topk_prob": False}, "other than softmax"),
    ],
)
def test_deepseek_beyond_transformers(fields, reason):
    config = ModelRegistry.parse_config(fields, "test")
    with pytest.raises(UserError, match=reason):
        hf_config(config, "float32")


def test_a_deepseek_without_experts(tmp_path):
    """transformers must have some number of experts; none of its layers uses them."""
    model = build_model({**V3, "n_routed_experts": None})
    write_folder(tmp_path, model)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = tokens(1, 20)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert torch.equal(load_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_older_readers_find_theta_and_scaling():
    config = hf_config(build_model({**V3, "rope_scaling": DEEPSEEK_YARN}).config, "bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert {**config["rope_scaling"], "rope_theta": 500.0} == config["rope_parameters"]
    assert config["rope_scaling"]["mscale"] == 0.707
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    plain = hf_config(build_model(ALL["qwen3"]).config, "bfloat16")
    assert "rope_scaling" not in plain
    llama3 = hf_config(build_model(ALL["llama, llama3 rope"]).config, "bfloat16")
    assert llama3["rope_scaling"] == LLAMA3


# Keys and values as in the config.json of models on the hub, with small sizes.
HUB: dict[str, dict[str, Any]] = yaml.safe_load("""
sizes: &sizes
  {hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4,
  max_position_embeddings: 4096, vocab_size: 400, hidden_act: silu, initializer_range: 0.02, use_cache: true,
  tie_word_embeddings: false, attention_dropout: 0.0, bos_token_id: 1, eos_token_id: [2, 3], torch_dtype: bfloat16,
  transformers_version: 4.43.0}
Llama-2:
  {<<: *sizes, _name_or_path: meta-llama/Llama-2-7b-hf, architectures: [LlamaForCausalLM], model_type: llama,
  pretraining_tp: 1, rms_norm_eps: 1.0e-05, rope_scaling: null}
Llama-3.2:
  {<<: *sizes, model_type: llama, attention_bias: false, head_dim: 16, mlp_bias: false, pretraining_tp: 1,
  rms_norm_eps: 1.0e-05, rope_theta: 500000.0, rope_scaling: {rope_type: llama3, factor: 32.0, low_freq_factor: 1.0,
  high_freq_factor: 4.0, original_max_position_embeddings: 8192}}
Qwen2.5:
  {<<: *sizes, model_type: qwen2, max_window_layers: 28, rms_norm_eps: 1.0e-06, rope_theta: 1000000.0,
  sliding_window: 32768, use_mrope: false, use_sliding_window: false}
Qwen3-30B-A3B:
  {<<: *sizes, model_type: qwen3_moe, attention_bias: false, decoder_sparse_step: 1, head_dim: 16,
  max_window_layers: 48, mlp_only_layers: [], moe_intermediate_size: 32, norm_topk_prob: true, num_experts: 8,
  num_experts_per_tok: 2, output_router_logits: false, rms_norm_eps: 1.0e-06, rope_scaling: null,
  rope_theta: 1000000.0, router_aux_loss_coef: 0.001, sliding_window: null, use_sliding_window: false}
DeepSeek-V2-Lite:
  {<<: *sizes, model_type: deepseek_v2, attention_bias: false, auto_map: {}, aux_loss_alpha: 0.001, ep_size: 1,
  first_k_dense_replace: 1, kv_lora_rank: 16, moe_intermediate_size: 32, moe_layer_freq: 1, n_group: 1,
  n_routed_experts: 8, n_shared_experts: 2, norm_topk_prob: false, num_experts_per_tok: 3, pretraining_tp: 1,
  q_lora_rank: null, qk_nope_head_dim: 16, qk_rope_head_dim: 8, rms_norm_eps: 1.0e-06, rope_theta: 10000,
  routed_scaling_factor: 1.0, scoring_func: softmax, seq_aux: true, topk_group: 1, topk_method: greedy,
  v_head_dim: 16, rope_scaling: {beta_fast: 32, beta_slow: 1, factor: 40, mscale: 0.707, mscale_all_dim: 0.707,
  original_max_position_embeddings: 4096, type: yarn}}
DeepSeek-V3:
  {<<: *sizes, model_type: deepseek_v3, attention_bias: false, auto_map: {}, aux_loss_alpha: 0.001, ep_size: 1,
  first_k_dense_replace: 1, kv_lora_rank: 16, moe_intermediate_size: 32, moe_layer_freq: 1, n_group: 4,
  n_routed_experts: 8, n_shared_experts: 1, norm_topk_prob: true, num_experts_per_tok: 3, num_nextn_predict_layers: 1,
  pretraining_tp: 1, q_lora_rank: 24, qk_nope_head_dim: 16, qk_rope_head_dim: 8, rms_norm_eps: 1.0e-06,
  rope_theta: 10000, routed_scaling_factor: 2.5, scoring_func: sigmoid, seq_aux: true, topk_group: 2,
  topk_method: noaux_tc, v_head_dim: 16, rope_scaling: {beta_fast: 32, beta_slow: 1, factor: 40, mscale: 1.0,
  mscale_all_dim: 1.0, original_max_position_embeddings: 4096, type: yarn}}
""")
del HUB["sizes"]


@pytest.mark.parametrize("fields", HUB.values(), ids=HUB)
def test_configurations_of_the_hub_are_model_files(fields, tmp_path):
    """Read by us and by transformers they are the same model."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = ModelRegistry.load_config(tmp_path / "config.json")
    model = ModelRegistry.create_model(config.model_type, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.1, generator=generator)
    write_folder(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids = tokens(2, 40)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_quantised_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**HUB["Llama-2"], "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UserError, match=re.escape("quantization_config")):
        load_pretrained(tmp_path)
