"""Cross-entropy straight from the hidden states: the [tokens, vocab] logits are never held as a whole.

For a chunk of tokens h [c, d] and the head W [V, d]:

    z = h W^T,  nll = logsumexp(z) - z[label],  dz = softmax(z) - onehot(label),  dh = dz W,  dW += dz^T h

The gradient of the sum is known as soon as the loss is, so it is computed in the same pass and only scaled in backward:
three matrix products a chunk, as many as an ordinary backward needs, and memory for one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK_LOGITS = 2**25  # of one chunk: 64 MiB in bf16, as much again for their gradient


def token_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats, without gradient.

    Args:
        hidden: [tokens, hidden_size].
        head: output embedding [vocab, hidden_size].
        labels: int64 [tokens]; -100 is ignored (its loss is 0).

    Returns:
        float32 [tokens].
    """
    with torch.no_grad():
        head = head.to(hidden.dtype)
        rows = _chunk_rows(head)
        return torch.cat(
            [
                F.cross_entropy((h @ head.T).float(), y, ignore_index=IGNORE_INDEX, reduction="none")
                for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
            ]
        )


def summed_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    kernel: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods in nats: their sum, and each by itself.

    Shapes as in `token_losses`. `kernel` is `loss_and_gradient`, or a compiled form of it.

    Returns:
        float32 [], differentiable once in `hidden` and `head`; and float32 [tokens] without gradient.
    """
    if not torch.is_grad_enabled():
        losses = token_losses(hidden, head, labels)
        return losses.sum(), losses
    return _SummedLoss.apply(hidden, head, labels, kernel or loss_and_gradient)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, kernel: Any) -> tuple[Tensor, Tensor]:
        weight = head.to(hidden.dtype)
        rows = _chunk_rows(head)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head: Tensor | None = None
        for start in range(0, len(hidden), rows):
            h, y = hidden[start : start + rows], labels[start : start + rows]
            losses[start : start + rows], dz = kernel(h @ weight.T, y)
            torch.mm(dz, weight, out=grad_hidden[start : start + rows])
            part = (dz.T @ h).float()
            grad_head = part if grad_head is None else grad_head.add_(part)
        assert grad_head is not None
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        # The scale stays float32: 1 / tokens in bf16 would be off by up to 0.4 %.
        return (grad_hidden.float() * grad).to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), None, None


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, and the gradient of their sum in the logits.

    Args:
        logits: [rows, vocab], any float dtype; computed in float32.
        labels: int64 [rows].

    Returns:
        float32 [rows], 0 where the label is ignored; and [rows, vocab] in the dtype of the logits.
    """
    z = logits.float()
    valid = (labels != IGNORE_INDEX)[:, None]
    target = labels.clamp_min(0)[:, None]
    lse = z.logsumexp(-1, keepdim=True)
    losses = torch.where(valid, lse - z.gather(1, target), 0.0).squeeze(1)
    onehot = torch.arange(z.shape[1], device=z.device) == target
    gradient = torch.where(valid, (z - lse).exp() - onehot.float(), 0.0)
    return losses, gradient.to(logits.dtype)


def _chunk_rows(head: Tensor) -> int:
    return max(1, CHUNK_LOGITS // head.shape[0])
