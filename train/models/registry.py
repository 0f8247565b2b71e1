"""Model families by name, and models from their YAML files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, get_args

from shards.errors import UserError, unknown_name
from shards.settings import load_yaml, validate
from train.models.base_config import BaseModelConfig
from train.models.transformer import BaseModelForCausalLM

Model = TypeVar("Model", bound=Callable[[Any], BaseModelForCausalLM])


class ModelRegistry:
    """The families: name -> (model class, config class).

    The values of a config's `model_type` are the family's variants: the family qwen has qwen2, qwen3 and qwen3_moe.
    """

    _families: ClassVar[dict[str, tuple[Callable[[Any], BaseModelForCausalLM], type[BaseModelConfig]]]] = {}

    @classmethod
    def register(
        cls, family: str, model_class: Callable[[Any], BaseModelForCausalLM], config_class: type[BaseModelConfig]
    ) -> None:
        """Make a family known; its `config_class` states its variants: `model_type: Literal["mine"]`.

        Raises:
            UserError: there are no variants, or the family or one of them is known already.
        """
        variants = get_args(config_class.model_fields["model_type"].annotation)
        if not variants:
            raise UserError(f'{config_class.__name__}: write its variants as model_type: Literal["…"]')
        if taken := {family, *variants} & {*cls._families, *cls._variants()}:
            raise UserError(f"family {family}: '{min(taken)}' is registered already")
        cls._families[family] = (model_class, config_class)

    @classmethod
    def family(cls, name: str, config_class: type[BaseModelConfig]) -> Callable[[Model], Model]:
        """Decorator of a model class that registers it."""

        def decorate(model_class: Model) -> Model:
            cls.register(name, model_class, config_class)
            return model_class

        return decorate

    @classmethod
    def load_config(cls, yaml_path: str | os.PathLike[str], overrides: dict[str, Any] | None = None) -> BaseModelConfig:
        """Read and check a model file (YAML, or a Hugging Face config.json); `overrides` replace its fields.

        Raises:
            UserError: the file is missing or no YAML, the family or a field is unknown, a value has the wrong type.
        """
        where = f"{yaml_path} with model.overrides" if overrides else str(yaml_path)
        return cls.parse_config({**load_yaml(yaml_path), **(overrides or {})}, where)

    @classmethod
    def parse_config(cls, fields: dict[str, Any], where: str) -> BaseModelConfig:
        """Check the fields of a model; `where` names their origin in errors."""
        if fields.get("model_type") is None:
            raise UserError(f"{where}: model_type is missing; known: {', '.join(sorted(cls._variants()))}")
        model_type = str(fields["model_type"])
        if model_type in cls._families and model_type not in cls._variants():
            variants = get_args(cls._families[model_type][1].model_fields["model_type"].annotation)
            raise UserError(f"{where}: model_type '{model_type}' is a family; it has {', '.join(variants)}")
        return validate(cls._families[cls.family_of(model_type, where)][1], fields, where)

    @classmethod
    def family_of(cls, model_type: str, where: str) -> str:
        """The family that a `model_type`, or a family's own name, belongs to.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        variants = cls._variants()
        if model_type not in variants and model_type not in cls._families:
            raise UserError(f"{where}: {unknown_name('model_type', model_type, {*variants, *cls._families})}")
        return variants.get(model_type, model_type)

    @classmethod
    def create_model(cls, model_type: str, config: BaseModelConfig) -> BaseModelForCausalLM:
        """Build a model on the current default device (see `torch.device` as a context); weights are not set."""
        model_class, config_class = cls._families[cls.family_of(model_type, "model")]
        if not isinstance(config, config_class):
            raise UserError(
                f"model: a {config_class.__name__} belongs to '{model_type}', not a {type(config).__name__}"
            )
        return model_class(config)

    @classmethod
    def create_from_yaml(
        cls, yaml_path: str | os.PathLike[str], overrides: dict[str, Any] | None = None
    ) -> BaseModelForCausalLM:
        """Build the model that a file describes."""
        config = cls.load_config(yaml_path, overrides)
        return cls.create_model(config.model_type, config)

    @classmethod
    def _variants(cls) -> dict[str, str]:
        """`model_type` -> family."""
        return {
            variant: family
            for family, (_, config) in cls._families.items()
            for variant in get_args(config.model_fields["model_type"].annotation)
        }
