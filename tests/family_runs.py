"""Tiny configurations of every family, and a program that trains several experiments in one start of the ranks.

torchrun --nproc-per-node 2 tests/family_runs.py TOGETHER.yaml ... -- ALONE.yaml ...

An experiment before the `--` is trained by all ranks, one after the other, or as `first:FILE` by the first rank alone.
Of those behind it each rank trains its share alone, before all others.
"""

from __future__ import annotations

import sys
from typing import Any

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
DEEPSEEK = {
    **SHAPE,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "model_type": "llama", "num_key_value_heads": 2},
    "qwen2": {**SHAPE, "model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {**SHAPE, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12},
    "qwen3_moe": {
        **SHAPE,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {**DEEPSEEK, "model_type": "deepseek_v2"},
    "deepseek_v3": {**DEEPSEEK, "model_type": "deepseek_v3", "q_lora_rank": 12, "n_group": 4, "topk_group": 2},
    "minimind2": {**SHAPE, "model_type": "minimind2", "num_key_value_heads": 2},
    "minimind2 with experts": {
        **SHAPE,
        "model_type": "minimind2",
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "minimind3": {**SHAPE, "model_type": "minimind3", "num_key_value_heads": 2},
    "minimind3 with experts": {
        **SHAPE,
        "model_type": "minimind3",
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 1,
    },
}


def main() -> None:
    """Train all experiments."""
    from train import pretrain
    from train.config import load_experiment
    from train.distributed import Ranks, start_ranks

    pretrain.plot_losses = lambda *_: None  # a second each, and the same for every family
    ranks = start_ranks("gloo")
    border = sys.argv.index("--")
    together, apart = sys.argv[1:border], sys.argv[border + 1 :]
    for path in apart[ranks.rank :: ranks.world_size]:
        pretrain.pretrain(load_experiment(path), Ranks(0, 1, ranks.device, None))
    for path in together:
        if not path.startswith("first:"):
            pretrain.pretrain(load_experiment(path), ranks)
        elif ranks.is_first:
            pretrain.pretrain(load_experiment(path.removeprefix("first:")), Ranks(0, 1, ranks.device, None))
        ranks.barrier()


if __name__ == "__main__":
    main()
