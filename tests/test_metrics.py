"""What a run says of itself: rows that a full disk delays, trackers that fail, losses of the sources."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import SEQ_LEN, rows, run, train_here, write_experiment, write_sources

from shards.mixture import MixtureConfig, MixturePlan
from train.append import AppendOnly
from train.config import load_experiment
from train.distributed import Ranks
from train.layout import Layout
from train.metrics import MetricsLog, numbers, read_metrics
from train.sources import SourceLosses
from train.speed import MEASURED

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The mixture of two small sources."""
    torch.set_num_threads(1)
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run of one process: its experiment file, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_experiment(folder, data, training={"max_steps": 8}, checkpointing={"save_steps": 8})
    status, output = train_here(config)
    assert status == 0, output
    return SimpleNamespace(config=config, run=folder / "run", output=output)


@pytest.fixture
def experiment(tmp_path):
    """Makes a configuration with the given fields of the logging section."""

    def make(**logging):
        return load_experiment(write_experiment(tmp_path, {"sources": []}, logging=logging))

    (tmp_path / "run").mkdir()
    return make


@contextlib.contextmanager
def files_end_at(size: int):
    """No file of this process can grow past `size` bytes: the kernel writes what fits and refuses the rest."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# A full disk


def test_rows_wait_for_a_full_disk(experiment, tmp_path):
    said, path = [], tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(tmp_path / "run", experiment(), 0, said.append)
    expected = [{"step": step, "loss": step / 7} for step in range(1, 8)]
    for row in expected[:2]:
        log.write(row)
    with files_end_at(path.stat().st_size + 10):
        for row in expected[2:5]:
            log.write(row)
            log.sync()
        # A part of a row is in the file, which readers leave out.
        assert path.read_bytes().endswith(b'{"step":3,')
        assert read_metrics(path) == expected[:2]
    assert [line.split(" (")[0] for line in said] == [f"{path} cannot be written"]
    assert "File too large" in said[0]
    assert "3 line(s) and those to come wait in memory" in said[0]  # the first two may be lost too: no sync yet
    for row in expected[5:]:
        log.write(row)
    assert read_metrics(path) == expected
    log.close()
    assert read_metrics(path) == expected
    assert said[1:] == [f"{path} can be written again; nothing is missing"]


def test_what_is_lost_at_the_end_is_said(experiment, tmp_path):
    said = []
    log = MetricsLog(tmp_path / "run", experiment(), 0, said.append)
    with files_end_at(3):
        for step in (1, 2):
            log.write({"step": step})
        log.close()
    assert len(said) == 2
    assert said[1].endswith("metrics.jsonl: the last 2 line(s) could not be written")


def test_a_full_disk_does_not_end_a_run(alone, tmp_path, monkeypatch):
    """From step 4 until step 7 neither `metrics.jsonl` nor `train.log` can be written."""
    whole = AppendOnly._write_kept

    def write(self):
        kept = b"".join(self._kept)
        steps = {int(step) for step in re.findall(rb'(?:"step":| step +)(\d+)(?:,|/8 )', kept)}
        if 4 in steps and 7 not in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self)

    monkeypatch.setattr(AppendOnly, "_write_kept", write)
    status, output = train_here(alone.config, f"checkpointing.output_dir={tmp_path / 'run'}")
    assert status == 0, output
    assert rows(tmp_path / "run") == rows(alone.run)
    for name in ("metrics.jsonl", "train.log"):
        assert len(re.findall(rf"{name} cannot be written \(No space left on device\)", output)) == 1
        assert len(re.findall(rf"{name} can be written again", output)) == 1
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert re.findall(r"step +(\d+)/8 ", log) == [str(step) for step in range(1, 9)]


def test_a_log_is_cut_back_while_the_disk_is_full(experiment, tmp_path):
    """As a rollback does it: the rows up to a step stay as they are, byte by byte."""
    said, path, config = [], tmp_path / "run" / "metrics.jsonl", experiment()
    log = MetricsLog(tmp_path / "run", config, 0, said.append)
    before = [{"step": step, "loss": step / 7} for step in (1, 2, 3, 3, 4, 5)]
    for row in before:
        log.write(row)
    log.close()
    content = path.read_bytes()
    path.write_bytes(content + b'{"step":2,"lo')  # by a process that was killed
    after = [{"step": step, "loss": 0.5} for step in (4, 5)]
    with files_end_at(5):
        log = MetricsLog(tmp_path / "run", config, 3, said.append)
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:4])
        for row in after:
            log.write(row)
    assert len(said) == 1
    log.close()
    assert read_metrics(path) == before[:4] + after
    assert "can be written again" in said[1]
    MetricsLog(tmp_path / "run", config, 9, said.append).close()
    assert read_metrics(path) == before[:4] + after
    MetricsLog(tmp_path / "run", config, 0, said.append).close()
    assert path.read_bytes() == b""


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(experiment, tmp_path):
    (tmp_path / "run").rmdir()
    with pytest.raises(FileNotFoundError):
        MetricsLog(tmp_path / "run", experiment(), 0, print)


# Mirrors


def failing_wandb(monkeypatch, *, fails_at: str) -> SimpleNamespace:
    """A stand-in for the package, which raises in one of its calls and remembers the others."""
    calls = []

    def call(what, /, *arguments, **options):
        calls.append((what, arguments, options))
        if what == fails_at:
            raise RuntimeError(f"{what}:\nconnection lost")

    def init(**options):
        call("init", **options)
        return SimpleNamespace(
            define_metric=lambda name, **options: call("define_metric", name, **options),
            log=lambda values: call("log", values),
            finish=lambda: call("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return SimpleNamespace(calls=calls, named=lambda name: [c for c in calls if c[0] == name])


@pytest.mark.parametrize(("fails_at", "logged"), [("init", 0), ("log", 1), ("finish", 3), ("nothing", 3)])
def test_a_failing_tracker_is_switched_off(experiment, tmp_path, monkeypatch, fails_at, logged):
    wandb, said = failing_wandb(monkeypatch, fails_at=fails_at), []
    log = MetricsLog(tmp_path / "run", experiment(use_wandb=True, wandb_mode="offline"), 0, said.append)
    expected = [{"step": step, "loss": 1.0, "val": {"code": {"loss": 2.0}}} for step in (1, 2, 3)]
    for row in expected:
        log.write(row)
    log.close()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == expected
    assert wandb.named("init")[0][2]["mode"] == "offline"
    assert [arguments for _, arguments, _ in wandb.named("log")] == [
        ({"train_step": step, "loss": 1.0, "val/code/loss": 2.0},) for step in (1, 2, 3)[:logged]
    ]
    assert [call[1:] for call in wandb.named("define_metric")] == (
        [] if fails_at == "init" else [(("train_step",), {}), (("*",), {"step_metric": "train_step"})]
    )
    assert len(wandb.named("finish")) == (fails_at in ("finish", "nothing"))
    reason = f"W&B is off from here on, metrics.jsonl has everything (RuntimeError: {fails_at}: connection lost)"
    assert said == ([] if fails_at == "nothing" else [reason])


def test_a_run_that_goes_on_is_the_same_run_there(experiment, tmp_path, monkeypatch):
    wandb, said = failing_wandb(monkeypatch, fails_at="nothing"), []
    for resume_step in (0, 2, 0):
        MetricsLog(tmp_path / "run", experiment(use_wandb=True), resume_step, said.append).close()
    first, second, third = (options["id"] for _, _, options in wandb.named("init"))
    assert first == second != third
    assert wandb.named("init")[0][2]["mode"] == "online"


def test_tensorboard_fails_alone(experiment, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    wandb, said = failing_wandb(monkeypatch, fails_at="nothing"), []
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    log = MetricsLog(tmp_path / "run", experiment(use_wandb=True, use_tensorboard=True), 0, said.append)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert len(wandb.named("log")) == 2
    assert len(said) == 1
    assert said[0].startswith("TensorBoard is off from here on")
    assert "No space left on device" in said[0]


def test_numbers_are_fetched_as_what_they_are():
    found = numbers(
        {"a": torch.tensor(0.1), "b": {"c": torch.tensor(2**40 + 1), "d": "text"}, "e": 3, "f": torch.tensor(torch.nan)}
    )
    assert found.pop("f") != found
    assert found == {"a": pytest.approx(0.1, rel=1e-7), "b": {"c": 2**40 + 1, "d": "text"}, "e": 3}
    assert isinstance(found["b"]["c"], int)
    assert numbers({"a": 1, "b": {}}) == {"a": 1, "b": {}}


# Sources


class SimulatedRanks:
    """Ranks of one process: the first to `collect` hold their sums back, the last adds them to its own."""

    def __init__(self, size: int) -> None:
        self.size, self.sums = size, []

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums.append(tensor.clone())
        if len(self.sums) == self.size:
            tensor.copy_(torch.stack(self.sums).sum(0))
        return tensor


@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_losses_of_sources_are_those_of_numpy(data, sources, ranks):
    """`ranks` ranks hold shares of the losses of the same windows, as tensor-parallel ones do."""
    names = [f"source {number}" for number in range(sources)]
    together = SimulatedRanks(ranks)
    layouts = [SimpleNamespace(ranks=together, counts=rank == 0) for rank in range(ranks)]
    counters = [SourceLosses(names, CPU) for _ in range(ranks)]
    for _ in range(2):  # two rows of the log: nothing of the first is in the second
        sums, counts = np.zeros(sources), np.zeros(sources, np.int64)
        for _ in range(data.draw(st.integers(0, 3))):
            batch = data.draw(st.integers(1, 6))
            index = np.array([data.draw(st.integers(0, sources - 1)) for _ in range(batch)], np.int32)
            tokens = np.array([data.draw(st.integers(0, 50)) for _ in range(batch)], np.int64)
            shares = np.array([[data.draw(st.floats(0, 100, width=32)) for _ in range(batch)] for _ in range(ranks)])
            shares = (shares * (tokens > 0)).astype(np.float32)
            first_has_none = data.draw(st.booleans())  # as the first stage of a pipeline
            shares[0] *= not first_has_none
            for rank, (counter, share) in enumerate(zip(counters, shares, strict=True)):
                losses = None if first_has_none and rank == 0 else torch.from_numpy(share)
                counter.add(losses, torch.from_numpy(tokens), torch.from_numpy(index))
            np.add.at(sums, index, shares.astype(np.float64).sum(0))
            np.add.at(counts, index, tokens)
        together.sums.clear()
        *_, found = (counter.collect(layout) for counter, layout in zip(counters, layouts, strict=True))
        assert list(found) == names
        with np.errstate(invalid="ignore"):
            expected = sums / counts
        assert [entry["tokens"].item() for entry in found.values()] == counts.tolist()
        np.testing.assert_allclose([entry["loss"].item() for entry in found.values()], expected, rtol=1e-12)


def test_a_loss_that_is_not_finite_stays_with_its_source():
    counter = SourceLosses(["good", "bad"], CPU)
    counter.add(torch.tensor([1.0, torch.nan]), torch.tensor([2, 2]), torch.tensor([0, 1], dtype=torch.int32))
    found = numbers(counter.collect(Layout(ALONE)))
    assert found["good"] == {"loss": 0.5, "tokens": 2}
    assert np.isnan(found["bad"]["loss"])


def test_sources_of_a_run(alone, data):
    plan = MixturePlan.build(MixtureConfig.model_validate(data), SEQ_LEN)
    training = [row for row in rows(alone.run) if "loss" in row]
    for row in training:
        sources, step = row["sources"], row["step"]
        drawn = np.subtract(plan.counts(step * 8), plan.counts((step - 1) * 8))
        assert [source["tokens"] for source in sources.values()] == (drawn * SEQ_LEN).tolist()
        mean = sum(source["loss"] * source["tokens"] for source in sources.values() if source["tokens"]) / 256
        assert row["loss"] == pytest.approx(mean, rel=1e-6)
    assert list(training[0]["sources"]) == ["code", "prose"]


def test_measured_fields_of_a_run(alone):
    manifest = json.loads((alone.run / "manifest.json").read_text())
    assert manifest["hardware"]["layout"] == "one process"
    for row in rows(alone.run, timed=True):
        assert "loss" not in row or set(MEASURED) - {"mfu", "mfu_full"} <= row.keys()  # of a CPU no peak is known
        if "loss" in row:
            assert 0 <= row["data_wait"] + sum(row["blocked"].values()) <= 1
            assert 0.1 < row["memory_gb"]["resident"] <= row["memory_gb"]["peak"] < 20
    assert "since the start, of it waiting for data" in alone.output


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["dp_shard", "tp", "pp"])
def test_sources_are_the_same_on_two_ranks(alone, tmp_path, axis):
    run(
        alone.config,
        f"parallel={{strategy: fsdp, {axis}: 2}}",
        "training.world_size=1",
        f"checkpointing.output_dir={tmp_path / 'run'}",
        ranks=2,
    )
    pairs = zip(rows(tmp_path / "run"), rows(alone.run), strict=True)
    for found, expected in ((a["sources"], b["sources"]) for a, b in pairs if "loss" in a):
        for name in ("code", "prose"):
            assert found[name]["tokens"] == expected[name]["tokens"]
            if found[name]["tokens"]:
                assert found[name]["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["hardware"]["layout"] == f"fsdp x {axis} 2"
