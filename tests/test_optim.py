"""The optimiser against PyTorch's own, and the step that is skipped on a bad gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.config import TrainingConfig
from train.distributed import Ranks
from train.layout import Layout
from train.optim import create_optimizer, gradient_norm

ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))
FIELDS = {"batch_size": 1, "learning_rate": 1e-2, "weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6}


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    inputs = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed))
    (model(inputs).square().sum() * scale).backward()


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e6])
def test_equals_pytorch_with_decay_on_matrices_only(grad_clip):
    ours, theirs = make(), make()
    optimizer = create_optimizer(ours, TrainingConfig.model_validate({**FIELDS, "grad_clip": grad_clip}), ALONE)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    for step in range(20):
        rate = 1e-2 / (step + 1)
        for model in (ours, theirs):
            backward(model, step)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), grad_clip or 1e30)
        norm, skipped = optimizer.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, grad_clip):
    model = make()
    optimizer = create_optimizer(model, TrainingConfig.model_validate({**FIELDS, "grad_clip": grad_clip}), ALONE)
    for seed in range(3):
        backward(model, seed)
        optimizer.step(1e-2)
    state = [p.detach().clone() for p in model.parameters()]
    state += [t.clone() for part in optimizer.state_dict().values() for t in part.values()]
    backward(model, 3)
    next(model.parameters()).grad[2, 1] = bad
    norm, skipped = optimizer.step(1e-2)
    assert skipped == 1
    assert not norm.isfinite()
    now = [*model.parameters(), *(t for part in optimizer.state_dict().values() for t in part.values())]
    assert all(torch.equal(a, b) for a, b in zip(now, state, strict=True))
    backward(model, 4)
    assert optimizer.step(1e-2)[1] == 0  # and the next step is an ordinary one
    assert not torch.equal(next(model.parameters()), state[0])
    assert all(steps == 4 for steps in optimizer.steps.values())


def test_the_norm_of_many_small_gradients_is_exact():
    gradients = [torch.full((1000, 1000), 1e-3), torch.full((10,), 1e3)]
    assert gradient_norm(gradients).item() == pytest.approx((1e6 * 1e-6 + 10 * 1e6) ** 0.5, rel=1e-6)
