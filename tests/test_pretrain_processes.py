"""Real training processes: killed at any moment, stopped, spread over ranks, and always the same run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    checkpoint_tensors,
    kill,
    losses,
    results,
    rows,
    run,
    start,
    step_folder,
    write_experiment,
    write_sources,
)

STEPS = 30


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(mixture, tmp_path_factory) -> Path:
    """The run folder of 30 steps on one rank, checkpoints every 7 steps, validation every 5."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_experiment(folder, mixture, **SECTIONS)
    run(config)
    return folder / "run"


SECTIONS = {
    "training": {"max_steps": STEPS},
    "checkpointing": {"save_steps": 7, "save_total_limit": None},
    "logging": {"log_steps": 1, "eval_steps": 5},
}


def assert_same_run(found: Path, expected: Path, steps: int = STEPS) -> None:
    """Weights, optimiser state and metrics, to the bit."""
    assert rows(found) == rows(expected)
    assert results(found) == results(expected)
    names = sorted(path.name for path in (expected / "checkpoints").iterdir())
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == names
    ours, theirs = (checkpoint_tensors(step_folder(path, steps)) for path in (found, expected))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.exp_avg_sq") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_curve(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=1e-5)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Output up to the line that holds `text`."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no '{text}' in:\n{seen}")


def test_the_same_config_gives_the_same_run(mixture, uninterrupted, tmp_path):
    run(write_experiment(tmp_path, mixture, **SECTIONS))
    assert_same_run(tmp_path / "run", uninterrupted)
    assert len(results(uninterrupted)["weights_sha256"]) == 64
    assert losses(uninterrupted)[-1] < losses(uninterrupted)[0] - 0.5  # it learns


def test_killed_twice_is_the_same_run(mixture, uninterrupted, tmp_path):
    """Once before the first checkpoint, once after one."""
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = start(config)
    read_until(process, "step      3/")
    kill(process)
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    process = start(config)
    read_until(process, "step     18/")
    kill(process)
    assert step_folder(tmp_path / "run", 14).exists()
    output = run(config)
    assert "resuming from" in output
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ten_times_is_the_same_run(mixture, tmp_path, seed):
    """At random moments: in steps, validations and saves, some before the first checkpoint."""
    steps, source, reached = 150, random.Random(seed), 0
    whole, config = (
        write_experiment(tmp_path / name, mixture, **{**SECTIONS, "training": {"max_steps": steps}})
        for name in ("whole", "cut")
    )
    run(whole)
    run_folder = tmp_path / "cut" / "run"
    for _ in range(10):
        process = start(config)
        read_until(process, f"step {reached + source.randint(1, 13):>6}/")
        time.sleep(source.random() * 0.05)
        kill(process)
        reached = max((int(path.name[5:]) for path in run_folder.glob("checkpoints/step-*")), default=0)
    assert 28 <= reached < steps  # it was training at every kill
    run(config)
    assert_same_run(run_folder, tmp_path / "whole" / "run", steps)


@pytest.mark.slow
def test_killed_while_saving_keeps_the_checkpoint_before(mixture, uninterrupted, tmp_path):
    """Killed the moment the unfinished folder appears, at each save in turn."""
    config, run_folder = write_experiment(tmp_path, mixture, **SECTIONS), tmp_path / "run"
    for step in (7, 14, 21):
        process, temporary = start(config), run_folder / "checkpoints" / f".step-{step:08d}.tmp"
        while not temporary.exists() and not step_folder(run_folder, step).exists():
            assert process.poll() is None
        kill(process)
        for checkpoint in run_folder.glob("checkpoints/step-*"):
            checkpoint_tensors(checkpoint)  # complete
    run(config)
    assert_same_run(run_folder, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(mixture, uninterrupted, tmp_path, number):
    config, run_folder = write_experiment(tmp_path, mixture, **SECTIONS), tmp_path / "run"
    process = start(config, "checkpointing.save_steps=1000")
    read_until(process, "step      4/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped on request at step" in output
    assert "Traceback" not in output
    (checkpoint,) = run_folder.glob("checkpoints/step-*")
    stopped = int(checkpoint.name[5:])
    assert 4 <= stopped < STEPS
    assert not (run_folder / "results.json").exists()
    output = run(config)
    assert f"at step {stopped}" in output
    shutil.rmtree(checkpoint)
    for step in range(7, stopped + 1, 7):  # those that save_steps=1000 did not write
        shutil.copytree(step_folder(uninterrupted, step), step_folder(run_folder, step), dirs_exist_ok=True)
    assert_same_run(run_folder, uninterrupted)


# Ranks


@pytest.fixture(scope="module")
def sharded(mixture, tmp_path_factory) -> Path:
    """The same run on two ranks with FSDP."""
    folder = tmp_path_factory.mktemp("fsdp")
    run(two_ranks(folder, mixture, "fsdp"), ranks=2)
    return folder / "run"


def two_ranks(folder: Path, mixture: dict, strategy: str, **training) -> Path:
    """The experiment for two ranks: half the accumulation gives the same global batch."""
    training = {**SECTIONS["training"], "gradient_accumulation_steps": 1, **training}
    return write_experiment(folder, mixture, **{**SECTIONS, "training": training}, parallel={"strategy": strategy})


@pytest.mark.slow
def test_fsdp_on_two_ranks_is_the_same_curve(sharded, uninterrupted):
    assert_same_curve(losses(sharded), losses(uninterrupted))
    for ours, theirs in zip(rows(sharded), rows(uninterrupted), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.get("next_sample") == theirs.get("next_sample")
        assert ours.get("lr") == theirs.get("lr")
        for name in {"grad_norm", "val_loss", "val_bpb"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4 if name == "grad_norm" else 1e-5)
    initial = [checkpoint_tensors(step_folder(path, 7)) for path in (sharded, uninterrupted)]
    for name, tensor in initial[0].items():
        torch.testing.assert_close(tensor, initial[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_ddp_on_two_ranks_is_the_same_curve(mixture, uninterrupted, tmp_path):
    run(two_ranks(tmp_path, mixture, "ddp"), ranks=2)
    assert_same_curve(losses(tmp_path / "run"), losses(uninterrupted))


@pytest.mark.slow
def test_a_checkpoint_of_one_rank_goes_on_on_two_and_back(mixture, uninterrupted, tmp_path):
    """Steps 1-14 on one rank, 15-21 on two, 22-30 on one: the global batch is recorded, the accumulation follows."""
    run_folder = tmp_path / "run"
    shutil.copytree(uninterrupted, run_folder)
    for step in (21, 28, 30):
        shutil.rmtree(step_folder(run_folder, step))
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = start(config, "parallel.strategy=fsdp", "checkpointing.async_save=false", ranks=2)
    output = read_until(process, "step     22/")
    kill(process)
    assert "2 data rank(s) x 1 micro-batch(es) x 4 windows" in output
    assert "resuming from" in output
    shutil.rmtree(step_folder(run_folder, 28), ignore_errors=True)
    shutil.rmtree(step_folder(run_folder, 30), ignore_errors=True)
    output = run(config)
    assert "1 data rank(s) x 2 micro-batch(es) x 4 windows" in output
    assert "step-00000021 at step 21" in output
    assert [row.get("next_sample") for row in rows(run_folder)] == [
        row.get("next_sample") for row in rows(uninterrupted)
    ]
    assert_same_curve(losses(run_folder), losses(uninterrupted))


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one(mixture, sharded, uninterrupted, tmp_path):
    path = step_folder(sharded, 14)
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    one = "training.gradient_accumulation_steps=1"  # as in the file of the two ranks; the accumulation follows
    output = run(config, f"checkpointing.resume_from_checkpoint={path}", one)
    assert "1 data rank(s) x 2 micro-batch(es) x 4 windows" in output
    assert_same_curve(losses(tmp_path / "run"), losses(uninterrupted)[14:])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_killed_and_resumed_are_the_same_run(mixture, tmp_path, strategy):
    """On the same ranks, to the bit; SIGTERM to torchrun reaches the workers, who save."""
    whole = two_ranks(tmp_path / "whole", mixture, strategy)
    run(whole, ranks=2)
    config, run_folder = two_ranks(tmp_path / "cut", mixture, strategy), tmp_path / "cut" / "run"
    process = start(config, ranks=2)
    read_until(process, "step     10/")
    kill(process)
    process = start(config, ranks=2)
    read_until(process, "step     16/")
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert "stopped on request at step" in output
    (stopped,) = {int(p.name[5:]) for p in run_folder.glob("checkpoints/step-*")} - {7, 14, 21, 28, 30} or {0}
    run(config, ranks=2)
    if stopped:
        shutil.rmtree(step_folder(run_folder, stopped))
    assert_same_run(run_folder, tmp_path / "whole" / "run")


@pytest.mark.slow
def test_three_ranks_share_unevenly(mixture, tmp_path):
    """400 rows of the embedding on three ranks: the slices differ in size."""
    training = {"batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 10}
    config = write_experiment(tmp_path / "three", mixture, training=training, parallel={"strategy": "fsdp"})
    run(config, ranks=3)
    alone = write_experiment(tmp_path / "one", mixture, training={**training, "gradient_accumulation_steps": 3})
    run(alone)
    assert_same_curve(losses(tmp_path / "three" / "run"), losses(tmp_path / "one" / "run"))


# The whole program


def test_a_mistake_is_one_message_and_status_2(mixture, tmp_path):
    config = write_experiment(tmp_path, mixture)
    process = start(config, "training.batch_sise=2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == (
        f"error: {config}: 1 problem(s)\n  training.batch_sise: unknown key 'batch_sise'; did you mean 'batch_size'?\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_compiled_bf16_training_learns_and_resumes_to_the_bit(mixture, tmp_path, ranks):
    training = {"compile": True, "mixed_precision": "bf16", "max_steps": STEPS, "gradient_accumulation_steps": 2}
    sections = {**SECTIONS, "training": training, "data": {"document_mask": True}, "parallel": {"strategy": "fsdp"}}
    whole = write_experiment(tmp_path / "whole", mixture, **sections)
    run(whole, ranks=ranks)
    config = write_experiment(tmp_path / "cut", mixture, **sections)
    process = start(config, ranks=ranks)
    read_until(process, "step     17/")
    kill(process)
    run(config, ranks=ranks)
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run")
    curve = losses(tmp_path / "whole" / "run")
    assert curve[-1] < curve[0] - 0.5
