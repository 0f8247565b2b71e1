"""Attention: which kernel runs where, and the calls.

    out = softmax(query key^T * scale, over the keys that a query may see) value

`choose_kernel` decides once per model, from what is known before a pass; `attend` follows it in every layer. What the
choice is between (bf16 on an H100, forward and backward of causal attention: 330 TFLOP/s for "flash", 630 for "cudnn",
pytorch#142132; "plain" writes all scores to memory several times over):

    plain       matrix products and a softmax: the reference, and a way round a kernel's bug
    sdpa        `scaled_dot_product_attention` of the CPU, or the memory-efficient kernel of CUDA
    cudnn       cuDNN's kernel, the fastest for training on Hopper and Blackwell data-centre GPUs; it makes a plan for
                every new shape, so passes without gradients, whose lengths vary, are "flash"
    flash       FlashAttention-2, part of PyTorch
    varlen      the same over documents of any length: cost and memory follow the documents, there is no mask
    flash-attn  FlashAttention-3 (package `flash_attn_interface`) in the place of both, through PyTorch's own switch.
                The package `flash_attn` is FlashAttention-2, which PyTorch has already.

CUDA's fused kernels differ in what they take, so tensors are made to fit: a head is zero-padded to a multiple of 8, and
the value heads of latent attention (192 wide queries, 128 wide values) to the queries' width for FlashAttention; zeros
add nothing to a score, and what they add to the output is cut off. PyTorch's "math" fallback is never among the kernels
that it may pick on CUDA: what no fused kernel takes fails, or is one of the plain cases named here.

Compiled code treats lengths as symbols. A branch on one is a guard and gives a bool; a condition that is handed on as a
value stays a symbol, which SDPA refuses.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from train.models.positions import Positions, causal_mask

PACKED = ("varlen", "flash-attn")  # kernels that take `cu_seqlens` instead of a document mask
HALF = (torch.float16, torch.bfloat16)
FLASH_WIDTH = 256  # widest head of FlashAttention 2 and 3
CUDNN_WIDTH = 128  # of cuDNN in training, but for (192, 128) of latent attention
FEW_QUERIES = 16  # of a decoding step: below, reading the keys is all the work


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, and why it is the one; as a string, the line that training prints."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"attention: {self.name} ({self.reason})"


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device: (9, 0) for an H100."""
    return torch.cuda.get_device_capability(device)


def cudnn_accepts(device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int) -> bool:
    """Whether the cuDNN at hand trains with such heads; it depends on its version."""
    query, value = (
        torch.empty(1, 1, 128, width, device=device, dtype=dtype, requires_grad=True)
        for width in (qk_head_dim, v_head_dim)
    )
    return can_use_cudnn_attention(SDPAParams(query, query, value, None, 0.0, True, False))


def activate_flash_attention_3() -> bool:
    """Put FlashAttention-3 into the place of PyTorch's kernels, if it is installed; whether it is."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    activate_flash_attention_impl("FA3")
    return True


@functools.lru_cache
def choose_kernel(
    device: torch.device, dtype: torch.dtype, qk_head_dim: int, v_head_dim: int, *, documents: bool, flash: bool = True
) -> Kernel:
    """The kernel for a place; call it outside compiled code.

    Args:
        dtype: of the activations.
        qk_head_dim: width of a query or key head.
        v_head_dim: width of a value head.
        documents: whether the documents of a row are kept apart.
        flash: false asks for plain attention (`use_flash_attention` of the model file).
    """
    hidden = "; documents are kept apart by a mask over all pairs: the slow path" if documents else ""
    if not flash:
        return Kernel("plain", "use_flash_attention is false: all scores are held in memory, the slow path")
    if device.type != "cuda":
        blocks = "" if dtype == torch.float32 else "; compiled, blocks of queries in plain products, faster there"
        return Kernel("sdpa", f"PyTorch's fused attention on {device.type}{blocks}{hidden}")
    widths = rounded(qk_head_dim), rounded(v_head_dim)
    capability = compute_capability(device)
    if dtype not in (torch.float32, *HALF) or (dtype == torch.bfloat16 and capability < (8, 0)):
        return Kernel("plain", f"no fused kernel for {name_of(dtype)} on this GPU: the slow path")
    if dtype == torch.float32 or capability < (8, 0):
        why = "for float32" if dtype == torch.float32 else "for GPUs before Ampere"
        return Kernel("sdpa", f"the memory-efficient kernel, {why}{hidden}")
    if max(widths) > FLASH_WIDTH:
        return Kernel("sdpa", f"the memory-efficient kernel, for heads wider than {FLASH_WIDTH}{hidden}")
    version = 3 if capability[0] == 9 and activate_flash_attention_3() else 2
    apart = "documents of one row do not see each other; "
    if documents and version == 3:
        return Kernel("flash-attn", f"{apart}FlashAttention-3 over variable lengths")
    if documents:
        return Kernel("varlen", f"{apart}PyTorch's FlashAttention-2 over variable lengths")
    # Slower than FlashAttention-2 on GeForce cards, Blackwell (12.0) included: huggingface/transformers#48163.
    fits = max(widths) <= CUDNN_WIDTH or widths == (192, 128)
    if (9, 0) <= capability < (12, 0) and fits and cudnn_accepts(device, dtype, *widths):
        return Kernel("cudnn", "cuDNN's fused kernel, the fastest for training on this GPU; without gradients, flash")
    if version == 3:
        return Kernel("flash-attn", "FlashAttention-3, as cuDNN does not take these heads")
    return Kernel("flash", "PyTorch's FlashAttention-2")


@functools.cache
def warn_of_padding(kernel: str) -> None:
    """Say, once per kernel, that an `attention_mask` keeps a fused causal kernel from running."""
    if kernel in ("cudnn", "flash", *PACKED):
        warnings.warn(
            f"attention: an attention_mask is given, so not {kernel} runs but the memory-efficient kernel with a mask "
            "over all pairs: the slow path. Rows of one length, or documents packed into such rows, need no mask.",
            stacklevel=4,  # the caller of the model
        )


def name_of(dtype: torch.dtype) -> str:
    """`float64` for torch.float64."""
    return str(dtype).removeprefix("torch.")


def rounded(width: int) -> int:
    """The next multiple of 8, which all of CUDA's fused kernels take."""
    return -(-width // 8) * 8


def attend(query: Tensor, key: Tensor, value: Tensor, positions: Positions, scale: float) -> Tensor:
    """Attention by the kernel that `positions` names, within what its mask or its document borders allow.

    Without a mask the queries are the last of the keys, and each sees itself and what precedes it.

    Args:
        query: [batch, heads, length, qk_dim].
        key: [batch, kv_heads, keys, qk_dim]; query heads share key heads in groups of neighbours.
        value: [batch, kv_heads, keys, v_dim].
        scale: factor of the scores before the softmax.

    Returns:
        [batch, heads, length, v_dim].
    """
    kernel, mask = positions.kernel, positions.mask
    length, keys = query.shape[2], key.shape[2]
    if kernel == "plain":
        return plain_attention(query, key, value, mask, scale)
    if mask is None and kernel in PACKED and positions.cu_seqlens is not None:
        return packed_attention(query, key, value, positions.cu_seqlens, scale)
    if mask is None and 1 < length < keys:  # SDPA would take the queries for the first of the keys
        mask = causal_mask(length, keys, query.device)
    if query.device.type == "cuda":
        return cuda_attention(query, key, value, mask, scale, kernel)
    if kernel == "sdpa" and torch.compiler.is_compiling() and length == keys and query.dtype != torch.float32:
        return blocked_attention(query, key, value, mask, scale)
    grouped = query.shape[1] != key.shape[1]
    width, v_dim = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    if grouped and query.shape[-1] != v_dim:  # absorbed latent attention: not worth a copy of the whole cache
        return plain_attention(query, key, value, mask, scale)
    query, key, value = (widened(states, width) for states in (query, key, value))  # it takes no unequal heads
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal(mask, length), scale=scale, enable_gqa=grouped
    )
    return out.narrow(-1, 0, v_dim)


def is_causal(mask: Tensor | None, length: int) -> bool:
    """What SDPA is told: a single query without a mask sees all keys."""
    if length == 1:  # a branch, as compiled code needs a bool
        return False
    return mask is None


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention in plain operations. Shapes as in `attend`; mask as in `Positions`.

    The queries of a group are rows of one product with their key head, so that keys are not repeated.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    if mask is None and length > 1:
        mask = causal_mask(length, key.shape[2], query.device)
    scores = score_products(query.unflatten(1, (-1, groups)).flatten(2, 3), key.transpose(-1, -2))
    scores = scores.unflatten(2, (groups, length)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
    weights = scores.softmax(-1).to(value.dtype)
    return (weights.flatten(2, 3) @ value).unflatten(2, (groups, length)).flatten(1, 2)


def score_products(query: Tensor, key: Tensor) -> Tensor:
    """Float32 [batch, kv_heads, rows, keys] of [batch, kv_heads, rows, width] and [batch, kv_heads, width, keys].

    Half-precision products are rounded to their dtype, but for generation on CUDA: there cuBLAS hands out the float32
    sums that it has, and no float32 copy of the keys is made. That call has no gradient.
    """
    if query.device.type == "cuda" and query.dtype in HALF and not torch.is_grad_enabled():
        sums = torch.bmm(query.flatten(0, 1), key.flatten(0, 1), out_dtype=torch.float32)
        return sums.unflatten(0, query.shape[:2])
    return (query @ key).float()


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Plain attention, a block of queries at a time over the keys that it may see: bf16 in compiled code on CPUs.

    The scores of a block stay in cache and its products run at the rate of a CPU's matrix unit, where PyTorch's kernel
    reaches a quarter (2.3 times faster, forward and backward at length 512). In float32 that kernel is the faster one.
    Shapes as in `plain_attention`, with as many queries as keys. Branches on the length alone, no `range` or `min`, let
    all lengths with the same number of blocks share one compiled graph.
    """
    length = query.shape[2]
    block = 128 if length <= 1024 else -(-length // 8)
    outputs = []
    start = 0
    while start < length:
        stop = start + block if start + block < length else length
        visible = None if mask is None else mask[:, :, start:stop, :stop]
        outputs.append(plain_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], visible, scale))
        start = stop
    return torch.cat(outputs, dim=2)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal attention within the documents of a flattened batch, on CUDA. Shapes as in `attend`.

    No document is longer than a row, so the row's length serves as the longest and nothing waits for the device.
    """
    batch, heads, length, _ = query.shape
    width, v_dim = rounded(max(query.shape[-1], value.shape[-1])), value.shape[-1]
    flat_query, flat_key, flat_value = (
        widened(states, width).transpose(1, 2).flatten(0, 1) for states in (query, key, value)
    )
    out = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        scale=scale,
        window_size=(-1, 0),  # causal: any number of keys to the left, none to the right
        enable_gqa=heads != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a tuple only where more is asked for
    return out.unflatten(0, (batch, length)).transpose(1, 2).narrow(-1, 0, v_dim)


def cuda_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, kernel: str) -> Tensor:
    """SDPA on CUDA, restricted to fused kernels. Shapes as in `attend`; without a mask, length is 1 or all keys.

    Only the memory-efficient kernel takes masks, and it takes no grouped heads: a decoding step, and the absorbed form
    of latent attention (one key head, wider than FlashAttention's limit), read each key once in plain products instead
    of repeating it for every query head.
    """
    length, v_dim = query.shape[2], value.shape[-1]
    if kernel == "cudnn" and not (torch.is_grad_enabled() and length > 1):
        kernel = "flash"  # generation has a new shape every step, and cuDNN would make a plan for each
    groups, widest = query.shape[1] // key.shape[1], max(query.shape[-1], v_dim)
    backends = fused_backends(kernel, masked=mask is not None, width=widest)
    fused_groups = SDPBackend.FLASH_ATTENTION in backends
    if groups > 1 and not fused_groups:
        if length < FEW_QUERIES or widest > FLASH_WIDTH:
            return plain_attention(query, key, value, mask, scale)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    equal = backends[0] == SDPBackend.FLASH_ATTENTION
    qk_width, v_width = (rounded(widest),) * 2 if equal else (rounded(query.shape[-1]), rounded(v_dim))
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(
            widened(query, qk_width),
            widened(key, qk_width),
            widened(value, v_width),
            attn_mask=mask,
            is_causal=is_causal(mask, length),
            scale=scale,
            enable_gqa=groups > 1 and fused_groups,
        )
    return out.narrow(-1, 0, v_dim)


def fused_backends(kernel: str, *, masked: bool, width: int) -> list[SDPBackend]:
    """What SDPA may pick from on CUDA, the best first; `width` of the widest head."""
    if kernel == "sdpa" or masked or width > FLASH_WIDTH:
        return [SDPBackend.EFFICIENT_ATTENTION]
    if kernel == "cudnn":
        return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def widened(states: Tensor, width: int) -> Tensor:
    """The last dimension filled up with zeros to `width`."""
    return F.pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states
