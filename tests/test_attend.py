"""Attention: the CPU's kernels against a loop over the queries, compiled and not, and the choice of a kernel."""

from __future__ import annotations

import pytest
import torch
from attention_loop import BF16, CPU, CUDA, causal_pairs, close, heads_of, looped, positions
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_model, tokens

from train.models import attend as module
from train.models.attend import (
    PACKED,
    Kernel,
    attend,
    blocked_attention,
    choose_kernel,
    plain_attention,
    warn_of_padding,
)
from train.models.positions import causal_mask

# The CPU's kernels


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40),
    past=st.integers(0, 20),
    groups=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    widths=st.sampled_from([(8, 8), (12, 8), (6, 10)]),
    scale=st.sampled_from([0.35, 0.1, 1.0]),
    kernel=st.sampled_from(["plain", "sdpa"]),
    seed=st.integers(0, 2**31),
)
def test_causal_attention_is_the_loop(length, past, groups, widths, scale, kernel, seed):
    query, key, value = heads_of(seed, length, past, groups, widths)
    expected = looped(query, key, value, causal_pairs(2, length, past), scale)
    close(attend(query, key, value, positions(kernel), scale), expected)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 30),
    past=st.integers(0, 10),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    widths=st.sampled_from([(8, 8), (12, 8)]),
    rows=st.sampled_from([1, 2]),
    kernel=st.sampled_from(["plain", "sdpa", "varlen", "flash", "cudnn", "flash-attn"]),
    seed=st.integers(0, 2**31),
)
def test_a_mask_decides_whatever_the_kernel(length, past, groups, widths, rows, kernel, seed):
    query, key, value = heads_of(seed, length, past, groups, widths)
    mask = torch.rand(rows, 1, length, past + length, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., -1] = True  # no query without keys
    expected = looped(query, key, value, mask[:, 0].expand(2, -1, -1), 0.3)
    borders = torch.tensor([0, 2 * length], dtype=torch.int32)
    close(attend(query, key, value, positions(kernel, mask, borders), 0.3), expected)


@settings(max_examples=15, deadline=None)
@given(
    length=st.one_of(st.integers(1, 700), st.just(1100)),
    groups=st.sampled_from([(2, 2), (2, 1)]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_blocks_change_nothing(length, groups, masked, seed):
    """Against plain attention, which the loop has judged, in values and in gradients."""
    states = [part.requires_grad_() for part in heads_of(seed, length, 0, groups, (8, 4), batch=1)]
    document = torch.randint(0, 3, (1, length), generator=torch.Generator().manual_seed(seed)).cumsum(1)
    together = document[:, None, :, None] == document[:, None, None, :]
    mask = causal_mask(length, length, CPU) & together if masked else None
    found, expected = (kernel(*states, mask, 0.3) for kernel in (blocked_attention, plain_attention))
    close(found, expected)
    weight = torch.randn_like(expected)
    pairs = (torch.autograd.grad((out * weight).sum(), states) for out in (found, expected))
    for gradient, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "masked", "widths", "blocks"),
    [
        (torch.float32, True, (8, 8), False),
        (torch.float32, False, (12, 8), False),
        (BF16, False, (8, 8), True),
        (BF16, True, (12, 8), True),
    ],
)
def test_compiled_attention_is_one_graph(dtype, masked, widths, blocks, monkeypatch):
    """`fullgraph` refuses a break; blocks are taken where they are faster, and the numbers stay."""
    calls = []
    blocked = blocked_attention
    monkeypatch.setattr(module, "blocked_attention", lambda *parts: calls.append(1) or blocked(*parts))
    query, key, value = (part.to(dtype) for part in heads_of(1, 300, 0, (4, 2), widths, batch=1))
    mask = causal_mask(300, 300, CPU) if masked else None
    expected = plain_attention(query.float(), key.float(), value.float(), mask, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = compiled(query, key, value, positions("sdpa", mask), 0.3)
    tolerance = 3e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)
    assert bool(calls) == blocks


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_compiled_models_take_any_length(family):
    """A compiler makes the length a symbol at its second value; loss and gradients stay those of the plain model."""
    torch._dynamo.reset()
    compiled, plain = make_model(family).train(), make_model(family).train()
    for part in [*compiled.layers, compiled.norm]:
        part.compile(fullgraph=True, backend="eager")
    for length in (8, 9, 12):
        ids = tokens(2, length + 1)
        found, expected = (model(ids[:, :-1], labels=ids[:, 1:]).objective for model in (compiled, plain))
        found.backward()
        expected.backward()
        close(found, expected)
    for parameter, reference in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_many_lengths_share_few_graphs(dtype):
    """A compiler gives up after 8 recompilations; blocks cost one graph for each number of them."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    for length in (200, 201, 160, 256, 130, 145, 222, 300, 380, 260):
        query, key, value = (part.to(dtype) for part in heads_of(2, length, 0, (2, 1), (8, 8), batch=1))
        expected = plain_attention(query, key, value, None, 0.3)
        found = compiled(query, key, value, positions("sdpa"), 0.3)
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 if dtype == torch.float32 else 3e-2)
    assert len(graphs) <= (2 if dtype == torch.float32 else 3)


# The choice


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes `choose_kernel` believe in a GPU; it returns the calls that activated FlashAttention-3."""

    def pretend(capability: tuple[int, int], *, cudnn: bool = True, flash_attention_3: bool = False) -> list[str]:
        activated: list[str] = []
        found = object() if flash_attention_3 else None
        monkeypatch.setattr(module, "compute_capability", lambda device: capability)
        monkeypatch.setattr(module, "cudnn_accepts", lambda *_: cudnn)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: found)
        monkeypatch.setattr(module, "activate_flash_attention_impl", activated.append)
        return activated

    choose_kernel.cache_clear()
    yield pretend
    choose_kernel.cache_clear()


AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE_50, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (7, 5)


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "documents", "name"),
    [
        (HOPPER, BF16, (128, 128), False, "cudnn"),
        (HOPPER, torch.float16, (64, 64), False, "cudnn"),
        (BLACKWELL, BF16, (128, 128), False, "cudnn"),
        (HOPPER, BF16, (192, 128), False, "cudnn"),  # latent attention
        (HOPPER, BF16, (192, 192), False, "flash"),
        (HOPPER, BF16, (256, 256), False, "flash"),
        (AMPERE, BF16, (128, 128), False, "flash"),
        (ADA, BF16, (192, 128), False, "flash"),
        (GEFORCE_50, BF16, (128, 128), False, "flash"),
        (HOPPER, BF16, (128, 128), True, "varlen"),
        (AMPERE, torch.float16, (192, 128), True, "varlen"),
        (HOPPER, BF16, (576, 512), False, "sdpa"),  # wider than any flash kernel
        (HOPPER, BF16, (260, 260), True, "sdpa"),
        (HOPPER, torch.float32, (128, 128), False, "sdpa"),
        (HOPPER, torch.float32, (128, 128), True, "sdpa"),
        (TURING, torch.float16, (64, 64), False, "sdpa"),
        (TURING, BF16, (64, 64), False, "plain"),
        (HOPPER, torch.float64, (64, 64), False, "plain"),
    ],
)
def test_kernels_of_gpus(gpu, capability, dtype, widths, documents, name):
    gpu(capability)
    kernel = choose_kernel(CUDA, dtype, *widths, documents=documents)
    assert kernel.name == name
    slow = "slow path" in kernel.reason
    assert slow == (name == "plain" or (documents and name not in PACKED))
    assert str(kernel).startswith(f"attention: {name} (")


def test_cudnn_has_the_last_word_on_its_heads(gpu):
    gpu(HOPPER, cudnn=False)
    assert choose_kernel(CUDA, BF16, 192, 128, documents=False).name == "flash"


def test_flash_attention_3_is_taken_where_it_is_faster(gpu):
    activated = gpu(HOPPER, flash_attention_3=True)
    assert choose_kernel(CUDA, BF16, 128, 128, documents=True).name == "flash-attn"
    assert activated == ["FA3"]
    assert choose_kernel(CUDA, BF16, 128, 128, documents=False).name == "cudnn"
    assert choose_kernel(CUDA, BF16, 256, 256, documents=False).name == "flash-attn"
    choose_kernel.cache_clear()
    activated = gpu(AMPERE, flash_attention_3=True)  # it runs on Hopper only
    assert choose_kernel(CUDA, BF16, 128, 128, documents=True).name == "varlen"
    assert activated == []


def test_kernels_of_cpus():
    fused = choose_kernel(CPU, torch.float32, 64, 64, documents=False)
    assert fused.name == "sdpa"
    assert "slow" not in fused.reason
    assert "slow" in choose_kernel(CPU, torch.float32, 64, 64, documents=True).reason
    plain = choose_kernel(CPU, torch.float32, 64, 64, documents=True, flash=False)
    assert plain.name == "plain"
    assert "use_flash_attention" in plain.reason
    assert "blocks" not in fused.reason
    for documents in (False, True):  # compiled code has a kernel of its own there
        assert "compiled, blocks of queries" in choose_kernel(CPU, BF16, 64, 64, documents=documents).reason


@pytest.mark.parametrize("name", ["cudnn", "flash", "varlen", "flash-attn", "sdpa", "plain"])
@pytest.mark.parametrize("documents", [False, True])
def test_a_padding_mask_in_the_way_of_the_named_kernel_is_told_once(name, documents, monkeypatch, recwarn):
    model, ids = make_model(), tokens(2, 6)
    expected = model(ids).logits
    monkeypatch.setattr(model, "attention_kernel", lambda device, *, documents: Kernel(name, "as the test wants it"))
    warn_of_padding.cache_clear()
    for _ in range(2):
        found = model(ids, torch.ones_like(ids), mask_documents=documents).logits
    close(found, expected)
    told = [str(warning.message) for warning in recwarn if "attention_mask" in str(warning.message)]
    assert len(told) == (name not in ("sdpa", "plain"))
    assert all(f"not {name} runs" in message and "slow path" in message for message in told)
