"""Floating-point operations of a training step, counted from the model's shape.

A token costs 6 FLOPs for each parameter of a matrix product that it takes part in (2 forward, 4 backward; of routed
experts only its own). The input embedding is a look-up and counts only where it is also the head. Query-key and value
products cost 6 * layers * heads * (query dims + value dims) * length, forward and backward, if each token attends to
all (the full square: Chowdhery et al. 2022, arXiv 2204.02311, appendix B; nanoGPT), and half of it if it attends to
those before it, which is all that a causal kernel computes (Dao 2023, arXiv 2307.08691, section 4.1). What activation
checkpointing computes again counts in neither.
"""

from __future__ import annotations

from train.models.transformer import BaseModelForCausalLM


def flops_per_token(model: BaseModelForCausalLM, length: int, *, full_attention: bool = False) -> int:
    """FLOPs of one training token in a sequence of `length` tokens, forward and backward.

    `model` is the whole one, before its matrices or layers are shared among ranks; it may be on the meta device.
    Attention counts as causal, or with `full_attention` as the full square.
    """
    config = model.config
    parameters = model.get_num_active_params()
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    causal = 3 * config.num_hidden_layers * config.num_attention_heads * sum(config.attention_head_dims) * length
    return 6 * parameters + causal * (2 if full_attention else 1)
