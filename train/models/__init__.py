"""Model families on shared blocks. A new family is one file, and its line below, whose import registers it."""

from train.models import deepseek as deepseek
from train.models import llama as llama
from train.models import minimind as minimind
from train.models import qwen as qwen
from train.models.base_config import BaseModelConfig
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM, ModelOutput

__all__ = ["BaseModelConfig", "BaseModelForCausalLM", "ModelOutput", "ModelRegistry"]
