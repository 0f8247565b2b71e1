"""Model families by name, and models from their YAML files."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from shards.errors import UserError, unknown_name
from shards.settings import load_yaml, validate
from train.models.llama import LlamaConfig, LlamaForCausalLM
from train.models.transformer import BaseModelConfig, BaseModelForCausalLM


class ModelRegistry:
    """The families: `model_type` -> (model class, config class)."""

    _families: ClassVar[dict[str, tuple[type[BaseModelForCausalLM], type[BaseModelConfig]]]] = {}

    @classmethod
    def register(
        cls, model_type: str, model_class: type[BaseModelForCausalLM], config_class: type[BaseModelConfig]
    ) -> None:
        """Make a family known under `model_type`."""
        cls._families[model_type] = (model_class, config_class)

    @classmethod
    def load_config(cls, yaml_path: str | os.PathLike[str], overrides: dict[str, Any] | None = None) -> BaseModelConfig:
        """Read and check a model file; `overrides` replace its fields.

        Raises:
            UserError: the file is missing or no YAML, the family or a field is unknown, a value has the wrong type.
        """
        where = f"{yaml_path} with model.overrides" if overrides else str(yaml_path)
        return cls.parse_config({**load_yaml(yaml_path), **(overrides or {})}, where)

    @classmethod
    def parse_config(cls, fields: dict[str, Any], where: str) -> BaseModelConfig:
        """Check the fields of a model; `where` names their origin in errors."""
        model_type = fields.get("model_type")
        if model_type is None:
            raise UserError(f"{where}: model_type is missing; known: {', '.join(sorted(cls._families))}")
        return validate(cls._family(str(model_type), where)[1], fields, where)

    @classmethod
    def create_model(cls, model_type: str, config: BaseModelConfig) -> BaseModelForCausalLM:
        """Build a model on the current default device (see `torch.device` as a context); weights are not set."""
        return cls._family(model_type, "model")[0](config)  # type: ignore[call-arg]

    @classmethod
    def create_from_yaml(
        cls, yaml_path: str | os.PathLike[str], overrides: dict[str, Any] | None = None
    ) -> BaseModelForCausalLM:
        """Build the model that a file describes."""
        config = cls.load_config(yaml_path, overrides)
        return cls.create_model(config.model_type, config)

    @classmethod
    def _family(cls, model_type: str, where: str) -> tuple[type[BaseModelForCausalLM], type[BaseModelConfig]]:
        if model_type not in cls._families:
            raise UserError(f"{where}: {unknown_name('model_type', model_type, cls._families)}")
        return cls._families[model_type]


ModelRegistry.register("llama", LlamaForCausalLM, LlamaConfig)
