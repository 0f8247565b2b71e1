"""The fused cross-entropy against PyTorch's, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from family_runs import FAMILIES

import train.loss
from train.loss import IGNORE_INDEX, loss_and_gradient, summed_loss, token_losses
from train.models import ModelRegistry

VOCAB, SIZE = 50, 24


@pytest.fixture(params=[None, 7 * VOCAB, VOCAB // 2], ids=["one chunk", "chunks of 7", "chunks of 1"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(train.loss, "CHUNK_LOGITS", request.param)


def example(rows: int = 40, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels; some labels are ignored, a whole chunk of 7 among them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, SIZE, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB, SIZE, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (rows,), generator=generator)
    labels[::5] = IGNORE_INDEX
    labels[7:14] = IGNORE_INDEX
    return hidden, head, labels


def reference(hidden, head, labels, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss and both gradients in float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, head))
    loss = F.cross_entropy(h @ w.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), h.grad, w.grad


def test_value_and_both_gradients(chunks):
    hidden, head, labels = example()
    loss, _ = summed_loss(hidden, head, labels)
    assert loss.dtype == torch.float32
    (loss * 0.37).backward()  # not 1: the gradient that comes in must count
    expected = reference(hidden, head, labels, 0.37)
    for found, right in zip((loss.detach(), hidden.grad, head.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
    assert (hidden.grad[labels == IGNORE_INDEX] == 0).all()


def test_losses_of_single_tokens(chunks):
    hidden, head, labels = example()
    found = token_losses(hidden, head, labels)
    expected = F.cross_entropy(hidden @ head.T, labels, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    with torch.no_grad():
        without_gradient = summed_loss(hidden, head, labels)
    with_gradient = summed_loss(hidden, head, labels)
    for total, losses in (with_gradient, without_gradient):
        torch.testing.assert_close(losses, expected.detach())
        assert not losses.requires_grad
        assert (losses[labels == IGNORE_INDEX] == 0).all()
        torch.testing.assert_close(total.detach(), expected.detach().sum())
    with_gradient[0].backward()  # whatever was done with the losses


def test_bf16_activations_keep_float32_sums(chunks):
    hidden, head, labels = example(dtype=torch.bfloat16)
    loss, _ = summed_loss(hidden, head, labels)
    loss.backward()
    rounded = head.detach().bfloat16().float().requires_grad_()
    expected, grad_hidden, grad_head = reference(hidden, rounded, labels)
    assert (hidden.grad.dtype, head.grad.dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=2e-3, atol=0)
    assert (hidden.grad.double() - grad_hidden).norm() < 1e-2 * grad_hidden.norm()
    assert (head.grad.double() - grad_head).norm() < 1e-2 * grad_head.norm()


def test_all_labels_ignored(chunks):
    hidden, head, _ = example()
    labels = torch.full((40,), IGNORE_INDEX)
    loss, _ = summed_loss(hidden, head, labels)
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (head.grad == 0).all()
    assert (token_losses(hidden, head, labels) == 0).all()


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]])
    losses, gradient = loss_and_gradient(logits, torch.tensor([0, 0]))
    assert losses.tolist() == [0, 2e4]
    assert gradient.tolist() == [[0, 0, 0], [-1, 1, 0]]


def test_the_gradient_of_the_logits_is_that_of_autograd():
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([3, IGNORE_INDEX, 49, 0, 1, 1, IGNORE_INDEX, 7, 8])
    losses, gradient = loss_and_gradient(logits.detach(), labels)
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_the_model_says_the_loss_of_each_window():
    config = ModelRegistry.parse_config({**FAMILIES["llama"], "max_position_embeddings": 16}, "test")
    torch.manual_seed(0)
    model = ModelRegistry.create_model("llama", config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, config.vocab_size, (3, 17))
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[1, 5:] = IGNORE_INDEX
    expected = model(inputs, labels=labels, reduction="none").loss.sum(1)
    for reduction in ("sum", "mean"):
        output = model(inputs, labels=labels, reduction=reduction)
        torch.testing.assert_close(output.window_losses, expected)
        assert not output.window_losses.requires_grad
