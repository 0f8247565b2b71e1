"""The key/value cache against lists of rows, and models that decode with it against whole passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, make_model, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from train.models.cache import KeyValueCache
from train.models.few_rows import is_decoding
from train.models.linear import linear


def states(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two kinds of states, as of keys with heads and of latent vectors."""
    return (
        torch.randn(batch, length, 2, 3, generator=generator),
        torch.randn(batch, length, 5, generator=generator),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_come_and_go(data):
    """Any series of writes, selections and joins leaves in each row what was written to it, and nothing that is NaN."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    cache = KeyValueCache(0, 0)
    rows: list[list[torch.Tensor]] = []  # of each row its two states [length, ...], as they should be

    def write(target: KeyValueCache, rows: list[list[torch.Tensor]], length: int) -> None:
        new = states(len(rows), length, generator)
        starts = [len(row[0]) for row in rows]
        if len(set(starts)) == 1 and data.draw(st.booleans()):
            positions = torch.arange(starts[0], starts[0] + length).expand(len(rows), length)
        else:
            positions = torch.tensor(starts)[:, None] + torch.arange(length)
        target.length = max(starts) + length
        target.reserve(target.length)
        for row, piece in zip(rows, zip(*new, strict=True), strict=True):
            row[:] = [torch.cat(pair) for pair in zip(row, piece, strict=True)]
        for layer in range(2):
            found = target.update(layer, positions, *(state + layer for state in new))
            for kind, whole in enumerate(found):
                assert whole.shape[:2] == (len(rows), target.length)
                assert whole.isfinite().all()
                for index, row in enumerate(rows):
                    assert (whole[index, : len(row[kind])] == row[kind] + layer).all()

    for action in data.draw(st.lists(st.sampled_from(["join", "write", "select"]), min_size=1, max_size=8)):
        if action == "join":
            size, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
            joined = [[torch.empty(0, 2, 3), torch.empty(0, 5)] for _ in range(size)]
            other = KeyValueCache(size, length)
            write(other, joined, length)
            cache.join(other)
            rows += joined
        elif action == "select" and rows:
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
            cache.select(chosen)
            rows = [list(rows[row]) for row in chosen]
        elif rows:
            write(cache, rows, data.draw(st.integers(1, 3)))
        assert cache.batch == len(rows)


def test_a_cache_that_is_full_is_an_error():
    cache = KeyValueCache(1, 4)
    cache.length = 5
    with pytest.raises(AssertionError):
        cache.update(0, torch.arange(5)[None], torch.zeros(1, 5, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 1, 4], [12]])
def test_pieces_of_any_size_equal_the_whole_pass(family, pieces):
    model, ids, cache = make_model(family), tokens(2, 12), KeyValueCache(2, 16)
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("piece", [1, 3])
def test_rows_of_different_lengths_equal_each_alone(family, piece):
    """A prefill that is padded on the right, then pieces that go on at each row's own end."""
    model, ids, lengths = make_model(family), tokens(3, 16), [9, 2, 5]
    cache = KeyValueCache(3, 16)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :9], cache=cache, logits_at=torch.tensor(lengths) - 1).logits[:, 0]
        torch.testing.assert_close(first, whole[range(3), [n - 1 for n in lengths]], rtol=0, atol=1e-5)
        for step in range(2):
            positions = torch.tensor(lengths)[:, None] + torch.arange(piece) + step * piece
            found = model(ids.gather(1, positions), position_ids=positions, cache=cache).logits
            expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[2]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_latent_cache_is_small():
    """Latent attention keeps one vector and one rotated key per token, whatever the number of heads."""
    model, cache = make_model("deepseek_v2"), KeyValueCache(1, 8)
    rank, rope = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    with torch.no_grad():
        model(tokens(1, 8), cache=cache)
    kept = cache.update(0, torch.tensor([[7]]), torch.zeros(1, 1, rank), torch.zeros(1, 1, rope))
    assert [tuple(state.shape) for state in kept] == [(1, 8, rank), (1, 8, rope)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 33), (1, 1, 64), (3, 2, 7), (8, 1, 100), (16, 12)])
def test_the_product_of_few_rows(shape, threads):
    """The kernel that decoding on a CPU takes, for sizes that are no multiple of anything, and biases."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).transpose(0, -2)  # not contiguous
    weight, bias = torch.randn(51, shape[-1], generator=generator), torch.randn(51, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert is_decoding(x, weight)
            found = linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_what_is_not_decoding_keeps_torch_s_product():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert not is_decoding(x, weight)  # gradients are wanted
    with torch.no_grad():
        assert is_decoding(x, weight)
        assert not is_decoding(torch.randn(64, 8), weight)
        assert not is_decoding(x.bfloat16(), weight)
        assert not is_decoding(x, weight.bfloat16())
        assert not is_decoding(x, torch.randn(8, 3).t())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert not is_decoding(mode.from_tensor(x), mode.from_tensor(weight))
