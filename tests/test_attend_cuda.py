"""Attention on CUDA without a GPU: which kernels are allowed, and what they are given, against a loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_loop import BF16, CPU, CUDA, causal_pairs, close, fake_heads, heads_of, looped, positions
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from train.models import attend as module
from train.models.attend import (
    PACKED,
    attend,
    cuda_attention,
    fused_backends,
    packed_attention,
    plain_attention,
)
from train.models.positions import causal_mask, document_mask


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
