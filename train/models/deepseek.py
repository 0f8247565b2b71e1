"""The deepseek family: V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437).

Latent attention, and behind `first_k_dense_replace` dense layers many small routed experts beside shared ones. V2's
router is a softmax, balanced by a loss; V3's a sigmoid, balanced by a bias that only the choice of experts sees.
Without `n_routed_experts` all layers are dense. (The dense DeepSeek-LLM is a llama.)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from train.models.base_config import BaseModelConfig
from train.models.linear import SwiGLU
from train.models.mla import LatentAttention
from train.models.moe import MixtureOfExperts, Router
from train.models.registry import ModelRegistry
from train.models.rope import inverse_frequencies, yarn_mscale
from train.models.transformer import BaseModelForCausalLM, DecoderBlock


class DeepseekConfig(BaseModelConfig):
    """Field names of Hugging Face's `DeepseekV2Config` and `DeepseekV3Config`.

    `router_bias_update_rate` is V3's bias update speed (arXiv 2412.19437, section 4.2: 0.001, and 0 near the end).
    """

    inert_keys: ClassVar[set[str]] = {"ep_size", "num_nextn_predict_layers", "seq_aux", "qk_head_dim"}
    fixed_keys: ClassVar[dict[str, tuple[Any, ...]]] = {
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
        "mlp_bias": (False,),
    }

    model_type: Literal["deepseek_v2", "deepseek_v3"]
    rms_norm_eps: PositiveFloat = 1e-6
    attention_bias: bool = False
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    n_routed_experts: PositiveInt | None = None
    n_shared_experts: PositiveInt | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    first_k_dense_replace: NonNegativeInt = 0
    scoring_func: Literal["softmax", "sigmoid"]
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    n_group: PositiveInt | None = None
    topk_group: PositiveInt | None = None
    norm_topk_prob: bool
    routed_scaling_factor: PositiveFloat
    aux_loss_alpha: NonNegativeFloat = 0.001
    router_bias_update_rate: NonNegativeFloat = 0.001

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        third = data.get("model_type") == "deepseek_v3"
        defaults = {
            "scoring_func": "sigmoid" if third else "softmax",
            "topk_method": "noaux_tc" if third else "greedy",
            "norm_topk_prob": third,
            "routed_scaling_factor": 2.5 if third else 1.0,
        }
        # A config.json may give the rotary part alone as head_dim; here it is what a query head has.
        dims = [data.get("qk_nope_head_dim", 128), data.get("qk_rope_head_dim", 64)]
        return {**defaults, **data, "head_dim": sum(dims) if all(isinstance(dim, int) for dim in dims) else 0}

    @model_validator(mode="after")
    def _check(self) -> DeepseekConfig:
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("num_key_value_heads must equal num_attention_heads: latent attention has no groups")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} is odd; rotary positions turn pairs")
        if self.n_routed_experts is None:
            return self
        if self.num_experts_per_tok is None or self.moe_intermediate_size is None:
            raise ValueError("n_routed_experts needs num_experts_per_tok and moe_intermediate_size")
        if (self.scoring_func == "sigmoid") != (self.topk_method == "noaux_tc"):
            raise ValueError("topk_method noaux_tc and scoring_func sigmoid belong together")
        if self.topk_method == "group_limited_greedy" and None in (self.n_group, self.topk_group):
            raise ValueError("topk_method group_limited_greedy needs n_group and topk_group")
        groups, chosen = self.groups
        if self.n_routed_experts % groups or chosen > groups:
            raise ValueError(
                f"n_routed_experts {self.n_routed_experts} must be a multiple of n_group {groups}, and topk_group "
                f"{chosen} at most n_group"
            )
        if self.num_experts_per_tok > self.n_routed_experts // groups * chosen:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than topk_group {chosen} groups hold"
            )
        return self

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may use."""
        return (1, 1) if self.topk_method == "greedy" else (self.n_group or 1, self.topk_group or 1)

    @property
    def attention_head_dims(self) -> tuple[int, int]:
        """Dimensions of a query or key head, and of a value head."""
        return self.head_dim, self.v_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(dimensions of a query) and, with yarn, times mscale squared (the published modelling code)."""
        scale = self.attention_head_dims[0] ** -0.5
        rope = self.rope_scaling
        if rope is not None and rope.rope_type == "yarn" and rope.factor and rope.mscale_all_dim:
            scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @property
    def balance_loss_weight(self) -> float:
        """Coefficient of the experts' balance loss."""
        return self.aux_loss_alpha if self.n_routed_experts else 0.0

    @property
    def bias_update_rate(self) -> float:
        """Change of a router's correction bias per step."""
        return self.router_bias_update_rate if self.n_routed_experts and self.topk_method == "noaux_tc" else 0.0


@ModelRegistry.family("deepseek", DeepseekConfig)
class DeepseekForCausalLM(BaseModelForCausalLM):
    """A deepseek of the given configuration."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config, [_block(config, layer) for layer in range(config.num_hidden_layers)])

    def rotary_frequencies(self) -> Tensor:
        """Float32 [qk_rope_head_dim / 2]."""
        return inverse_frequencies(self.config.qk_rope_head_dim, self.config.rope_theta, self.config.rope_scaling)


def _block(config: DeepseekConfig, layer: int) -> DecoderBlock:
    attention = LatentAttention(
        config.hidden_size,
        config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        scale=config.softmax_scale,
        bias=config.attention_bias,
    )
    return DecoderBlock(config, attention, _mlp(config, layer))


def _mlp(config: DeepseekConfig, layer: int) -> nn.Module:
    if config.n_routed_experts is None or layer < config.first_k_dense_replace:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    assert config.num_experts_per_tok is not None
    assert config.moe_intermediate_size is not None
    normalize = config.norm_topk_prob and config.num_experts_per_tok > 1
    groups, top_groups = config.groups
    router = Router(
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        scoring=config.scoring_func,
        normalize=normalize,
        # V2's published code scales the weights only where it does not normalise them; V3 does both.
        scale=1.0 if normalize and config.model_type == "deepseek_v2" else config.routed_scaling_factor,
        groups=groups,
        top_groups=top_groups,
        correction_bias=config.topk_method == "noaux_tc",
    )
    shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
    return MixtureOfExperts(config.hidden_size, config.moe_intermediate_size, router, shared_size=shared)
