"""The mixture of experts against a loop over tokens; load and balance. (`transformers` is asked of whole models.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from train.models.moe import MixtureOfExperts, Router, grouped_linear

HIDDEN, FFN = 16, 24
ROUTERS = {
    "softmax": {"normalize": True},
    "softmax as it is": {"normalize": False, "scale": 1.5},
    "groups": {"normalize": False, "scale": 16.0, "groups": 4, "top_groups": 2},
    "sigmoid with bias": {"scoring": "sigmoid", "normalize": True, "scale": 2.5, "correction_bias": True},
}
ROUTERS["all of it"] = {**ROUTERS["sigmoid with bias"], "groups": 4, "top_groups": 2}


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough for the experts, and the choice of them, to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.state_dict().items()):
            tensor.normal_(0.0, 0.5 if "gate." in name else 0.2, generator=generator)


def make(num_experts: int = 8, top_k: int = 2, *, shared: int = 0, seed: int = 0, **router) -> MixtureOfExperts:
    router = router or ROUTERS["softmax"]
    moe = MixtureOfExperts(HIDDEN, FFN, Router(HIDDEN, num_experts, top_k, **router), shared_size=shared)
    fill(moe, seed)
    return moe


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(moe: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, load and balance, one token and one expert at a time."""
    router, experts = moe.gate, moe.experts
    size = router.num_experts // router.groups
    output, load, balance = [], [0] * router.num_experts, []
    for sequence in x:
        counts, shares = [0] * router.num_experts, []
        for token in sequence:
            logits = router.weight @ token
            scores = (
                torch.exp(logits) / torch.exp(logits).sum()
                if router.scoring == "softmax"
                else 1 / (1 + (-logits).exp())
            )
            shares.append(scores / scores.sum())
            rank = scores.tolist()
            if router.e_score_correction_bias is not None:
                rank = [a + b for a, b in zip(rank, router.e_score_correction_bias.tolist(), strict=True)]
            members = [range(group * size, (group + 1) * size) for group in range(router.groups)]
            best = 1 if router.e_score_correction_bias is None else 2
            members.sort(key=lambda group: -sum(sorted((rank[e] for e in group), reverse=True)[:best]))
            allowed = [e for group in members[: router.top_groups] for e in group]
            chosen = sorted(allowed, key=lambda e: -rank[e])[: router.top_k]
            total = sum(scores[e] for e in chosen) if router.normalize else 1.0
            out = torch.zeros(HIDDEN)
            for e in chosen:
                counts[e] += 1
                gate, up = experts.gate_up_proj[e, :FFN] @ token, experts.gate_up_proj[e, FFN:] @ token
                out = out + scores[e] / total * router.scale * (
                    experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up)
                )
            if moe.shared_experts is not None:
                gate, up = (moe.shared_experts.gate_up_proj.weight @ token).chunk(2)
                out = out + moe.shared_experts.down_proj.weight @ (gate * torch.sigmoid(gate) * up)
            output.append(out)
        mean = torch.stack(shares).mean(0)
        share = router.num_experts / (router.top_k * len(sequence))
        balance.append(sum(share * count * p for count, p in zip(counts, mean, strict=True)))
        load = [a + b for a, b in zip(load, counts, strict=True)]
    return torch.stack(output).view_as(x), torch.tensor(load, dtype=torch.float32), torch.stack(balance)


def gradients(moe: nn.Module, x: Tensor, output: Tensor, balance: Tensor | None = None) -> dict[str, Tensor]:
    """Of a weighted sum of the outputs, and of the sequences' balance losses, for the input and all parameters."""
    value = (output * normal(*output.shape, seed=5)).sum()
    if balance is not None:
        value = value + (balance * torch.arange(1.0, len(balance) + 1)).sum()
    names = dict(moe.named_parameters())
    return dict(zip(["x", *names], torch.autograd.grad(value, [x, *names.values()]), strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-5 of each tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# Against the loop


@settings(max_examples=25, deadline=None)
@given(
    router=st.sampled_from(sorted(ROUTERS)),
    batch=st.integers(1, 3),
    length=st.integers(1, 7),
    size=st.integers(1, 4),
    top_k=st.integers(1, 8),
    shared=st.sampled_from([0, 8]),
    seed=st.integers(0, 1000),
)
def test_outputs_load_and_gradients_are_those_of_the_loop(router, batch, length, size, top_k, shared, seed):
    options = ROUTERS[router]
    top_k = min(top_k, options.get("top_groups", 4) * size)
    moe = make(4 * size, top_k, shared=shared, seed=seed, **options)
    x = normal(batch, length, HIDDEN, seed=seed + 1).requires_grad_()
    output, routing = moe(x)
    expected, load, balance = naive(moe, x)
    assert_same({"output": output, "load": routing.load, "balance": routing.balance},
                {"output": expected, "load": load, "balance": balance})  # fmt: skip
    assert_same(gradients(moe, x, output, routing.balance), gradients(moe, x, expected, balance))
    assert not routing.load.requires_grad


def test_bf16_activations_keep_float32_weights_and_scores():
    moe, x = make(), normal(2, 9, HIDDEN).to(torch.bfloat16)
    weights, experts, probabilities = moe.gate(x.flatten(0, 1))
    exact = moe.gate(x.flatten(0, 1).float())
    assert weights.dtype == probabilities.dtype == torch.float32
    assert (weights == exact[0]).all()
    assert (experts == exact[1]).all()
    output, _ = moe(x)
    assert output.dtype == torch.bfloat16
    expected = moe(x.float())[0]
    assert (output - expected).norm() < 0.02 * expected.norm()
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


# Ways to run


@pytest.mark.parametrize("router", ["softmax", "all of it"])
def test_compiled_whole_with_equal_results(router):
    moe = make(8, 2, shared=8, **ROUTERS[router])
    x = normal(2, 9, HIDDEN).requires_grad_()
    output, routing = moe(x)
    compiled_output, compiled_routing = torch.compile(moe, fullgraph=True)(x)
    assert_same(gradients(moe, x, compiled_output, compiled_routing.balance),
                gradients(moe, x, output, routing.balance))  # fmt: skip
    assert_same({"output": compiled_output}, {"output": output})
    assert (compiled_routing.load == routing.load).all()


def test_recomputation_changes_no_bit():
    moe, x = make(shared=8), normal(2, 9, HIDDEN).requires_grad_()
    output, routing = moe(x)
    again, routing_again = checkpoint(moe, x, use_reentrant=False)
    assert (routing_again.load == routing.load).all()
    expected = gradients(moe, x, output, routing.balance)
    found = gradients(moe, x, again, routing_again.balance)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_tokens_do_not_depend_on_the_batch():
    moe, x = make(shared=8), normal(4, 6, HIDDEN)
    whole, _ = moe(x)
    for row in range(4):
        for position in range(6):
            alone, _ = moe(x[row : row + 1, position : position + 1])
            torch.testing.assert_close(alone[0, 0], whole[row, position])


def test_meta_device():
    with torch.device("meta"):
        moe = make(shared=8, **ROUTERS["all of it"])
        output, routing = moe(torch.empty(2, 9, HIDDEN))
    assert moe.gate.e_score_correction_bias.is_meta
    assert output.shape == (2, 9, HIDDEN)
    assert routing.load.shape == (8,)
    assert routing.balance.shape == (2,)


def test_shapes_follow_from_the_batch_alone():
    """Fake tensors have no values: a wait for the host, or a shape that hangs on the choice of experts, raises."""
    with FakeTensorMode():
        moe = MixtureOfExperts(HIDDEN, FFN, Router(HIDDEN, 8, 2, **ROUTERS["all of it"]))
        x = torch.empty(2, 9, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        output, routing = moe(x)
        (output.float().sum() + routing.balance.sum()).backward()
        assert output.shape == x.grad.shape == x.shape
        assert moe.experts.down_proj.grad.shape == (8, HIDDEN, FFN)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_grouped_linear_with_empty_groups_and_odd_widths(counts, widths):
    inputs, outputs = widths
    x = normal(sum(counts), inputs).requires_grad_()
    weight = normal(len(counts), outputs, inputs, seed=2).requires_grad_()
    offsets = torch.tensor(counts).cumsum(0).int()
    found = grouped_linear(x, weight, offsets)
    expected = torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight, strict=True)])
    torch.testing.assert_close(found, expected)
    grad = normal(sum(counts), outputs, seed=3)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


# Load, balance, bias


@pytest.mark.parametrize("router", ROUTERS)
def test_no_token_is_dropped_when_all_choose_one_expert(router):
    moe = make(8, 1, **ROUTERS[router])
    with torch.no_grad():
        moe.gate.weight.zero_()[3] = 2.0
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.zero_()
    x = normal(2, 50, HIDDEN).abs() + 0.5
    output, routing = moe(x)
    assert routing.load.tolist() == [0, 0, 0, 100, 0, 0, 0, 0]
    assert (output != 0).any(-1).all()
    assert_same({"output": output}, {"output": naive(moe, x)[0]})
    if moe.gate.scoring == "softmax":
        torch.testing.assert_close(routing.balance, torch.full((2,), 8.0))  # the worst there is


@pytest.mark.parametrize("router", ["softmax", "sigmoid with bias"])
def test_uniform_use_has_balance_one(router):
    """Sequence of the 8 one-hot tokens, each leaning towards one expert: counts are equal, and so are mean scores."""
    moe = make(8, 1, **ROUTERS[router])
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(8, HIDDEN))
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.zero_()
    _, routing = moe(torch.eye(8, HIDDEN).expand(3, 8, HIDDEN))
    assert routing.load.tolist() == [3.0] * 8
    torch.testing.assert_close(routing.balance, torch.ones(3))


def test_balance_of_a_sequence_does_not_depend_on_the_others():
    moe, x = make(), normal(4, 10, HIDDEN)
    _, whole = moe(x)
    parts = [moe(part)[1] for part in x.split([1, 3])]  # as two ranks would share them
    torch.testing.assert_close(torch.cat([part.balance for part in parts]), whole.balance)
    assert (sum(part.load for part in parts) == whole.load).all()


def test_descending_the_balance_loss_evens_the_load_out():
    moe, x = make(8, 1), normal(8, 64, HIDDEN)
    with torch.no_grad():
        moe.gate.weight[:2] *= 4
    before = moe(x)[1].load
    for _ in range(60):
        (grad,) = torch.autograd.grad(moe(x)[1].balance.mean(), moe.gate.weight)
        with torch.no_grad():
            moe.gate.weight -= 3.0 * grad
    assert moe(x)[1].load.std() < 0.5 * before.std()


def test_bias_moves_the_load_and_not_the_weights():
    moe, x = make(8, 2, **ROUTERS["sigmoid with bias"]), normal(8, 64, HIDDEN)
    router = moe.gate
    router.e_score_correction_bias.zero_()
    router.update_correction_bias(torch.zeros(8), 0.1)  # a step that was skipped
    assert (router.e_score_correction_bias == 0).all()
    router.update_correction_bias(torch.tensor([4.0, 0, 2, 2, 2, 2, 2, 2]), 0.1)
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([-0.1, 0.1, 0, 0, 0, 0, 0, 0]))
    spread = [moe(x)[1].load.std()]
    for _ in range(100):
        router.update_correction_bias(moe(x)[1].load, 0.01)
    assert moe(x)[1].load.std() < 0.2 * spread[0]
    weights, experts, _ = router(x.flatten(0, 1))
    scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.T).gather(1, experts)
    torch.testing.assert_close(weights, 2.5 * scores / scores.sum(-1, keepdim=True))


def test_bias_is_saved_and_is_no_parameter():
    moe = make(**ROUTERS["all of it"])
    assert "gate.e_score_correction_bias" in moe.state_dict()
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())
    assert "gate.e_score_correction_bias" not in make().state_dict()
