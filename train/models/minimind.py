"""The minimind family (github.com/jingyaogong/minimind): small models that a beginner trains in hours.

minimind2 has llama's blocks, minimind3 Qwen3's (normed query and key heads). Either may have routed experts of the size
of its dense feed-forward: minimind2 beside shared ones, minimind3 without.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import nn

from train.models.attention import Attention
from train.models.base_config import BaseModelConfig
from train.models.linear import SwiGLU
from train.models.moe import MixtureOfExperts, Router
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM, DecoderBlock


class MiniMindConfig(BaseModelConfig):
    """Fields of minimind's own configuration, with the names that DeepSeek has for the experts."""

    model_type: Literal["minimind2", "minimind3"]
    rope_theta: PositiveFloat = 1_000_000.0
    n_routed_experts: PositiveInt | None = None
    n_shared_experts: NonNegativeInt = 0
    num_experts_per_tok: PositiveInt | None = None
    norm_topk_prob: bool = True
    aux_loss_alpha: NonNegativeFloat = 0.01

    @model_validator(mode="after")
    def _check_experts(self) -> MiniMindConfig:
        if self.n_routed_experts is None:
            if self.n_shared_experts or self.num_experts_per_tok:
                raise ValueError("n_shared_experts and num_experts_per_tok need n_routed_experts")
        elif self.num_experts_per_tok is None or self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError("n_routed_experts needs num_experts_per_tok, at most as many")
        if self.model_type == "minimind3" and self.n_shared_experts:
            raise ValueError("minimind3 has no shared experts")
        return self

    @property
    def balance_loss_weight(self) -> float:
        """Coefficient of the experts' balance loss."""
        return self.aux_loss_alpha if self.n_routed_experts else 0.0


@ModelRegistry.family("minimind", MiniMindConfig)
class MiniMindForCausalLM(BaseModelForCausalLM):
    """A minimind of the given configuration."""

    def __init__(self, config: MiniMindConfig) -> None:
        super().__init__(config, [_block(config) for _ in range(config.num_hidden_layers)])


def _block(config: MiniMindConfig) -> DecoderBlock:
    return DecoderBlock(config, Attention(config, qk_norm=config.model_type == "minimind3"), _mlp(config))


def _mlp(config: MiniMindConfig) -> nn.Module:
    hidden, size = config.hidden_size, config.intermediate_size
    if config.n_routed_experts is None:
        return SwiGLU(hidden, size)
    assert config.num_experts_per_tok is not None
    router = Router(hidden, config.n_routed_experts, config.num_experts_per_tok, normalize=config.norm_topk_prob)
    return MixtureOfExperts(hidden, size, router, shared_size=config.n_shared_experts * size)
