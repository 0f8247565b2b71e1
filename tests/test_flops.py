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
    # What ran were the full squares of attention and no product for the norms' weights.
    norms = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == 2 * LENGTH * (flops_per_token(model, LENGTH, full_attention=True) - norms)


def test_causal_attention_is_the_pairs_below_the_diagonal():
    """Counted one by one: each pair of tokens is a product of query and key, and one of its weight and the value."""
    config = ModelRegistry.parse_config({**FAMILIES["deepseek_v3"], "max_position_embeddings": 2048}, "test")
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    query_dims, value_dims = config.attention_head_dims
    assert query_dims != value_dims
    per_pair = 3 * 2 * (query_dims + value_dims) * config.num_attention_heads * config.num_hidden_layers
    for length in (64, 2048):
        pairs = sum(range(length)) + length / 2  # a token with itself is on the diagonal
        causal, full = (flops_per_token(model, length, full_attention=full) for full in (False, True))
        rest = full - per_pair * length
        assert causal - rest == per_pair * pairs / length
        assert rest == flops_per_token(model, 0)  # the products with parameters do not depend on the length
