"""Model families on shared blocks."""

from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelConfig, BaseModelForCausalLM

__all__ = ["BaseModelConfig", "BaseModelForCausalLM", "ModelRegistry"]
