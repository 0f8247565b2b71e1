"""Attention as a loop over the queries, and heads to try it with: what the tests of attention share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from train.models.positions import Positions

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
