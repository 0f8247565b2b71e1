"""The llama family: Llama 1, 2, 3.x and the many models of that layout.

Pre-norm blocks of grouped-query attention with rotary positions and SwiGLU, RMSNorm, no biases, head tied or not
(Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from train.models.attention import Attention, KeyValueCache
from train.models.linear import RMSNorm, SwiGLU
from train.models.rope import RopeScaling, inverse_frequencies
from train.models.transformer import BaseModelConfig, BaseModelForCausalLM


class LlamaConfig(BaseModelConfig):
    """Field names of Hugging Face's `LlamaConfig`."""

    model_type: Literal["llama"] = "llama"
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: NonNegativeInt = 0  # 0: as many as attention heads
    head_dim: NonNegativeInt = 0  # 0: hidden_size / num_attention_heads
    hidden_act: Literal["silu"] = "silu"
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if isinstance(rope := data.pop("rope_parameters", None), dict):  # how transformers 5 writes both
            data.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            data.setdefault("rope_scaling", scaling or None)
        heads, hidden = data.get("num_attention_heads"), data.get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            data["num_key_value_heads"] = data.get("num_key_value_heads") or heads
            if not data.get("head_dim"):
                if hidden % heads:
                    raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
                data["head_dim"] = hidden // heads
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> LlamaConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions")
        return self


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            bias=config.attention_bias,
            use_flash_attention=config.use_flash_attention,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[batch, length, hidden] -> the same; the other arguments as in `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaForCausalLM(BaseModelForCausalLM):
    """A llama of the given configuration."""

    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, [LlamaBlock(config) for _ in range(config.num_hidden_layers)])

    def rotary_frequencies(self) -> Tensor:
        """Float32 [head_dim / 2]."""
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
