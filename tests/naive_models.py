"""Decoders written out token by token, as the papers state them: oracles where `transformers` has none.

One function, `naive_logits`, takes the fields of a model file and weights by their names on the Hugging Face hub. There
is no batching, no fused matrix and no mask: a query loops over the keys before it, a token over the experts it chose.
It covers minimind2's mixture of experts (llama's attention) and DeepSeek's V2 and V3 in all their options. Sources:

* MLA, group-limited and softmax routers: arXiv 2405.04434, sections 2.1 and 2.2
* sigmoid router with a bias for the choice only: arXiv 2412.19437, section 2.1.2, equations 12-16
* yarn: arXiv 2309.00071, with the ramp over dimension indices and the square of mscale in the softmax scale that
  DeepSeek's published code has
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def naive_logits(fields: dict[str, Any], weights: Weights, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocab] for ids [batch, length], in the dtype of the weights (float64 makes it a truth)."""
    embedding = weights["model.embed_tokens.weight"]
    head = embedding if fields.get("tie_word_embeddings") else weights["lm_head.weight"]
    rows = []
    for row in ids:
        states = [embedding[token] for token in row]
        for layer in range(fields["num_hidden_layers"]):
            states = naive_layer(fields, Prefixed(weights, f"model.layers.{layer}."), states, layer)
        states = [norm(x, weights["model.norm.weight"], fields["rms_norm_eps"]) for x in states]
        rows.append(torch.stack([head @ x for x in states]))
    return torch.stack(rows)


class Prefixed:
    """Weights of one layer by their short names."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]


def naive_layer(fields: dict[str, Any], w: Prefixed, states: list[Tensor], layer: int) -> list[Tensor]:
    """x + attention(norm(x)), then x + mlp(norm(x)), for the tokens of one sequence."""
    normed = [norm(x, w["input_layernorm.weight"], fields["rms_norm_eps"]) for x in states]
    latent = fields["model_type"].startswith("deepseek")
    attended = latent_attention(fields, w, normed) if latent else grouped_attention(fields, w, normed)
    states = [x + y for x, y in zip(states, attended, strict=True)]
    normed = [norm(x, w["post_attention_layernorm.weight"], fields["rms_norm_eps"]) for x in states]
    if fields.get("n_routed_experts") is None or layer < fields.get("first_k_dense_replace", 0):
        return [x + swiglu(w, "mlp.", y) for x, y in zip(states, normed, strict=True)]
    return [x + mixture(fields, w, y) for x, y in zip(states, normed, strict=True)]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * weight


def swiglu(w: Prefixed, prefix: str, x: Tensor) -> Tensor:
    gate = w[f"{prefix}gate_proj.weight"] @ x
    return w[f"{prefix}down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (w[f"{prefix}up_proj.weight"] @ x))


# Attention


def frequencies(theta: float, dim: int, scaling: dict[str, Any] | None) -> list[float]:
    """Radians per position of each of dim / 2 pairs."""
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if not scaling or scaling["rope_type"] == "default":
        return plain
    assert scaling["rope_type"] == "yarn"
    original = scaling["original_max_position_embeddings"]

    def index(turns: float) -> float:  # of the pair that turns so often within the original length
        return dim / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), dim - 1)
    blended = []
    for i, frequency in enumerate(plain):
        stretch = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        blended.append(frequency * (1 - stretch) + frequency / scaling["factor"] * stretch)
    return blended


def mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def turn(pairs: list[tuple[Tensor, Tensor]], position: int, freqs: list[float], factor: float) -> Tensor:
    """Each pair turned by its angle; the result lists the first members, then the second."""
    firsts, seconds = [], []
    for (x, y), frequency in zip(pairs, freqs, strict=True):
        cos, sin = factor * math.cos(position * frequency), factor * math.sin(position * frequency)
        firsts.append(x * cos - y * sin)
        seconds.append(x * sin + y * cos)
    return torch.stack(firsts + seconds)


def weighted_sum(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    shares = torch.stack(scores).softmax(0)
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)


def grouped_attention(fields: dict[str, Any], w: Prefixed, states: list[Tensor]) -> list[Tensor]:
    """Llama's: each key and value head serves heads / kv_heads query heads; pairs are (i, i + dim / 2)."""
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    dim = fields.get("head_dim") or fields["hidden_size"] // heads
    freqs = frequencies(fields["rope_theta"], dim, fields.get("rope_scaling"))

    def rotated(head: Tensor, position: int) -> Tensor:
        return turn([(head[i], head[i + dim // 2]) for i in range(dim // 2)], position, freqs, 1.0)

    queries, keys, values = [], [], []
    for position, x in enumerate(states):
        query, key = w["self_attn.q_proj.weight"] @ x, w["self_attn.k_proj.weight"] @ x
        queries.append([rotated(query[h * dim : (h + 1) * dim], position) for h in range(heads)])
        keys.append([rotated(key[h * dim : (h + 1) * dim], position) for h in range(kv_heads)])
        values.append((w["self_attn.v_proj.weight"] @ x).split(dim))
    outputs = []
    for now in range(len(states)):
        parts = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = [queries[now][h] @ keys[past][g] / math.sqrt(dim) for past in range(now + 1)]
            parts.append(weighted_sum(scores, [values[past][g] for past in range(now + 1)]))
        outputs.append(w["self_attn.o_proj.weight"] @ torch.cat(parts))
    return outputs


def latent_attention(fields: dict[str, Any], w: Prefixed, states: list[Tensor]) -> list[Tensor]:
    """DeepSeek's: keys and values from a latent, one rotated key for all heads; pairs are (2 i, 2 i + 1)."""
    heads, content, rope = fields["num_attention_heads"], fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    rank, value_dim = fields["kv_lora_rank"], fields["v_head_dim"]
    scaling = fields.get("rope_scaling")
    freqs = frequencies(fields["rope_theta"], rope, scaling)
    scale, factor = (content + rope) ** -0.5, 1.0
    if scaling and scaling["rope_type"] == "yarn":
        scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        factor = mscale(scaling["factor"], scaling["mscale"]) / mscale(scaling["factor"], scaling["mscale_all_dim"])

    def rotated(part: Tensor, position: int) -> Tensor:
        return turn([(part[2 * i], part[2 * i + 1]) for i in range(rope // 2)], position, freqs, factor)

    queries, keys, values = [], [], []
    for position, x in enumerate(states):
        if fields["q_lora_rank"] is None:
            query = w["self_attn.q_proj.weight"] @ x
        else:
            compressed = norm(w["self_attn.q_a_proj.weight"] @ x, w["self_attn.q_a_layernorm.weight"], 1e-6)
            query = w["self_attn.q_b_proj.weight"] @ compressed
        compressed = w["self_attn.kv_a_proj_with_mqa.weight"] @ x
        latent = norm(compressed[:rank], w["self_attn.kv_a_layernorm.weight"], 1e-6)
        shared_key = rotated(compressed[rank:], position)
        expanded = (w["self_attn.kv_b_proj.weight"] @ latent).split(content + value_dim)
        queries.append(
            [torch.cat((part[:content], rotated(part[content:], position))) for part in query.split(content + rope)]
        )
        keys.append([torch.cat((part[:content], shared_key)) for part in expanded])
        values.append([part[content:] for part in expanded])
    outputs = []
    for now in range(len(states)):
        parts = []
        for h in range(heads):
            scores = [queries[now][h] @ keys[past][h] * scale for past in range(now + 1)]
            parts.append(weighted_sum(scores, [values[past][h] for past in range(now + 1)]))
        outputs.append(w["self_attn.o_proj.weight"] @ torch.cat(parts))
    return outputs


# Experts


def mixture(fields: dict[str, Any], w: Prefixed, x: Tensor) -> Tensor:
    """The chosen experts' outputs by their weights, and the shared experts: one wide SwiGLU, several in minimind2."""
    out = torch.zeros_like(x)
    for expert, share in chosen_experts(fields, w, x):
        out = out + share * swiglu(w, f"mlp.experts.{expert}.", x)
    if fields["model_type"] == "minimind2":
        for expert in range(fields["n_shared_experts"]):
            out = out + swiglu(w, f"mlp.shared_experts.{expert}.", x)
    elif fields.get("n_shared_experts"):
        out = out + swiglu(w, "mlp.shared_experts.", x)
    return out


def chosen_experts(fields: dict[str, Any], w: Prefixed, x: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, weight) of one token."""
    experts, top = fields["n_routed_experts"], fields["num_experts_per_tok"]
    logits = w["mlp.gate.weight"] @ x
    method = fields.get("topk_method", "greedy")
    scores = 1 / (1 + torch.exp(-logits)) if fields.get("scoring_func") == "sigmoid" else logits.softmax(0)
    choice = scores.tolist()
    if method == "noaux_tc":
        choice = [c + float(b) for c, b in zip(choice, w["mlp.gate.e_score_correction_bias"], strict=True)]
    candidates = list(range(experts))
    if method != "greedy" and fields["n_group"] > 1:
        size = experts // fields["n_group"]
        groups = [candidates[g * size : (g + 1) * size] for g in range(fields["n_group"])]
        best = 2 if method == "noaux_tc" else 1  # a group counts by the sum of its two best, or by its best
        groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
        candidates = [expert for group in groups[: fields["topk_group"]] for expert in group]
    chosen = sorted(candidates, key=lambda expert: -choice[expert])[:top]
    shares, scale = [scores[expert] for expert in chosen], fields.get("routed_scaling_factor", 1.0)
    if fields.get("norm_topk_prob") and top > 1:
        total = torch.stack(shares).sum()
        shares = [share / total for share in shares]
        if fields["model_type"] == "deepseek_v2":
            scale = 1.0  # V2's published code scales the weights only where it does not normalise them
    return [(expert, share * scale) for expert, share in zip(chosen, shares, strict=True)]
