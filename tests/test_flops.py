"""FLOPs counted from the shape against PyTorch's count of the operations that ran."""

from __future__ import annotations

import pytest
import torch
from family_runs import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from train.flops import flops_per_token
from train.models import ModelRegistry

LENGTH = 48
# Rows of x [rows, in] times one of the matrices [experts, out, in]; and grad [rows, out] with x [rows, in].
GROUPED = {
    torch.ops.minigpt.grouped_linear: lambda x, weight, offsets, **_: 2 * x[0] * weight[1] * weight[2],
    torch.ops.minigpt.grouped_outer: lambda grad, x, offsets, **_: 2 * grad[0] * grad[1] * x[1],
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24, "num_hidden_layers": 3}),
        ("qwen3_moe", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"v_head_dim": 20}),
    ],
)
def test_equals_the_operations_of_a_training_step(family, fields):
    config = ModelRegistry.parse_config(
        {**FAMILIES[family], "max_position_embeddings": LENGTH, "use_flash_attention": False, **fields}, "test"
    )
    model = ModelRegistry.create_model(config.model_type, config)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.normal_()
    ids = torch.randint(0, config.vocab_size, (2, LENGTH + 1))
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
    tokens = 2 * LENGTH
    # What ran were the full squares of attention and no product for the norms' weights.
    square = 3 * config.num_hidden_layers * config.num_attention_heads * sum(config.attention_head_dims) * LENGTH
    norms = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == tokens * (flops_per_token(model, LENGTH) + square - norms)
