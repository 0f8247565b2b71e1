"""The llama family: Llama 1, 2, 3.x and the many models of that layout.

Pre-norm blocks of grouped-query attention with rotary positions and SwiGLU, RMSNorm, no biases, head tied or not
(Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from train.models.attention import Attention
from train.models.base_config import BaseModelConfig
from train.models.linear import SwiGLU
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM, DecoderBlock


class LlamaConfig(BaseModelConfig):
    """Field names of Hugging Face's `LlamaConfig`."""

    fixed_keys: ClassVar[dict[str, tuple[Any, ...]]] = {"rope_interleaved": (False,)}

    model_type: Literal["llama"] = "llama"
    attention_bias: bool = False
    mlp_bias: bool = False


@ModelRegistry.family("llama", LlamaConfig)
class LlamaForCausalLM(BaseModelForCausalLM):
    """A llama of the given configuration."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, [_block(config) for _ in range(config.num_hidden_layers)])


def _block(config: LlamaConfig) -> DecoderBlock:
    attention = Attention(config, qkv_bias=config.attention_bias, output_bias=config.attention_bias)
    return DecoderBlock(config, attention, SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))
