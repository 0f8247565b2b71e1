"""FLOPs counted from the shape against PyTorch's count of the operations that ran."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_runs import MODEL

from train.flops import flops_per_token
from train.models import ModelRegistry

LENGTH = 48


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 1, "head_dim": 24, "num_hidden_layers": 3},
    ],
)
def test_equals_the_operations_of_a_training_step(fields):
    config = ModelRegistry.parse_config(
        {**MODEL, "max_position_embeddings": LENGTH, "use_flash_attention": False, **fields}, "test"
    )
    model = ModelRegistry.create_model("llama", config)
    for parameter in model.parameters():
        parameter.data.normal_()
    ids = torch.randint(0, config.vocab_size, (2, LENGTH + 1))
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
    tokens = 2 * LENGTH
    # What ran were the full squares of attention and no product for the norms' weights.
    square = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * LENGTH
    norms = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == tokens * (flops_per_token(model, LENGTH) + square - norms)
