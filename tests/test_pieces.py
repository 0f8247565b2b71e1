"""Pieces of tensors: whatever the cut and the rows, they are the whole tensor, and any layout reads any other's."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import Grid, as_rank, fused_cut, held, write_together
from torch import Tensor

from train.checkpoint_files import HostMemory, Key, choose_writers, own_pieces, piece_sizes, read_tensors, stored_shapes
from train.pieces import StoredTensor, pieces

GRIDS = [Grid(r, s, t) for r in (1, 2) for s in (1, 2, 3, 5) for t in (1, 2, 4)]
grids = st.sampled_from(GRIDS)


@st.composite
def tensors(draw) -> tuple[Tensor, int | None, list[int]]:
    """A whole tensor, the dimension in which it can be cut, and the parts that are cut each; sizes fit 4 ranks."""
    dimensions = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 9)) for _ in range(dimensions)]
    dim = draw(st.one_of(st.none(), st.integers(0, dimensions - 1)))
    parts = [4 * draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]
    if dim is not None:
        shape[dim] = sum(parts)
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape), dim, parts


def pieces_of_all(whole: Tensor, dim: int | None, parts: list[int], grid: Grid, *, plain: bool) -> list[StoredTensor]:
    """What every rank of a grid stores of a tensor; `plain`: as optimiser state that is no DTensor."""
    found = []
    for rank, place in enumerate(grid.places):
        with as_rank(rank, len(grid.places)):
            cut = None if dim is None or grid.tp == 1 else fused_cut(tuple(whole.shape), dim, parts, grid.tp, place[2])
            parameter, local = held(whole, grid, place, cut)
            found.append(StoredTensor.of(local, cut, parameter) if plain else StoredTensor.of(parameter, cut))
    return found


@settings(max_examples=50, deadline=None)
@given(tensors(), grids, st.booleans())
def test_pieces_are_the_whole_tensor_each_element_once(tensor, grid, plain):
    whole, dim, parts = tensor
    times = grid.replicate * (grid.tp if dim is None else 1)
    seen = torch.zeros_like(whole)
    for stored in pieces_of_all(whole, dim, parts, grid, plain=plain):
        assert stored.size() == whole.shape
        for piece in stored.parts:
            assert torch.equal(piece.tensor, whole[piece.slices()])
            assert piece.tensor.numel()
            seen[piece.slices()] += 1
    assert torch.equal(seen, torch.full_like(whole, times))


def test_pieces_share_the_memory_of_the_tensor():
    matrix = torch.zeros(8, 6)
    cut = fused_cut((8, 12), 1, [4, 8], 2, 1)
    for piece in pieces(matrix, cut):
        piece.tensor.fill_(float(piece.offsets[1]))
    assert matrix[0].tolist() == [2.0, 2.0, 8.0, 8.0, 8.0, 8.0]


@settings(max_examples=20, deadline=None)
@given(tensors(), grids, grids, st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_one_layout_writes_another_reads(tensor, writes, reads, dtype):
    whole, dim, parts = tensor
    whole = whole.to(dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_together(folder, [{"a": stored} for stored in pieces_of_all(whole, dim, parts, writes, plain=False)])
        assert stored_shapes(folder) == {"a": tuple(whole.shape)}
        for stored in pieces_of_all(torch.zeros_like(whole), dim, parts, reads, plain=False):
            read_tensors(folder, {"a": stored}, None)
            for piece in stored.parts:
                assert torch.equal(piece.tensor, whole[piece.slices()])
                assert piece.tensor.dtype == dtype


@pytest.mark.parametrize("grid", [Grid(replicate=4), Grid(replicate=2, shard=2), Grid(tp=4), Grid(shard=4)])
def test_copies_are_written_once_and_shared_evenly(grid, tmp_path):
    """Of 40 equal matrices on 4 ranks each rank writes about a quarter."""
    ranks: list[dict[str, StoredTensor]] = [{} for _ in grid.places]
    for number in range(40):
        whole = torch.full((512, 64), float(number))
        for rank, stored in enumerate(pieces_of_all(whole, None, [], grid, plain=False)):
            ranks[rank][f"w{number}"] = stored
    sizes = write_together(tmp_path, ranks)
    data = 40 * 512 * 64 * 4
    assert data <= sum(sizes) < 1.1 * data  # torch.save puts a kilobyte or two around each piece
    assert max(sizes) < 1.3 * min(sizes)


KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


@settings(max_examples=10, deadline=None)
@given(grids, st.sampled_from([1, 2]))
def test_each_piece_has_one_writer_that_holds_it(grid, stages):
    """Of a matrix that tensor parallelism cuts, a vector, a counter, and an embedding that all stages have."""
    size = len(grid.places)
    ranks: list[dict[str, StoredTensor]] = [{} for _ in range(stages * size)]
    wholes = {"embed": torch.randn(96, 4), "matrix": torch.randn(64, 4), "norm": torch.randn(16)}
    for name, whole in wholes.items():
        cut = (0, [32, 32]) if name == "matrix" else (None, [])
        for place, stored in enumerate(pieces_of_all(whole, *cut, grid, plain=False)):
            for rank in range(place, len(ranks), size):
                of_stage = name if name == "embed" else f"layers.{rank // size}.{name}"
                ranks[rank] |= {f"{kind}.{of_stage}": stored for kind in KINDS}
                ranks[rank]["optimizer.count"] = StoredTensor.of(torch.tensor(1.0))
    tables = [piece_sizes(tensors) for tensors in ranks]
    writers = choose_writers(tables)
    assert writers == choose_writers([dict(reversed(table.items())) for table in tables])  # the same on all ranks
    written: dict[Key, int] = {}
    for rank, (tensors, table) in enumerate(zip(ranks, tables, strict=True)):
        own = piece_sizes(own_pieces(tensors, {key: writers[key] == rank for key in table}))
        assert not own.keys() & written.keys()
        written |= own
    assert written.keys() == writers.keys() == set().union(*tables)
    counts = {name: tensor.shape.numel() for tensors in ranks for name, tensor in tensors.items()}
    for name, count in counts.items():  # each element once
        assert sum(size for (of, _), size in written.items() if of == name) == 4 * count


@pytest.mark.parametrize(
    "grid", [Grid(replicate=4), Grid(replicate=2, shard=2), Grid(replicate=2, tp=2), Grid(tp=4), Grid(shard=4)], ids=str
)
@pytest.mark.parametrize("kinds", [KINDS[:1], KINDS], ids=["weights", "all"])
def test_ranks_have_about_as_much_to_write(grid, kinds):
    """Of 30 matrices of three sizes and 10 vectors; the weights alone as well as all."""
    ranks: list[dict[str, StoredTensor]] = [{} for _ in grid.places]
    shapes = [(64 * (1 + number % 3), 32) for number in range(30)] + [(32,)] * 10
    for number, shape in enumerate(shapes):
        dim, parts = (0, [shape[0]]) if len(shape) == 2 else (None, [])
        for rank, stored in enumerate(pieces_of_all(torch.zeros(shape), dim, parts, grid, plain=False)):
            ranks[rank] |= {f"{kind}.w{number}": stored for kind in KINDS}
    tables = [piece_sizes(tensors) for tensors in ranks]
    sizes = [0] * len(ranks)
    for (name, offsets), writer in choose_writers(tables).items():
        if name.startswith(kinds):
            sizes[writer] += tables[writer][name, offsets]
    assert sum(sizes) == len(kinds) * sum(4 * torch.Size(shape).numel() for shape in shapes)
    assert max(sizes) < 1.1 * min(sizes)


def test_a_rank_may_have_some_of_the_names_and_scalars_are_equal_on_all(tmp_path):
    """Stages of a pipeline with a tied embedding, and a counter."""
    first, second, tied, count = torch.randn(3, 4), torch.randn(5), torch.randn(6, 2), torch.tensor(7.0)
    write_together(
        tmp_path,
        [
            {"first": StoredTensor.of(first), "tied": StoredTensor.of(tied), "count": StoredTensor.of(count)},
            {"second": StoredTensor.of(second), "tied": StoredTensor.of(tied), "count": StoredTensor.of(count)},
        ],
    )
    names = {"first": first, "second": second, "tied": tied, "count": count}
    assert stored_shapes(tmp_path) == {name: tuple(tensor.shape) for name, tensor in names.items()}
    for wanted in (["first", "tied"], ["second", "count"], list(names)):
        found = {name: torch.zeros_like(names[name]) for name in wanted}
        read_tensors(tmp_path, {name: StoredTensor.of(tensor) for name, tensor in found.items()}, None)
        assert all(torch.equal(found[name], names[name]) for name in wanted)


def test_a_hole_is_noticed(tmp_path):
    """Rows 0 and 1 of 4 on the first rank, none on the second."""
    half = StoredTensor((4, 2), torch.float32, pieces(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="invalid fill"):
        write_together(tmp_path, [{"a": half}, {"b": StoredTensor.of(torch.ones(1))}])


def test_host_memory_is_a_copy_that_is_used_again():
    memory = HostMemory(torch.device("cpu"))
    tensors = {
        "matrix": torch.randn(3, 5),
        "column": torch.randn(4, 6)[:, 1:2],
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.0),
    }
    copies = memory.copy({name: StoredTensor.of(tensor) for name, tensor in tensors.items()})
    first = {name: copies[name].parts[0].tensor for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(first[name], tensor)
        assert first[name].untyped_storage().nbytes() == tensor.nbytes  # or the writer copies it once more
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(first[name], before[name]) for name in tensors)
    again = memory.copy({name: StoredTensor.of(tensor) for name, tensor in tensors.items()})
    assert {n: c.parts[0].tensor.data_ptr() for n, c in again.items()} == {n: t.data_ptr() for n, t in first.items()}
    assert not first["matrix"].any()
