"""Activation checkpointing: keep less of the forward pass and compute it again in backward.

`full` keeps a block's input and computes all of the block again. `selective` keeps what is dear to compute: results of
matrix products, fused attention, the routers' choices, exchanges between ranks. Only the rest is computed again: norms,
rotations, activations (Korthikanti et al. 2022, arXiv 2205.05198, section 5). Counted on a compiled llama of 29 M, what
is kept of what is kept without, and what is added to the step's matrix products:

    none 100 %, +0 %    selective 64 %, +0 %    selective with every second product 35 %, +15 %    full 8 %, +26 %

Every second product, as some trainers choose, is only a point on the line from here to `full`: the products of a block
and its attention all cost about as many FLOPs per byte of their result, so that no choice among them is the better one.
What is free ends where all are kept. The products of plain attention are not: its scores are quadratic in the length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Blocks change nothing in place, of which PyTorch warns in four lines for every rank.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())

Result = TypeVar("Result")
Recompute = Literal["none", "full", "selective"]

KEPT = {
    "aten::mm",
    "aten::addmm",
    "minigpt::grouped_linear",  # of train.models.moe
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "torch_attn::_varlen_attn",
    "aten::topk",  # not for its time: computed again, ties could fall another way
    "_c10d_functional::all_gather_into_tensor",
    "_c10d_functional::reduce_scatter_tensor",
    "_c10d_functional::all_reduce",
    "_c10d_functional::wait_tensor",
}


def recomputed(function: Callable[..., Result], mode: Literal["full", "selective"], *args: Any) -> Result:
    """`function(*args)`, with its activations computed again in backward.

    `function` must give the same whenever it is called, and must not change its arguments. It may run eager or inside
    code that `torch.compile` traces, where the compiler takes the marks for its own choice of what to keep.
    """
    if mode == "full":
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
