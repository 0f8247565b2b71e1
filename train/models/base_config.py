"""What every family's model file holds, and how a Hugging Face config.json becomes one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from shards.settings import Settings
from train.models.rope import RopeScaling

# Keys of a config.json that say nothing about the architecture.
INERT_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits"),
    *("is_llama_config", "transformers.js_config"),
}


class BaseModelConfig(Settings):
    """Fields of every family; names are Hugging Face's, so a config.json is a valid model file.

    A family adds its own fields, and to `inert_keys` and `fixed_keys` those keys of its config.json that it does not
    need, or supports with one value only.
    """

    inert_keys: ClassVar[set[str]] = set()
    fixed_keys: ClassVar[dict[str, tuple[Any, ...]]] = {}  # key: the values that mean what this code does

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: NonNegativeInt = 0  # 0: as many as attention heads
    head_dim: NonNegativeInt = 0  # of queries and keys; 0: hidden_size / num_attention_heads
    max_position_embeddings: PositiveInt
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    initializer_range: PositiveFloat = 0.02
    tie_word_embeddings: bool = False
    use_flash_attention: bool = True
    gradient_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _read_hugging_face(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("quantization_config") is not None:
            raise ValueError("quantization_config: this model is quantised; take its weights in bf16, fp16 or fp32")
        for key, allowed in {"attention_dropout": (0,), **cls.fixed_keys}.items():
            if data.get(key, allowed[0]) not in allowed:
                raise ValueError(f"{key} {data[key]!r} is not supported, only {allowed[0]!r}")
        dropped = {*INERT_KEYS, *cls.inert_keys, "attention_dropout", "quantization_config", *cls.fixed_keys}
        return _derive_heads(_read_rope({key: value for key, value in data.items() if key not in dropped}))

    @model_validator(mode="after")
    def _check_heads(self) -> BaseModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions")
        return self

    @property
    def attention_head_dims(self) -> tuple[int, int]:
        """Dimensions of a query or key head, and of a value head."""
        return self.head_dim, self.head_dim

    @property
    def balance_loss_weight(self) -> float:
        """Coefficient of the experts' balance loss; 0: there is none."""
        return 0.0

    @property
    def bias_update_rate(self) -> float:
        """Change of a router's correction bias per step; 0: it stays as it is."""
        return 0.0


def _read_rope(data: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, in which transformers 5 writes theta and scaling, as the two fields of a model file."""
    if isinstance(rope := data.pop("rope_parameters", None), dict):
        if "rope_theta" in rope:
            data.setdefault("rope_theta", rope["rope_theta"])
        if data.get("rope_scaling") is None:
            data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"} or None
    if type(data.get("rope_theta")) is int:
        data["rope_theta"] = float(data["rope_theta"])
    if isinstance(scaling := data.get("rope_scaling"), dict):
        scaling = {"original_max_position_embeddings": data.get("max_position_embeddings"), **scaling}
        if "type" in scaling:  # the name before transformers 4.45
            scaling.setdefault("rope_type", scaling.pop("type"))
            scaling.pop("type", None)
        data["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return data


def _derive_heads(data: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = data.get("num_attention_heads"), data.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        data["num_key_value_heads"] = data.get("num_key_value_heads") or heads
        if not data.get("head_dim"):
            if hidden % heads:
                raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
            data["head_dim"] = hidden // heads
    return data
