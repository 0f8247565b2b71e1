"""Floating-point operations of a training step, counted from the model's shape.

A token costs 6 FLOPs for each parameter of a matrix product (2 forward, 4 backward), and attention costs 12 * layers *
heads * head_dim * length / 2 (query-key and value products, forward and backward, the causal half; Chowdhery et al.
2022, arXiv 2204.02311, appendix B counts the full square). The input embedding is a look-up and counts only where it is
also the head.
"""

from __future__ import annotations

from train.models.transformer import BaseModelForCausalLM


def flops_per_token(model: BaseModelForCausalLM, length: int) -> int:
    """FLOPs of one training token in a sequence of `length` tokens, forward and backward."""
    config = model.config
    parameters = model.get_num_params()
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    attention_width = config.num_attention_heads * config.head_dim  # type: ignore[attr-defined]
    return 6 * parameters + 6 * config.num_hidden_layers * attention_width * length
