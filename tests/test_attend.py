"""Attention: every kernel against a loop over the queries, the choice among them, and what CUDA's would be given."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_model, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from train.models import attend as module
from train.models.attend import (
    PACKED,
    Kernel,
    attend,
    blocked_attention,
    choose_kernel,
    cuda_attention,
    fused_backends,
    packed_attention,
    plain_attention,
    warn_of_padding,
)
from train.models.positions import Positions, causal_mask, document_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


def positions(kernel: str = "sdpa", mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Positions:
    none = torch.empty(0)
    return Positions(none, none, none, mask, cu_seqlens, kernel)


def heads_of(seed: int, length: int, past: int, groups: tuple[int, int], widths: tuple[int, int], batch: int = 2):
    """Query [batch, heads, length, qk], key and value [batch, kv_heads, past + length, …], strided as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = groups
    shapes = (length, heads, widths[0]), (past + length, kv_heads, widths[0]), (past + length, kv_heads, widths[1])
    return [torch.randn(batch, *shape, generator=generator).transpose(1, 2) for shape in shapes]


def fake_heads(length: int, past: int, groups: tuple[int, int], widths: tuple[int, int]) -> list[Tensor]:
    """The same on a GPU that is not there, under `FakeTensorMode`."""
    (heads, kv_heads), (width, v_width) = groups, widths
    shapes = (length, heads, width), (past + length, kv_heads, width), (past + length, kv_heads, v_width)
    return [torch.empty(2, *shape, device=CUDA, dtype=BF16).transpose(1, 2) for shape in shapes]


def looped(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Row by row, head by head, query by query; `seen` bool [batch, length, keys]."""
    batch, heads, length, _ = query.shape
    out = torch.zeros(batch, heads, length, value.shape[-1])
    for row, head, position in itertools.product(range(batch), range(heads), range(length)):
        shared = head * key.shape[1] // heads
        keys, values = (states[row, shared, seen[row, position]] for states in (key, value))
        scores = (keys * query[row, head, position]).sum(-1) * scale
        out[row, head, position] = (scores.softmax(0)[:, None] * values).sum(0)
    return out


def causal_pairs(batch: int, length: int, past: int) -> Tensor:
    return torch.ones(batch, length, past + length, dtype=torch.bool).tril(past)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


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


# What CUDA's kernels are given


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "varlen", "flash-attn"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [64, 192, 576])
def test_the_slow_kernel_is_never_allowed(kernel, masked, width):
    backends = fused_backends(kernel, masked=masked, width=width)
    assert backends
    assert SDPBackend.MATH not in backends
    if masked or width > 256:
        assert backends == [SDPBackend.EFFICIENT_ATTENTION]  # the others take no mask, and no such heads


@pytest.fixture
def sdpa_calls(monkeypatch):
    """What `cuda_attention` hands to SDPA; the answer is computed by SDPA on the CPU."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **options):
        enabled = {
            "math": torch.backends.cuda.math_sdp_enabled(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
        order = torch._C._get_sdp_priority_order()
        calls.append({"shapes": (query.shape, key.shape, value.shape), "enabled": enabled, "order": order, **options})
        with torch.nn.attention.sdpa_kernel([SDPBackend.MATH]):
            return original(query, key, value, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("kernel", ["sdpa", "cudnn", "flash", "varlen", "flash-attn"])
@pytest.mark.parametrize("groups", [(4, 4), (4, 2)])
@pytest.mark.parametrize("widths", [(8, 8), (24, 16), (12, 6)])
@pytest.mark.parametrize("shape", ["causal", "prefill", "masked", "step", "masked step"])
def test_fused_kernels_get_what_they_take(kernel, groups, widths, shape, sdpa_calls):
    """The numbers are the loop's, through whatever padding and repeating a kernel needs; math is off meanwhile.

    cuDNN is for training: a prefill and a step have another shape each time, and it would plan for each.
    """
    length, past = (1, 20) if "step" in shape else (20, 0)
    query, key, value = heads_of(3, length, past, groups, widths)
    seen = causal_pairs(2, length, past)
    mask = None
    if "masked" in shape:
        seen[1, :, :2] = length == 1  # differs from row to row
        seen[:, range(length), range(past, past + length)] = True
        mask = seen[:, None]
    with torch.set_grad_enabled(shape != "prefill"):
        found = cuda_attention(query, key, value, mask, 0.3, kernel)
    close(found, looped(query, key, value, seen, 0.3))
    grouped, takes_groups = groups[0] != groups[1], kernel != "sdpa" and mask is None
    if grouped and not takes_groups and length == 1:
        assert not sdpa_calls  # plain products: each key is read once
        return
    (call,) = sdpa_calls
    assert not call["enabled"]["math"]
    assert call["enabled"]["efficient"]
    assert call["enabled"]["cudnn"] == (kernel == "cudnn" and shape == "causal")
    assert call["enable_gqa"] == (grouped and takes_groups)
    assert (grouped and takes_groups) or call["shapes"][0][1] == call["shapes"][1][1]
    assert call["is_causal"] == (shape in ("causal", "prefill"))
    assert all(states[-1] % 8 == 0 for states in call["shapes"])
    first = {"sdpa": SDPBackend.EFFICIENT_ATTENTION}
    if shape == "causal":
        first["cudnn"] = SDPBackend.CUDNN_ATTENTION
    expected = SDPBackend.EFFICIENT_ATTENTION if mask is not None else first.get(kernel, SDPBackend.FLASH_ATTENTION)
    assert call["order"][0] == int(expected)
    if expected == SDPBackend.FLASH_ATTENTION:
        assert call["shapes"][0][-1] == call["shapes"][2][-1]  # it takes no unequal heads
    assert torch.backends.cuda.math_sdp_enabled()  # afterwards all is as it was


def test_absorbed_latent_attention_is_plain_on_cuda(sdpa_calls):
    """One key head of 264: no fused kernel takes it without repeating the cache for every head."""
    query, key, value = heads_of(4, 20, 0, (3, 1), (264, 256))
    expected = looped(query, key, value, causal_pairs(2, 20, 0), 0.05)
    torch.testing.assert_close(cuda_attention(query, key, value, None, 0.05, "cudnn"), expected, rtol=0, atol=2e-5)
    assert not sdpa_calls


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("groups", "widths"), [((8, 2), (64, 64)), ((8, 1), (576, 512))])
def test_scores_of_generation_on_cuda_are_not_rounded(training, groups, widths):
    """Their product hands out float32, of grouped heads and latents; it has no gradient, so training does without."""

    def attention(*states: Tensor) -> Tensor:
        return plain_attention(*states, None, 0.1)

    with FakeTensorMode(), torch.set_grad_enabled(training):
        query, key, value = fake_heads(1, 40, groups, widths)
        traced = torch.fx.experimental.proxy_tensor.make_fx(attention)(query, key, value)
    scores, weighted = (node for node in traced.graph.nodes if "bmm" in str(node.target))
    assert (scores.target == torch.ops.aten.bmm.dtype) == (not training)
    assert scores.meta["val"].dtype == (BF16 if training else torch.float32)
    assert weighted.meta["val"].dtype == BF16
    (out,) = traced.graph.find_nodes(op="output")
    assert out.args[0].meta["val"].shape == (2, 8, 1, widths[1])


def looped_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`varlen_attn` on tokens [tokens, heads, width], piece by piece."""
    assert window_size == (-1, 0)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(cu_seq_k.diff().max()) <= max_k
    pieces = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        piece = [states[start:stop].transpose(0, 1)[None] for states in (query, key, value)]
        pieces.append(looped(*piece, causal_pairs(1, stop - start, 0), scale)[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("kernel", PACKED)
@pytest.mark.parametrize("groups", [(4, 4), (4, 2)])
@pytest.mark.parametrize("widths", [(8, 8), (24, 16), (12, 6)])
def test_packed_documents_are_the_document_mask(kernel, groups, widths, monkeypatch):
    """Two rows, flattened: no document sees another, nor the other row."""
    monkeypatch.setattr(module, "varlen_attn", looped_varlen)
    query, key, value = heads_of(5, 10, 0, groups, widths)
    ids = torch.tensor([[3, 4, 0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])
    borders = torch.tensor([0, 2, 5, 6, 10, 18, 20], dtype=torch.int32)
    mask = document_mask(ids) & causal_mask(10, 10, CPU)
    expected = looped(query, key, value, mask[:, 0], 0.3)
    close(attend(query, key, value, positions(kernel, cu_seqlens=borders), 0.3), expected)
    close(attend(query, key, value, positions("sdpa", mask), 0.3), expected)


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "varlen", "flash-attn", "sdpa"])
@pytest.mark.parametrize("groups", [(8, 8), (8, 2)])
@pytest.mark.parametrize("widths", [(64, 64), (192, 128), (96, 96), (20, 20)])
@pytest.mark.parametrize("shape", ["causal", "masked", "step", "documents"])
def test_shapes_on_a_gpu_that_is_not_there(kernel, groups, widths, shape):
    """PyTorch's own shape rules for CUDA tensors accept the calls, and the output has the place and type expected."""
    with FakeTensorMode():
        length, past = (1, 40) if shape == "step" else (40, 0)
        query, key, value = fake_heads(length, past, groups, widths)
        mask = torch.ones(2, 1, length, past + length, dtype=torch.bool, device=CUDA) if shape == "masked" else None
        borders = torch.zeros(5, dtype=torch.int32, device=CUDA) if shape == "documents" else None
        out = attend(query, key, value, positions(kernel, mask, borders), 0.1)
    assert out.shape == (2, 8, length, widths[1])
    assert (out.device.type, out.dtype) == ("cuda", BF16)


@pytest.mark.parametrize("width", [64, 12])
def test_cuda_calls_are_one_graph(width):
    """The switch of kernels is something the compiler can follow (on CPU tensors, where flash is a kernel as well)."""
    query, key, value = heads_of(7, 20, 0, (2, 2), (width, width))
    torch._dynamo.reset()
    compiled = torch.compile(cuda_attention, fullgraph=True, backend="aot_eager")
    for kernel in ("cudnn", "flash"):
        found = compiled(query, key, value, None, 0.3, kernel)
        close(found, plain_attention(query, key, value, None, 0.3))


def test_packed_call_is_one_graph():
    with FakeTensorMode():
        query, key, value = fake_heads(16, 0, (4, 2), (24, 16))
        borders = torch.zeros(3, dtype=torch.int32, device=CUDA)
        traced = torch.fx.experimental.proxy_tensor.make_fx(packed_attention)(query, key, value, borders, 0.3)
    called = [str(node.target) for node in traced.graph.nodes if "varlen" in str(node.target)]
    assert called == ["torch_attn._varlen_attn.default"]
