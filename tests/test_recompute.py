"""Activation checkpointing: the same gradients from less memory, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from family_runs import FAMILIES
from small_models import build_model, tokens
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tools.plan_trace import LiveBytes
from train.models import BaseModelForCausalLM

CHECKED = ["llama", "qwen3", "deepseek_v3", "minimind3 with experts"]
BATCH, LENGTH = 4, 32


def make(family: str, mode: str, **fields: object) -> BaseModelForCausalLM:
    model = build_model({**FAMILIES[family], **fields}).train()
    for block in model.layers:
        block.recompute = mode
    return model


def gradients(model: BaseModelForCausalLM) -> dict[str, Tensor]:
    ids = tokens(BATCH, LENGTH + 1)
    model(ids[:, :-1], labels=ids[:, 1:]).objective.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", CHECKED)
def test_gradients_are_those_without(family, mode):
    expected = gradients(make(family, "none"))
    found = gradients(make(family, mode))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name


def kept_eager(mode: str) -> int:
    """Bytes in use between forward and backward on top of the model."""
    model, ids = make("llama", mode, num_hidden_layers=4), tokens(BATCH, LENGTH + 1)
    with LiveBytes() as live:
        output = model(ids[:, :-1], labels=ids[:, 1:])
        kept = live.now
    del output
    return kept


def kept_compiled(family: str, mode: str) -> tuple[int, dict[str, Tensor]]:
    """Bytes that compiled blocks hand from forward to backward, and the gradients."""
    model, ids = make(family, mode), tokens(BATCH, LENGTH + 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids[:, :-1], labels=ids[:, 1:])
    output.objective.backward()
    return sum(kept.values()), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_less_is_kept():
    none, selective, full = (kept_eager(mode) for mode in ("none", "selective", "full"))
    assert full < 0.5 * selective < 0.5 * 0.8 * none


@pytest.mark.parametrize("family", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_less_is_kept_where_the_compiler_chooses(family):
    torch._dynamo.reset()
    (none, expected), (selective, found), (full, again) = (
        kept_compiled(family, mode) for mode in ("none", "selective", "full")
    )
    assert full < 0.7 * selective < 0.7 * 0.9 * none
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item())


def test_no_product_runs_twice_with_selective():
    def flops(mode: str) -> int:
        """Of the matrix products and attention of a step."""
        model, ids = make("llama", mode), tokens(BATCH, LENGTH + 1)
        with FlopCounterMode(display=False) as counter:
            model(ids[:, :-1], labels=ids[:, 1:]).objective.backward()
        return counter.get_total_flops()

    none, selective, full = (flops(mode) for mode in ("none", "selective", "full"))
    assert selective == none
    assert full > 1.1 * none
