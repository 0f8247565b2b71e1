"""Where the tokens of a pass stand and which of them see each other: what all layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """What every layer of one pass needs to know beside the activations.

    Attributes:
        position_ids: int64 [batch, length].
        cos, sin: float32 [batch, length, 1, rotary_dim / 2].
        mask: bool [batch or 1, 1, length, keys], true where a query may look; None: causal, the queries being the
            last of the keys.
        cu_seqlens: int32 [pieces + 1], borders of the documents in the flattened batch; for `attend.PACKED` kernels.
        kernel: name of an attention kernel (see `attend.choose_kernel`).
        valid: [batch, length], false where there is padding; None: nowhere.
    """

    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    kernel: str
    valid: Tensor | None = None


def causal_mask(length: int, keys: int, device: torch.device) -> Tensor:
    """Bool [1, 1, length, keys]: the last `length` of `keys` positions see themselves and what came before."""
    queries = torch.arange(keys - length, keys, device=device)
    return (queries[:, None] >= torch.arange(keys, device=device))[None, None]


def document_mask(position_ids: Tensor) -> Tensor:
    """Bool [batch, 1, length, length], true between tokens of one document.

    `position_ids` [batch, length] restart at 0 with each document; what precedes the first 0 of a row is one document.
    """
    document = (position_ids == 0).cumsum(dim=1)
    return document[:, None, :, None] == document[:, None, None, :]


def document_borders(position_ids: Tensor) -> Tensor:
    """int32 [pieces + 1]: borders of documents and rows in the flattened positions [batch, length].

    It waits for the device; a loader that knows the borders on the host passes them instead.
    """
    begins = position_ids == 0
    begins[:, 0] = True
    ends = torch.tensor([position_ids.numel()], device=position_ids.device)
    return torch.cat((begins.flatten().nonzero()[:, 0], ends)).int()


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Bool [batch, 1, length, length]: causal, and padding (0 in `attention_mask` [batch, length]) is not seen.

    A padding query keeps itself in sight: its output means nothing, but it must not be NaN.
    """
    length = attention_mask.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    return causal_mask(length, length, attention_mask.device) & attention_mask.bool()[:, None, None, :] | itself


def cache_mask(position_ids: Tensor, slots: int) -> Tensor:
    """Bool [batch, 1, length, slots]: a query sees the slots of a cache up to its own position."""
    return torch.arange(slots, device=position_ids.device) <= position_ids[:, None, :, None]
