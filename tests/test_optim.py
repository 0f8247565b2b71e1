"""The optimiser against PyTorch's own, and the step that is skipped on a bad gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train import adamw
from train.config import TrainingConfig
from train.distributed import Ranks
from train.layout import Layout
from train.optim import create_optimizer, squared_norm

ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))
FIELDS = {"batch_size": 1, "learning_rate": 1e-2, "weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6}


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model.cuts, model.tied_across_stages = {}, False
    return model


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


@pytest.mark.parametrize("slice_elements", [16, 30, 10**6])
def test_bf16_state_equals_pytorch_with_the_state_rounded_after_each_step(slice_elements, monkeypatch):
    """The matrices have 35 and 21 elements: they are cut, or share a slice, or are all in one."""
    monkeypatch.setattr(adamw, "SLICE", slice_elements)
    ours, theirs = make(), make()
    fields = {**FIELDS, "grad_clip": 0.0, "optimizer_state_dtype": "bf16", "weight_decay": 0.0}
    optimizer = create_optimizer(ours, TrainingConfig.model_validate(fields), ALONE)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for step in range(20):
        for model in (ours, theirs):
            backward(model, step)
        optimizer.step(1e-2)
        reference.step()
        reference.zero_grad()
        for name, parameter in theirs.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                rounded = reference.state[parameter][key].bfloat16()
                reference.state[parameter][key].copy_(rounded)
                mine = optimizer.state_dict()[key][name]
                assert mine.dtype == torch.bfloat16
                torch.testing.assert_close(mine, rounded, rtol=2**-7, atol=0)  # the other side of a rounding border
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(steps == 20 for steps in optimizer.state_dict()["steps"].values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bad_gradient_changes_nothing(bad, grad_clip, dtype):
    """One that is not finite, and one that is an outlier once 64 norms are known."""
    model = make()
    fields = {**FIELDS, "grad_clip": grad_clip, "optimizer_state_dtype": dtype}
    optimizer = create_optimizer(model, TrainingConfig.model_validate(fields), ALONE)
    for seed in range(65):
        backward(model, seed)
        assert optimizer.step(1e-3)[1] == 0

    def tensors() -> list[torch.Tensor]:
        state = [part for key, part in optimizer.state_dict().items() if key != "guard"]
        return [*model.parameters(), *(tensor for part in state for tensor in part.values())]

    before = [tensor.detach().clone() for tensor in tensors()]
    backward(model, 65)
    next(model.parameters()).grad[2, 1] = bad
    norm, skipped = optimizer.step(1e-3)
    assert skipped == optimizer.guard.total == 1
    assert norm.isfinite() == (abs(bad) == 1e4)
    assert all(torch.equal(a, b) for a, b in zip(tensors(), before, strict=True))
    backward(model, 66)
    assert optimizer.step(1e-3)[1] == 0  # and the next step is an ordinary one
    assert not torch.equal(next(model.parameters()), before[0])
    assert all(steps == 66 for steps in optimizer.state_dict()["steps"].values())


def test_without_skip_sigma_an_outlier_is_no_reason_to_skip():
    model = make()
    optimizer = create_optimizer(model, TrainingConfig.model_validate({**FIELDS, "skip_sigma": None}), ALONE)
    for seed in range(70):
        backward(model, seed, scale=1e6 if seed == 69 else 1.0)
        assert optimizer.step(1e-3)[1] == 0


def test_the_norm_of_many_small_gradients_is_exact_and_copies_count_once():
    gradients = {"a": torch.full((1000, 1000), 1e-3), "b": torch.full((10,), 1e3), "empty": torch.empty(0, 4)}
    squared = squared_norm(gradients, {"a": 1, "b": 1, "empty": 4}, torch.device("cpu"))
    assert squared.item() == pytest.approx(1e6 * 1e-6 + 10 * 1e6, rel=1e-6)
    squared = squared_norm(gradients, {"a": 1, "b": 4, "empty": 4}, torch.device("cpu"))
    assert squared.item() == pytest.approx(1e6 * 1e-6 + 10 * 1e6 / 4, rel=1e-6)
