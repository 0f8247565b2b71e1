"""The qwen family: Qwen2 and 2.5 (biases on query, key and value), Qwen3 (normed query and key heads), Qwen3-MoE.

Otherwise llama's blocks (Yang et al. 2024, arXiv 2407.10671 and 2412.15115; Yang et al. 2025, arXiv 2505.09388).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import nn

from train.models.attention import Attention
from train.models.base_config import BaseModelConfig
from train.models.linear import SwiGLU
from train.models.moe import MixtureOfExperts, Router
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM, DecoderBlock


class QwenConfig(BaseModelConfig):
    """Field names of Hugging Face's `Qwen2Config`, `Qwen3Config` and `Qwen3MoeConfig` (the fields of the experts)."""

    inert_keys: ClassVar[set[str]] = {"sliding_window", "max_window_layers", "layer_types"}
    fixed_keys: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        "attention_bias": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    }

    model_type: Literal["qwen2", "qwen3", "qwen3_moe"]
    rms_norm_eps: PositiveFloat = 1e-6
    num_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    norm_topk_prob: bool = False
    router_aux_loss_coef: NonNegativeFloat = 0.001

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        if isinstance(data, dict) and "num_local_experts" in data:  # how transformers 5 writes num_experts
            data = {"num_experts": data["num_local_experts"], **data}
            del data["num_local_experts"]
        return data

    @model_validator(mode="after")
    def _check_experts(self) -> QwenConfig:
        given = (self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size)
        if self.model_type == "qwen3_moe" and None in given:
            raise ValueError("qwen3_moe needs num_experts, num_experts_per_tok and moe_intermediate_size")
        if self.model_type != "qwen3_moe" and given != (None, None, None):
            raise ValueError(f"{self.model_type} has no experts; model_type qwen3_moe has")
        if (self.num_experts_per_tok or 0) > (self.num_experts or 0):
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        return self

    @property
    def balance_loss_weight(self) -> float:
        """Coefficient of the experts' balance loss.

        Hugging Face's coefficient is for the mean over the layers of a loss that is `num_experts_per_tok` where the
        experts are used alike; ours is a sum over the layers, each 1.
        """
        return self.router_aux_loss_coef * (self.num_experts_per_tok or 0) / self.num_hidden_layers


@ModelRegistry.family("qwen", QwenConfig)
class QwenForCausalLM(BaseModelForCausalLM):
    """A qwen of the given configuration."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config, [_block(config) for _ in range(config.num_hidden_layers)])


def _block(config: QwenConfig) -> DecoderBlock:
    second = config.model_type == "qwen2"
    return DecoderBlock(config, Attention(config, qkv_bias=second, qk_norm=not second), _mlp(config))


def _mlp(config: QwenConfig) -> nn.Module:
    if config.num_experts is None:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    assert config.num_experts_per_tok is not None
    assert config.moe_intermediate_size is not None
    router = Router(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalize=config.norm_topk_prob)
    return MixtureOfExperts(config.hidden_size, config.moe_intermediate_size, router)
