"""Floating-point operations of a training step, counted from the model's shape.

A token costs 6 FLOPs for each parameter of a matrix product that it takes part in (2 forward, 4 backward; of routed
experts only its own), and attention costs 6 * layers * heads * (query dims + value dims) * length / 2 (query-key and
value products, forward and backward, the causal half; Chowdhery et al. 2022, arXiv 2204.02311, appendix B counts the
full square). The input embedding is a look-up and counts only where it is also the head.
"""

from __future__ import annotations

from train.models.transformer import BaseModelForCausalLM


def flops_per_token(model: BaseModelForCausalLM, length: int) -> int:
    """FLOPs of one training token in a sequence of `length` tokens, forward and backward."""
    config = model.config
    parameters = model.get_num_active_params()
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    head_dims = sum(config.attention_head_dims)
    return 6 * parameters + 3 * config.num_hidden_layers * config.num_attention_heads * head_dims * length
