"""Attention: which kernel, and the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.models.positions import Positions


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, and why it is the one."""

    name: str
    reason: str


def choose_kernel(
    device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int, *, documents: bool, flash: bool = True
) -> Kernel:
    """The kernel for a place."""
    return Kernel("sdpa", "torch's fused attention")


def attend(query: Tensor, key: Tensor, value: Tensor, positions: Positions, scale: float) -> Tensor:
    """Attention."""
    mask = positions.mask
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
