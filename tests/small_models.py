"""Small models of every family with weights large enough to matter, for the tests of caches and generation."""

from __future__ import annotations

from typing import Any

import torch
from family_runs import FAMILIES

from train.models import BaseModelForCausalLM, ModelRegistry

VOCAB = FAMILIES["llama"]["vocab_size"]
POSITIONS = FAMILIES["llama"]["max_position_embeddings"]


def make_model(family: str = "llama", seed: int = 0, **fields: Any) -> BaseModelForCausalLM:
    """A model in evaluation mode whose logits are spread widely enough that no greedy choice is a tie."""
    config = ModelRegistry.parse_config({**FAMILIES[family], **fields}, "test")
    model = ModelRegistry.create_model(config.model_type, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    for buffer in model.buffers():
        buffer.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, length]."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
