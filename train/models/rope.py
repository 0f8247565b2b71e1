"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

Pairs of dimensions of a head vector x at position p are turned by angles p * inv_freq:

    (x1 cos - x2 sin, x2 cos + x1 sin)    with    inv_freq[i] = theta^(-2i / dim)

Llama and Qwen pair dimension i with i + dim / 2 (`rotate`), DeepSeek 2i with 2i + 1 (`rotate_pairs`). No table is
stored: the angles of a batch are one outer product, so there is no buffer to shard, save or outgrow.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from shards.settings import Settings


class RopeScaling(Settings):
    """`rope_scaling` of a model file, Hugging Face's names: how frequencies change for contexts beyond the original.

    `llama3` uses factor, low_freq_factor and high_freq_factor; `yarn` uses factor, the betas, the mscales and
    attention_factor (Peng et al. 2023, arXiv 2309.00071).
    """

    rope_type: Literal["default", "llama3", "yarn"] = "default"
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.rope_type != "default" and self.factor is None:
            raise ValueError(f"rope_type {self.rope_type} needs a factor")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor")
        return self

    @property
    def cos_sin_factor(self) -> float:
        """By which yarn multiplies cosines and sines, and so every rotated query and key."""
        if self.rope_type != "yarn" or self.factor is None:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1 (arXiv 2309.00071, equation 22; `mscale` is DeepSeek's weight of it)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angular frequencies of `dim` rotated dimensions, float32 [dim / 2], radians per position.

    With `llama3` scaling (Llama 3.1, as in the model's reference code) wavelengths longer than original /
    low_freq_factor are stretched by `factor`, those shorter than original / high_freq_factor are kept, and those
    between are blended linearly in original / wavelength. With `yarn` the blend is linear in the index, between the
    dimensions that turn `beta_fast` and `beta_slow` times within the original length (arXiv 2309.00071, section 3.2).
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / theta**exponent
    if scaling is None or scaling.factor is None or scaling.rope_type == "default":
        return frequencies
    original = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        turns = original * frequencies / (2 * math.pi)  # original length / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    else:

        def index_of(turns: float) -> float:
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(index_of(scaling.beta_fast)), 0)
        last = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
        keep = 1.0 - ramp.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [batch, length]: two float32 tensors [batch, length, 1, dim / 2]."""
    angles = (position_ids[..., None].float() * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [batch, length, heads, dim], halves paired; computed in float32, returned in the dtype of `x`."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with neighbours paired. The pairs come back as halves: queries and keys alike, so products agree."""
    x1, x2 = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
