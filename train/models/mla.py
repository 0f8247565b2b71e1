"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads come from one latent vector per token, and one rotated key is shared by the heads:

    latent = norm(W_kva x)[:rank],  rope_key = rotate(W_kva x)[rank:]
    key_h = (W_kb,h latent, rope_key),  value_h = W_vb,h latent,  scores = query_h . key_h * scale

The cache holds latent and rope_key only. A pass of few queries over many cached tokens multiplies W_kb into the query
and W_vb into the output instead of expanding the cache ("absorbed", same section): the same numbers, less work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.models.attend import attend
from train.models.cache import KeyValueCache
from train.models.linear import Linear, RMSNorm
from train.models.positions import Positions
from train.models.rope import rotate_pairs


class LatentAttention(nn.Module):
    """Names are Hugging Face's; rotary dimensions stay interleaved as in the published weights."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        scale: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.rank, self.scale = num_heads, kv_lora_rank, scale
        self.nope, self.rope, self.value_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        query_size = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, 1e-6)  # not the model's eps, in the published code too
            self.q_b_proj = Linear(q_lora_rank, query_size, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, 1e-6)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        # The absorbed form is less work where queries * (2 rank - nope - value) < rank * (nope + value).
        per_head = qk_nope_head_dim + v_head_dim
        self.absorbed_below = kv_lora_rank * per_head / max(2 * kv_lora_rank - per_head, 1)

    def forward(self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """Attend over `x` [batch, length, hidden] and, with a cache, over what came before."""
        batch, length, _ = x.shape
        query = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query, rope_query = query.view(batch, length, self.num_heads, -1).split([self.nope, self.rope], dim=-1)
        rope_query = rotate_pairs(rope_query, positions.cos, positions.sin)
        latent, rope_key = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent)
        rope_key = rotate_pairs(rope_key[:, :, None], positions.cos, positions.sin)[:, :, 0]
        if cache is not None:
            latent, rope_key = cache.update(layer, positions.position_ids, latent, rope_key)
        if length < latent.shape[1] and length < self.absorbed_below:
            out = self.attend_absorbed(query, rope_query, latent, rope_key, positions)
        else:
            out = self.attend_expanded(query, rope_query, latent, rope_key, positions)
        return self.o_proj(out.reshape(batch, length, -1))

    def attend_expanded(
        self, query: Tensor, rope_query: Tensor, latent: Tensor, rope_key: Tensor, positions: Positions
    ) -> Tensor:
        """Keys and values of every head: [batch, length, heads, value_dim].

        Shapes: query [batch, length, heads, nope], rope_query [batch, length, heads, rope], latent [batch, keys, rank],
        rope_key [batch, keys, rope].
        """
        expanded = self.kv_b_proj(latent).view(*latent.shape[:2], self.num_heads, -1)
        key, value = expanded.split([self.nope, self.value_dim], dim=-1)
        key = torch.cat((key, rope_key[:, :, None].expand(-1, -1, self.num_heads, -1)), dim=-1)
        query = torch.cat((query, rope_query), dim=-1)
        out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), positions, self.scale)
        return out.transpose(1, 2)

    def attend_absorbed(
        self, query: Tensor, rope_query: Tensor, latent: Tensor, rope_key: Tensor, positions: Positions
    ) -> Tensor:
        """The same with all heads looking at one key, the latent itself. Shapes as in `attend_expanded`."""
        weight = self.kv_b_proj.weight.to(query.dtype).view(self.num_heads, -1, self.rank)
        key_part, value_part = weight.split([self.nope, self.value_dim], dim=1)
        query = torch.cat((torch.einsum("blhn,hnr->bhlr", query, key_part), rope_query.transpose(1, 2)), dim=-1)
        key = torch.cat((latent, rope_key), dim=-1)[:, None]
        out = attend(query, key, latent[:, None], positions, self.scale)
        return torch.einsum("bhlr,hvr->blhv", out, value_part)
