"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-rotation layout of Llama and Qwen.

A head vector x = (x1, x2), halves of size head_dim / 2, at position p becomes

    (x1 cos - x2 sin, x2 cos + x1 sin)    with angles p * inv_freq,  inv_freq[i] = theta^(-2i / head_dim)

No table is stored: the angles of a batch are one outer product, so there is no buffer to shard, save or outgrow.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from shards.settings import Settings


class RopeScaling(Settings):
    """`rope_scaling` of a model file, Hugging Face's names; `llama3` is the only scaling of this family."""

    rope_type: Literal["default", "llama3"] = "default"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angular frequencies, float32 [head_dim / 2], radians per position.

    With `llama3` scaling (Llama 3.1, as in the model's reference code) wavelengths longer than original /
    low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor are kept, and those
    between are blended linearly in original / wavelength.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponent
    if scaling is None or scaling.rope_type == "default":
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # original length / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [batch, length]: two float32 tensors [batch, length, 1, head_dim / 2]."""
    angles = (position_ids[..., None].float() * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [batch, length, heads, head_dim]; computed in float32, returned in the dtype of `x`."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
