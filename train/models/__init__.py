"""Model families on shared blocks. A new family is one file, and its name in the import below."""

from train.models import deepseek, llama, minimind, qwen
from train.models.base_config import BaseModelConfig
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM, ModelOutput

__all__ = [
    "BaseModelConfig",
    "BaseModelForCausalLM",
    "ModelOutput",
    "ModelRegistry",
    "deepseek",
    "llama",
    "minimind",
    "qwen",
]
