"""Saving in the background, what is kept, what is passed over, what a failed write leaves, and any layout's files."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_ranks import Moments, state
from small_models import make_model
from training_runs import checkpoint_tensors, step_folder

from shards.errors import UserError
from train import checkpoint_files
from train.checkpoint import Checkpoints, load_weights, weights_sha256
from train.config import CheckpointingSection
from train.distributed import Ranks
from train.layout import Layout
from train.run_state import RunState

ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))


@pytest.fixture
def run(tmp_path):
    """A model, its optimiser, and a way to open the run's checkpoints; `said` is what they said."""
    model, said = make_model(), []

    def opened(**fields) -> Checkpoints:
        section = CheckpointingSection(output_dir=str(tmp_path), **fields)
        return Checkpoints(tmp_path, section, ALONE, said.append)

    return SimpleNamespace(path=tmp_path, model=model, optimizer=Moments(model), open=opened, said=said)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints.all()]


def hold_writes(monkeypatch) -> threading.Event:
    """Writes wait for the returned event."""
    event, write = threading.Event(), checkpoint_files.dcp.save
    monkeypatch.setattr(checkpoint_files.dcp, "save", lambda *a, **k: (event.wait(60), write(*a, **k)))
    return event


def fail_writes(monkeypatch) -> None:
    """The disk is full."""

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_files._HashedStream, "write", full)


# In the background


def test_what_is_saved_is_what_was_there_at_the_call(run, monkeypatch):
    checkpoints, event = run.open(), hold_writes(monkeypatch)
    before = weights = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    moments = {name: tensor.clone() for name, tensor in run.optimizer.exp_avg.items()}
    checkpoints.save(state(1), run.model, run.optimizer)
    assert checkpoints.all() == []
    with torch.no_grad():
        for tensor in (*run.model.parameters(), *run.optimizer.exp_avg.values()):
            tensor.zero_()
    checkpoints.poll()
    assert run.said == []
    event.set()
    checkpoints.wait()
    stored = checkpoint_tensors(step_folder(run.path, 1))
    assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in before.items())
    assert all(torch.equal(stored[f"optimizer.exp_avg.{name}"], tensor) for name, tensor in moments.items())
    assert weights.keys() == before.keys()
    assert len(run.said) == 1
    assert run.said[0].startswith("checkpoint step-00000001: ")


def test_a_second_save_waits_for_the_first(run, monkeypatch):
    checkpoints, event = run.open(), hold_writes(monkeypatch)
    checkpoints.save(state(1), run.model, run.optimizer)
    threading.Timer(0.3, event.set).start()
    assert checkpoints.save(state(2), run.model, run.optimizer) > 0.2
    assert step_folder(run.path, 1).exists()
    checkpoints.wait()
    assert steps(checkpoints) == [1, 2]


def test_memory_is_there_before_the_first_save(run):
    checkpoints = run.open()
    checkpoints.reserve(run.model, run.optimizer)
    checkpoints.wait()
    memory = checkpoints._memory._memory
    assert memory.nbytes >= sum(tensor.nbytes for tensor in (*run.model.parameters(), *run.optimizer.exp_avg.values()))
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    assert checkpoints._memory._memory is memory
    assert len(run.said) == 1


@pytest.mark.parametrize(("fields", "options"), [({"async_save": False}, {}), ({}, {"wait": True})])
def test_it_is_there_when_waited_for(run, fields, options):
    checkpoints = run.open(**fields)
    checkpoints.save(state(3), run.model, run.optimizer, **options)
    assert checkpoints.find(None) == step_folder(run.path, 3)
    assert len(run.said) == 1


def test_it_comes_back(run):
    """Into another model and optimiser, and the weights alone."""
    checkpoints = run.open()
    checkpoints.save(state(1, rollbacks=[{"step": 0, "first_sample": 0, "next_sample": 8}]), run.model, run.optimizer)
    checkpoints.wait()
    path = step_folder(run.path, 1)
    other, moments = make_model(seed=5), None
    moments = Moments(other, seed=5)
    checkpoints.load(path, other, moments)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), other.parameters(), strict=True))
    for kind, entries in run.optimizer.state_dict().items():
        assert all(torch.equal(tensor, moments.state_dict()[kind][name]) for name, tensor in entries.items())
    third = make_model(seed=6)
    load_weights(path, third)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), third.parameters(), strict=True))
    found = RunState.read(path)
    assert found.rollbacks == [{"step": 0, "first_sample": 0, "next_sample": 8}]
    assert found.finite
    assert found.resumable
    assert set(found.files) == {path.name for path in path.iterdir()} - {"state.json"}
    for name, entry in found.files.items():
        assert checkpoint_files.describe_file(path / name) == entry


def test_a_bf16_state_and_a_guard_that_is_new(run):
    run.optimizer.exp_avg = {name: tensor.bfloat16() for name, tensor in run.optimizer.exp_avg.items()}
    run.optimizer.guard = {}
    checkpoints = run.open()
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    other = Moments(run.model, seed=1)
    other.exp_avg = {name: torch.zeros_like(tensor) for name, tensor in run.optimizer.exp_avg.items()}
    fresh = other.guard["norms"].clone()
    checkpoints.load(step_folder(run.path, 1), run.model, other)
    assert all(torch.equal(tensor, other.exp_avg[name]) for name, tensor in run.optimizer.exp_avg.items())
    assert torch.equal(other.guard["norms"], fresh)


# Weights only


def test_between_the_multiples_only_weights_are_saved(run):
    checkpoints = run.open(save_steps=1, save_optimizer_every=3)
    for step in (1, 2, 3, 4):
        checkpoints.save(state(step), run.model, run.optimizer)
    checkpoints.wait()
    assert steps(checkpoints) == [1, 2, 3, 4]
    assert [RunState.read(path).resumable for path in checkpoints.all()] == [False, False, True, False]
    assert not any(name.startswith("optimizer") for name in checkpoint_tensors(step_folder(run.path, 4)))
    assert checkpoints.find(None) == checkpoints.last_before(9) == step_folder(run.path, 3)
    assert checkpoints.last_before(3) is None
    load_weights(step_folder(run.path, 4), make_model(seed=2))
    with pytest.raises(UserError, match=r"step-00000004: this checkpoint holds weights only.*from_pretrained"):
        checkpoints.find(str(step_folder(run.path, 4)))
    checkpoints.save(state(5), run.model, run.optimizer, wait=True)  # the last one holds everything
    assert checkpoints.find("auto") == step_folder(run.path, 5)


# What is kept


@pytest.mark.parametrize(
    ("limit", "every", "saved", "kept"),
    [
        (2, None, 5, [4, 5]),
        (None, None, 5, [1, 2, 3, 4, 5]),
        (1, 2, 4, [4]),
        (1, 2, 5, [4, 5]),  # the newest of all stays, and pushes nothing out
        (2, 4, 7, [4, 7]),
        (3, 4, 7, [4, 6, 7]),
        (2, 2, 7, [4, 6, 7]),
    ],
)
def test_retention(run, limit, every, saved, kept):
    checkpoints = run.open(save_steps=1, save_optimizer_every=every, save_total_limit=limit)
    for step in range(1, saved + 1):
        checkpoints.save(state(step), run.model, run.optimizer)
    checkpoints.wait()
    assert steps(checkpoints) == kept
    assert not list(checkpoints.folder.glob(".*"))


def test_weights_that_are_not_finite_never_push_out_those_that_are(run):
    checkpoints = run.open(save_total_limit=1)
    checkpoints.save(state(1), run.model, run.optimizer)
    with torch.no_grad():
        run.model.norm.weight[3] = float("nan")
    for step in (2, 3):
        checkpoints.save(state(step), run.model, run.optimizer)
    checkpoints.wait()
    assert steps(checkpoints) == [1, 3]
    assert "some weights are not finite" in run.said[-1]
    assert not RunState.read(step_folder(run.path, 3)).finite
    assert checkpoints.last_before(4) == checkpoints.find(None) == step_folder(run.path, 1)
    assert run.said[-1] == f"note: {step_folder(run.path, 3)} is passed over: its weights are not finite"
    with pytest.raises(UserError, match="not finite"):
        checkpoints.find(str(step_folder(run.path, 3)))


def test_a_damaged_one_does_not_count_as_good(run):
    checkpoints = run.open(save_total_limit=2)
    for step in (1, 2):
        checkpoints.save(state(step), run.model, run.optimizer, wait=True)
    (step_folder(run.path, 2) / ".metadata").write_bytes(b"short")
    assert checkpoints.last_before(3) == step_folder(run.path, 1)
    assert checkpoints.find(None) == step_folder(run.path, 1)
    assert "passed over: .metadata has 5 bytes instead of" in run.said[-1]


def test_an_old_one_that_cannot_be_judged_is_said_and_the_new_one_stays(run):
    checkpoints = run.open(save_total_limit=1)
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    (step_folder(run.path, 1) / "state.json").write_text("{")
    checkpoints.save(state(2), run.model, run.optimizer, wait=True)
    assert "; older ones could not be removed (UserError: " in run.said[-1]
    assert steps(checkpoints) == [1, 2]


def test_one_of_the_same_step_is_not_written_over(run):
    """A rollback has set it aside: this is a defect, and must not cost a checkpoint."""
    checkpoints = run.open()
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    with pytest.raises(UserError, match="could not be written"):
        checkpoints.save(state(1, skipped_steps=7), run.model, run.optimizer, wait=True)
    assert RunState.read(step_folder(run.path, 1)).skipped_steps == 0
    assert not list(checkpoints.folder.glob(".*"))


# What is looked at before it is loaded


def spoil(checkpoint: Path) -> str:
    """Change a byte in the middle of a file; returns its name."""
    path = next(checkpoint.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def test_one_with_a_wrong_byte_is_passed_over(run):
    checkpoints = run.open(save_total_limit=None)
    for step in (1, 2, 3):
        checkpoints.save(state(step), run.model, run.optimizer, wait=True)
    name = spoil(step_folder(run.path, 3))
    spoil(step_folder(run.path, 2))
    assert checkpoints.find(None) == step_folder(run.path, 1)
    assert run.said[-2:] == [
        f"note: {step_folder(run.path, step)} is passed over: {name} is not as it was written" for step in (3, 2)
    ]
    with pytest.raises(UserError, match=f"step-00000002: a run cannot go on from this checkpoint .{name} is not as"):
        checkpoints.find(str(step_folder(run.path, 2)))
    for checkpoint in (step_folder(run.path, 1), step_folder(run.path, 2)):  # as a rollback would
        if checkpoint.name.endswith("1"):
            checkpoints.load(checkpoint, run.model, run.optimizer)
        else:
            with pytest.raises(UserError, match=f"step-00000002: the checkpoint cannot be read .*{name} is not as"):
                checkpoints.load(checkpoint, run.model, run.optimizer)
    spoil(step_folder(run.path, 1))
    with pytest.raises(UserError, match=rf"no checkpoint here can be gone on from .step-00000003: {name} is not as"):
        checkpoints.find("auto")


def test_what_was_found_good_is_not_read_once_more(run, monkeypatch):
    checkpoints = run.open()
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    read, describe = [], checkpoint_files.describe_file
    monkeypatch.setattr(checkpoint_files, "describe_file", lambda path: (read.append(path), describe(path))[1])
    path = checkpoints.find(None)
    assert path is not None
    assert len(read) == len(RunState.read(path).files) == 2
    checkpoints.load(path, run.model, run.optimizer)
    assert len(read) == 2
    run.open().load(path, run.model, run.optimizer)
    assert len(read) == 4


# A write that fails


def test_a_full_disk_is_said_and_the_next_save_tries_again(run, monkeypatch):
    checkpoints = run.open(save_total_limit=1)
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    with monkeypatch.context() as patch:
        fail_writes(patch)
        checkpoints.save(state(2), run.model, run.optimizer)
        checkpoints.wait()
    assert run.said[-1].startswith(f"warning: {step_folder(run.path, 2)}: the checkpoint could not be written (")
    assert "No space left on device" in run.said[-1]
    assert run.said[-1].endswith("the next save tries again")
    assert steps(checkpoints) == [1]
    assert not list(checkpoints.folder.glob(".*"))  # what was written is given back
    checkpoints.save(state(3), run.model, run.optimizer)
    checkpoints.wait()
    assert steps(checkpoints) == [3]


def test_at_the_end_of_a_run_it_is_an_error(run, monkeypatch):
    checkpoints = run.open()
    fail_writes(monkeypatch)
    with pytest.raises(UserError, match=r"could not be written .*No space left.*make room"):
        checkpoints.save(state(2), run.model, run.optimizer, wait=True)
    assert steps(checkpoints) == []


def test_what_reads_back_otherwise_is_not_published_and_removes_nothing(run, monkeypatch):
    checkpoints, save = run.open(save_total_limit=1), checkpoint_files.dcp.save
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)

    def save_and_spoil(tensors, *, storage_writer, **options):
        save(tensors, storage_writer=storage_writer, **options)
        path = next(Path(storage_writer.path).glob("*.distcp"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint_files.dcp, "save", save_and_spoil)
    checkpoints.save(state(2), run.model, run.optimizer)
    checkpoints.wait()
    assert "__0_0.distcp was read back as" in run.said[-1]
    assert steps(checkpoints) == [1]


def test_what_a_killed_write_left_is_removed(run):
    checkpoints = run.open()
    left = checkpoints.folder / ".step-00000007.tmp"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.set_aside(0) is None
    assert not left.exists()
    left.mkdir()
    checkpoints.save(state(8), run.model, run.optimizer, wait=True)
    assert not left.exists()


# The end of a process


def test_a_process_waits_at_its_end_but_not_forever():
    """For a rank that hangs, torchrun learns of the failure of another one only when that has ended."""
    program = (
        "import sys, time\n"
        "from train import checkpoint_files\n"
        "checkpoint_files.EXIT_SECONDS = 3\n"
        "def write(seconds):\n"
        "    time.sleep(seconds)\n"
        "    print('written after', seconds, flush=True)\n"
        "checkpoint_files.in_background(write, 1)\n"
        "checkpoint_files.in_background(write, 100)\n"
        "sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (3, "written after 1\n"), done.stderr


def test_a_process_waits_until_the_thread_has_freed_what_it_wrote():
    """One that ends before that is aborted: PyTorch takes Python's lock to free a tensor."""
    program = (
        "import time\n"
        "from train import checkpoint_files\n"
        "class Piece:\n"
        "    def __del__(self):\n"
        "        time.sleep(3)\n"
        "        print('freed', flush=True)\n"
        "checkpoint_files.in_background(lambda piece: time.sleep(0.5), Piece()).result()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "freed\n"), done.stderr


# Which model


def test_the_hash_is_of_all_weights(run):
    checkpoints = run.open(save_total_limit=None)
    for step in (1, 2):
        checkpoints.save(state(step), run.model, run.optimizer)
    with torch.no_grad():
        run.model.norm.weight[0] += 1
    checkpoints.save(state(3), run.model, run.optimizer, wait=True)
    first, second, third = (weights_sha256(path) for path in checkpoints.all())
    assert first == second != third


def test_another_model_is_refused(run):
    checkpoints = run.open()
    checkpoints.save(state(1), run.model, run.optimizer, wait=True)
    other = make_model(num_hidden_layers=3)
    with pytest.raises(UserError, match=r"checkpoint of another model: model\.layers\.2\."):
        checkpoints.load(step_folder(run.path, 1), other, Moments(other))
