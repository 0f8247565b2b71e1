"""Causal self-attention with grouped query heads (GQA) and rotary positions: llama, qwen, minimind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.models.attend import attend
from train.models.base_config import BaseModelConfig
from train.models.cache import KeyValueCache
from train.models.linear import Linear, RMSNorm
from train.models.positions import Positions
from train.models.rope import rotate


class Attention(nn.Module):
    """Query, key and value are one matrix product: `qkv_proj.weight` holds their rows in this order.

    With `qk_norm` every query and key head is normalised before it is rotated (Qwen3, arXiv 2505.09388, section 2).
    """

    def __init__(
        self, config: BaseModelConfig, *, qkv_bias: bool = False, output_bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None

    def forward(self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """Attend over `x` [batch, length, hidden] and, with a cache, over what came before."""
        batch, length, _ = x.shape
        heads = self.qkv_proj(x).view(batch, length, -1, self.head_dim)
        turned, value = heads.split([sum(self.heads[:2]), self.heads[2]], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = turned.split(self.heads[:2], dim=2)
            turned = torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)
        query, key = rotate(turned, positions.cos, positions.sin).split(self.heads[:2], dim=2)
        if cache is not None:
            key, value = cache.update(layer, positions.position_ids, key, value)
        out = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), positions, self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
