"""The config.json of a model, for a native architecture of transformers and for whatever else reads such files."""

from __future__ import annotations

from typing import Any

from shards.errors import UserError
from train.models.base_config import BaseModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_OURS = ("use_flash_attention", "gradient_checkpointing", "router_bias_update_rate")


def hf_config(config: BaseModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json without the ids of special tokens.

    Positions are written twice: `rope_theta` and `rope_scaling`, which every reader knows, and `rope_parameters` of
    transformers 5. Fields that are None are left out, except where a reader would put a number in their place.

    Args:
        config: of any family.
        dtype: of the weights, such as "bfloat16".

    Raises:
        UserError: transformers has no architecture that computes this model; the message says why.
    """
    fields = _native_fields({k: v for k, v in config.model_dump(mode="json").items() if k not in _OURS})
    fields = {key: value for key, value in fields.items() if value is not None or key == "q_lora_rank"}
    scaling = _scaling(fields.pop("rope_scaling", None) or {})
    return {
        "architectures": [_ARCHITECTURES[fields["model_type"]]],
        **fields,
        **({"rope_scaling": scaling} if scaling else {}),
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": fields["rope_theta"]},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
    }


def _scaling(scaling: dict[str, Any]) -> dict[str, Any]:
    """The fields that this kind of scaling has; transformers warns of others."""
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return {}
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    }
    kept = ("rope_type", "factor", "original_max_position_embeddings", *names[kind])
    return {name: scaling[name] for name in kept if scaling.get(name) is not None}


def _native_fields(fields: dict[str, Any]) -> dict[str, Any]:
    match fields["model_type"]:
        case "minimind2" | "minimind3":
            return _minimind(fields)
        case "deepseek_v2":
            return _deepseek_v2(fields)
        case "deepseek_v3":
            return _deepseek_v3(fields)
        case "qwen2" | "qwen3":
            experts = ("norm_topk_prob", "router_aux_loss_coef")
            return {key: value for key, value in fields.items() if key not in experts}
        case name if name not in _ARCHITECTURES:
            raise _none_for(f"model_type {name}")
    return fields


def _minimind(fields: dict[str, Any]) -> dict[str, Any]:
    """minimind 2 is a llama, minimind 3 a qwen 3, with experts a qwen 3 MoE."""
    names = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "aux_loss_alpha", "norm_topk_prob")
    experts = {name: fields.pop(name, None) for name in names}
    if fields["model_type"] == "minimind2":
        if experts["n_routed_experts"] is not None:
            raise _none_for("minimind 2 with experts (Qwen3-MoE has query and key norms and no shared expert)")
        return {**fields, "model_type": "llama", "attention_bias": False, "mlp_bias": False}
    if experts["n_routed_experts"] is None:
        return {**fields, "model_type": "qwen3", "attention_bias": False}
    layers = fields["num_hidden_layers"]
    return {
        **fields,
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "num_experts": experts["n_routed_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "moe_intermediate_size": fields["intermediate_size"],
        "norm_topk_prob": experts["norm_topk_prob"],
        # Qwen's coefficient is for a mean over layers of a loss that is top_k at its best, not for a sum of ones.
        "router_aux_loss_coef": experts["aux_loss_alpha"] * layers / experts["num_experts_per_tok"],
        "decoder_sparse_step": 1,
    }


def _without_experts(fields: dict[str, Any]) -> dict[str, Any]:
    """All layers dense: the experts, of which transformers needs some number, are never used."""
    sizes = {
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 1,
    }
    return {**fields, **sizes, "first_k_dense_replace": fields["num_hidden_layers"]}


def _deepseek_v2(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("head_dim")  # of no use beside the parts of a latent head, and readers give it different meanings
    if fields["n_routed_experts"] is None:
        return _without_experts(fields)
    if fields["norm_topk_prob"] and fields["num_experts_per_tok"] > 1:
        raise _none_for("deepseek_v2 with norm_topk_prob (DeepseekV2 does not normalise the experts' weights)")
    if fields["scoring_func"] != "softmax" or fields["topk_method"] == "noaux_tc":
        raise _none_for("deepseek_v2 with a router other than softmax with greedy or group_limited_greedy")
    return _check_shared(fields)


def _deepseek_v3(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("head_dim")
    groups = {"n_group": fields["n_group"] or 1, "topk_group": fields["topk_group"] or 1}
    if fields["n_routed_experts"] is None:
        return _without_experts(fields)
    if fields["scoring_func"] != "sigmoid" or fields["topk_method"] != "noaux_tc":
        raise _none_for("deepseek_v3 with a router other than sigmoid with noaux_tc")
    if fields["n_routed_experts"] // groups["n_group"] < 2:
        raise _none_for("deepseek_v3 with groups of one expert (a group's score is that of its best two)")
    return _check_shared({**fields, **groups})


def _check_shared(fields: dict[str, Any]) -> dict[str, Any]:
    if not fields["n_shared_experts"]:
        raise _none_for(f"{fields['model_type']} without shared experts")
    return fields


def _none_for(what: str) -> UserError:
    return UserError(
        f"transformers has no architecture for {what}; --format pth writes the weights as one file of torch with "
        "model.yaml, which this program and plain PyTorch read"
    )
