"""The loader gives exactly the plan's windows, whatever the ranks, batches, threads and interruptions."""

from __future__ import annotations

import itertools
import pickle
import threading

import numpy as np
import pytest
import torch
from dataset_files import EOS, tokenizer_json, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import shards
from shards.errors import UserError
from shards.loader import DatasetMixer, WindowLoader, WindowReader
from shards.mixture import MixtureConfig, MixturePlan

SEQ_LEN = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sources, uint16, with shards shorter than some windows; returns config and streams."""
    folder = tmp_path_factory.mktemp("data")
    streams = {
        "web": write_dataset(folder / "web", 9_000, seed=1, shard_tokens=1000),
        "code": write_dataset(folder / "code", 3_111, seed=2, shard_tokens=20),  # a window covers several shards
        "math": write_dataset(folder / "math", 700, seed=3, shard_tokens=10_000),
    }
    for name in streams:
        write_dataset(folder / name / "val", 400, seed=9)
    config = {
        "name": "test",
        "seed": 5,
        "sources": [
            {"name": "web", "path": str(folder / "web"), "weight": 0.6},
            {"name": "code", "path": str(folder / "code"), "weight": 0.3},
            {"name": "math", "path": str(folder / "math")},
        ],
        "phases": [{"from": 300 * SEQ_LEN, "weights": {"web": 1, "math": 1}}],
    }
    return MixtureConfig.model_validate(config), streams


@pytest.fixture(scope="module")
def plan(data):
    return MixturePlan.build(data[0], SEQ_LEN)


@pytest.fixture(scope="module")
def expected(plan, data):
    """Windows of samples 0 … 999, cut from the streams by numpy."""
    found, streams = plan.locate(np.arange(1000)), data[1]
    names = [source.name for source in plan.sources]
    return np.stack(
        [
            streams[names[source]][start : start + SEQ_LEN + 1]
            for source, start in zip(found.source, found.start, strict=True)
        ]
    )


def rows(steps) -> np.ndarray:
    """All windows of some steps, put together again from inputs and labels."""
    batches = [batch for step in steps for batch in step]
    return torch.cat([torch.cat([b.input_ids, b.labels[:, -1:]], dim=1) for b in batches]).numpy()


def test_batches_are_the_windows_of_the_plan(plan, expected):
    loader = WindowLoader(plan, batch_size=10, accumulation=2, stop_sample=1000)
    steps = list(loader)
    assert len(steps) == 50
    assert loader.next_sample == 1000
    assert (rows(steps) == expected).all()
    batch = steps[7][1]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids.untyped_storage().data_ptr() == batch.labels.untyped_storage().data_ptr()
    assert (batch.sources.numpy() == plan.locate(np.arange(150, 160)).source).all()
    assert batch.sources.dtype == torch.int32
    assert batch.cu_seqlens is None
    assert batch.position_ids is None
    assert batch.max_seqlen == SEQ_LEN
    loader.close()


def test_wide_ids(tmp_path):
    """uint32 shards, and a mixture of window positions on both sides of every shard border."""
    stream = write_dataset(tmp_path / "wide", 4000, shard_tokens=50, vocab_size=70_000, words=80_000)
    assert stream.max() > 2**16
    source = {"name": "wide", "path": str(tmp_path / "wide"), "weight": 1}
    plan = MixturePlan.build(MixtureConfig.model_validate({"sources": [source]}), 64)
    windows, found = WindowReader(plan).read(np.arange(300))
    assert (windows.numpy() == np.stack([stream[start : start + 65] for start in found.start])).all()


def test_far_windows_of_a_huge_source(tmp_path):
    """20 GB of sparse shards open without a read, and positions beyond 2^32 are served."""
    from tools.bench.loader import sparse_dataset

    sparse_dataset(tmp_path / "huge", 10**10)
    source = {"name": "huge", "path": str(tmp_path / "huge"), "weight": 1}
    plan = MixturePlan.build(MixtureConfig.model_validate({"sources": [source]}), 1000)
    found = plan.locate(np.arange(1000))
    row = int(found.start.argmax())
    assert found.start[row] > 2**33
    shard, offset = divmod(int(found.start[row]), 2**27)
    with (tmp_path / "huge" / f"shard-{shard:05d}.bin").open("r+b") as file:
        file.seek(2 * offset)
        file.write(np.arange(1, 1002, dtype="<u2").tobytes())
    assert not plan.sources[0].dataset._tokens  # nothing is mapped yet
    windows, _ = WindowReader(plan).read(np.arange(row, row + 1))
    assert windows[0].tolist() == list(range(1, 1002))


@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    num_workers=st.integers(0, 3),
    prefetch_factor=st.integers(1, 5),
    next_sample=st.integers(0, 500),
)
def test_order_is_independent_of_ranks_batches_and_threads(
    plan, expected, batch_size, accumulation, world_size, num_workers, prefetch_factor, next_sample
):
    loaders = [
        WindowLoader(
            plan,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            next_sample=next_sample,
            stop_sample=1000,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
        )
        for rank in range(world_size)
    ]
    step = batch_size * accumulation * world_size
    taken = []
    for _ in range(3):
        taken += [rows([next(loader)]) for loader in loaders]
    assert all(loader.next_sample == next_sample + 3 * step for loader in loaders)
    assert (np.concatenate(taken) == expected[next_sample : next_sample + 3 * step]).all()
    for loader in loaders:
        loader.close()


@settings(max_examples=30, deadline=None)
@given(stops=st.lists(st.integers(1, 20), min_size=2, max_size=3), world_sizes=st.permutations([1, 2, 4]))
def test_resumed_twice_on_other_ranks_equals_uninterrupted(plan, expected, stops, world_sizes):
    """`next_sample` is all the state, and work done ahead leaves no trace in it."""
    position, taken = 0, []
    for steps, world_size in zip(stops, world_sizes, strict=False):
        loaders = [
            WindowLoader(plan, batch_size=4 // world_size, rank=r, world_size=world_size, next_sample=position)
            for r in range(world_size)
        ]
        for _ in range(steps):
            taken += [rows([next(loader)]) for loader in loaders]
        (position,) = {loader.next_sample for loader in loaders}
        for loader in loaders:
            loader.close()
    assert position == 4 * sum(stops[: len(world_sizes)])
    assert (np.concatenate(taken) == expected[:position]).all()


def test_ends_before_the_step_that_is_not_full(data, plan):
    assert len(list(WindowLoader(plan, batch_size=8, stop_sample=31))) == 3
    assert len(list(WindowLoader(plan, batch_size=8, stop_sample=32, num_workers=0))) == 4
    total = MixturePlan.build(data[0], SEQ_LEN, total_samples=20)
    assert len(list(WindowLoader(total, batch_size=5))) == 4
    assert len(list(itertools.islice(WindowLoader(plan, batch_size=512), 9))) == 9  # no total: no end


def test_batches_stay_untouched_while_the_loader_goes_on(plan, expected):
    loader = WindowLoader(plan, batch_size=8, num_workers=2, stop_sample=800)
    kept = [next(loader) for _ in range(5)]
    for _ in loader:
        pass
    assert (rows(kept) == expected[:40]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_document_mask_equals_a_scan_for_eos(plan, num_workers):
    loader = WindowLoader(plan, batch_size=6, document_mask=True, num_workers=num_workers, stop_sample=900)
    lengths = set()
    for (batch,) in loader:
        borders, positions, position = [0], [], 0
        for row in batch.input_ids.tolist():
            for token in row:
                positions.append(position)
                position += 1
                if token == EOS or len(positions) % SEQ_LEN == 0:
                    borders.append(len(positions))
                    position = 0
        assert batch.cu_seqlens.tolist() == borders
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.position_ids.tolist() == np.reshape(positions, (6, SEQ_LEN)).tolist()
        assert batch.position_ids.dtype == torch.int64
        assert batch.max_seqlen == np.diff(borders).max()
        lengths |= set(np.diff(borders).tolist())
    assert {1, SEQ_LEN} <= lengths  # lone EOS and rows inside one document are among them


def test_an_error_in_a_thread_reaches_the_caller(tmp_path):
    write_dataset(tmp_path / "web", 2000)
    source = {"name": "web", "path": str(tmp_path / "web"), "weight": 1}
    plan = MixturePlan.build(MixtureConfig.model_validate({"sources": [source]}), 16)
    (tmp_path / "web" / "shard-00001.bin").unlink()
    loader = WindowLoader(plan, batch_size=50)
    with pytest.raises(UserError, match=r"shard-00001\.bin is missing"):
        list(itertools.islice(loader, 10))


def test_threads_end_with_close(plan):
    loader = WindowLoader(plan, batch_size=8, num_workers=3)
    next(loader)
    assert any(thread.name.startswith("window-loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("window-loader") for thread in loader._pool._threads if thread.is_alive())


def test_wrong_arguments_are_refused(plan):
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        WindowLoader(plan, batch_size=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        WindowLoader(plan, batch_size=0)


# The original names


@pytest.fixture
def mixer(data):
    return shards.DatasetMixer(data[0].model_copy(update={"total_tokens": 1000 * SEQ_LEN + 5}))


def test_mixer_reads_yaml(tmp_path):
    (tmp_path / "mixture.yaml").write_text(
        "total_tokens: 2_000_000_000_000\nsources: [{name: web, path: data/web, weight: 1}]\n"
    )
    assert DatasetMixer.from_yaml(tmp_path / "mixture.yaml").config.total_tokens == 2_000_000_000_000


def test_mixed_dataset_is_the_plan_in_a_data_loader(mixer, expected):
    dataset = mixer.build_dataset(max_seq_length=SEQ_LEN, split="train")
    assert len(dataset) == 1000
    assert (dataset[3]["input_ids"].numpy() == expected[3, :-1]).all()
    assert (dataset[-1]["labels"].numpy() == expected[999, 1:]).all()
    for workers in (0, 2):
        loader = DataLoader(
            dataset, batch_size=32, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        batches = list(loader)
        assert (torch.cat([batch["input_ids"] for batch in batches]).numpy() == expected[:, :-1]).all()
        assert (torch.cat([batch["labels"] for batch in batches]).numpy() == expected[:, 1:]).all()
    with pytest.raises(IndexError):
        dataset[1000]


def test_mixed_dataset_travels_to_spawned_workers(mixer, expected):
    dataset = mixer.build_dataset(SEQ_LEN)
    assert len(dataset[0]["labels"]) == SEQ_LEN  # shards are mapped by now
    copy = pickle.dumps(dataset)
    assert len(copy) < 20_000  # and not sent along
    assert (pickle.loads(copy)[77]["labels"].numpy() == expected[77, 1:]).all()


def test_validate_mixture_gives_realised_shares(mixer, data, plan):
    shares = mixer.validate_mixture(max_seq_length=SEQ_LEN)
    assert shares == {name: count / 1000 for name, count in zip(shares, plan.counts(1000), strict=True)}
    assert sum(shares.values()) == pytest.approx(1)
    endless = DatasetMixer(data[0])
    assert len(endless.build_dataset(SEQ_LEN)) == plan.first_end()  # no total: until the first source ends


def test_validation_split_has_the_first_weights_and_one_epoch(mixer, data):
    dataset = mixer.build_dataset(SEQ_LEN, split="val")
    assert dataset.plan.sources[0].dataset.tokens == 400
    assert len(dataset) == dataset.plan.first_end() < 1000
    with pytest.raises(UserError, match="unknown split 'vall'; did you mean 'val'"):
        mixer.build_dataset(SEQ_LEN, split="vall")


def test_tokenizer_is_checked(mixer):
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer_json().decode())
    own.enable_padding()  # does not change ids
    mixer.build_dataset(SEQ_LEN, tokenizer=own)
    with pytest.raises(UserError, match=r"\(400 ids\) is not the one that made .* \(500 ids\)"):
        mixer.build_dataset(SEQ_LEN, tokenizer=Tokenizer.from_str(tokenizer_json(400).decode()))
    with pytest.raises(UserError, match="found str"):
        mixer.build_dataset(SEQ_LEN, tokenizer="gpt2")
