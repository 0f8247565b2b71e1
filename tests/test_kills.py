"""Runs that save at every step in the background, killed at random moments, are the run that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_runs import (
    checkpoint_tensors,
    kill,
    results,
    rows,
    run,
    start,
    step_folder,
    train_here,
    write_experiment,
    write_sources,
)

from train.checkpoint_files import describe_file
from train.run_state import RunState, complete_checkpoints

SECTIONS = {
    "checkpointing": {"save_steps": 1, "save_total_limit": 4},
    "logging": {"log_steps": 1, "eval_steps": None},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    torch.set_num_threads(1)
    return write_sources(tmp_path_factory.mktemp("data"))


def experiment(folder: Path, mixture: dict, steps: int, ranks: int = 1) -> Path:
    """A run of 8 windows per step, sharded on two ranks."""
    training = {"max_steps": steps, "gradient_accumulation_steps": 2 // ranks}
    return write_experiment(folder, mixture, **SECTIONS, training=training, parallel={"strategy": "fsdp"})


def assert_same_run(found: Path, expected: Path, steps: int) -> None:
    """Metrics, weights and optimiser state to the bit, and the same checkpoints kept."""
    assert rows(found) == rows(expected)
    assert results(found) == results(expected)
    assert names(found) == names(expected)
    ours, theirs = (checkpoint_tensors(step_folder(path, steps)) for path in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def assert_complete_or_absent(run_folder: Path) -> int:
    """Every checkpoint that has its name holds what its state says; returns the newest step."""
    found = complete_checkpoints(run_folder / "checkpoints")
    for checkpoint in found:
        for name, entry in RunState.read(checkpoint).files.items():
            assert describe_file(checkpoint / name) == entry
    return max((int(path.name[5:]) for path in found), default=0)


def run_until(process: subprocess.Popen[str], step: int) -> None:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if f"step {step:>6}/" in line:
            return
    raise AssertionError(f"no step {step} in:\n{seen}")


def kill_one(process: subprocess.Popen[str]) -> None:
    """SIGKILL the second rank; torchrun ends the others."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM: the ranks save and leave."""
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert "stopped on request at step" in output


def interrupt(config: Path, run_folder: Path, ways: list, source: random.Random, ranks: int) -> None:
    """Start the run again and again, and end it each time another way, a few steps on and at any moment of a save.

    The third step on, what the first saved is written, as a save waits for the one before.
    """
    reached = 0
    for way in ways:
        process = start(config, ranks=ranks)
        run_until(process, reached + source.randint(3, 6))
        time.sleep(source.random() * 0.2)
        way(process)
        before, reached = reached, assert_complete_or_absent(run_folder)
        assert reached > before


def test_killed_while_saving(mixture, tmp_path):
    steps = 10
    status, output = train_here(experiment(tmp_path / "whole", mixture, steps))
    assert status == 0, output
    config = experiment(tmp_path / "cut", mixture, steps)
    interrupt(config, tmp_path / "cut" / "run", [kill], random.Random(1), ranks=0)
    status, output = train_here(config)
    assert status == 0, output
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run", steps)


@pytest.mark.slow
def test_one_of_two_ranks_killed_while_saving(mixture, tmp_path):
    steps = 12
    run(experiment(tmp_path / "whole", mixture, steps, ranks=2), ranks=2)
    config = experiment(tmp_path / "cut", mixture, steps, ranks=2)
    interrupt(config, tmp_path / "cut" / "run", [kill_one], random.Random(2), ranks=2)
    run(config, ranks=2)
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run", steps)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_twenty_random_moments(mixture, tmp_path, ranks):
    steps, source = 140, random.Random(3)
    whole, config = (experiment(tmp_path / name, mixture, steps, max(1, ranks)) for name in ("whole", "cut"))
    run(whole, ranks=ranks)
    ways = [kill, stop, kill_one] if ranks else [kill, kill, stop]
    interrupt(config, tmp_path / "cut" / "run", [source.choice(ways) for _ in range(20)], source, ranks)
    run(config, ranks=ranks)
    assert_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run", steps)
