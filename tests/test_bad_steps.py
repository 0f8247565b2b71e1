"""Gradients that are not finite or far too large, in whole runs: skipped, counted, left behind."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from poisoned_run import Poison
from training_runs import ROOT, losses, results, rows, step_folder, train_here, write_experiment, write_sources

STEPS, GLOBAL_BATCH = 55, 8
SECTIONS = {
    "training": {"max_steps": STEPS, "lr_scheduler": "constant"},  # so that a longer run is the same so far
    "checkpointing": {"save_steps": 10, "save_total_limit": None},
    "logging": {"log_steps": 1, "eval_steps": None},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def clean(mixture, tmp_path_factory) -> Path:
    """The run folder of 80 steps without a bad one."""
    folder = tmp_path_factory.mktemp("clean")
    status, output = train_here(write_experiment(folder, mixture, **SECTIONS), "training.max_steps=80")
    assert status == 0, output
    return folder / "run"


@pytest.fixture
def train(mixture, tmp_path, monkeypatch):
    """Trains with poison; returns the exit status, the run folder and what was printed."""

    def run(poison: Poison, *overrides: str) -> tuple[int, Path, str]:
        with monkeypatch.context() as patches:
            poison.install(patches.setattr)
            status, output = train_here(write_experiment(tmp_path, mixture, **SECTIONS), *overrides)
        return status, tmp_path / "run", output

    return run


def steps(run: Path) -> list[dict]:
    """The rows of training steps."""
    return [row for row in rows(run) if "loss" in row]


def assert_recovered(run: Path, clean: Path) -> None:
    """The run ended, with finite losses, about where the clean one was."""
    found = losses(run)
    assert [row["step"] for row in steps(run)] == list(range(1, len(found) + 1))
    assert all(math.isfinite(loss) for loss in found)
    assert math.isfinite(results(run)["val_loss"])
    assert fmean(found[-10:]) == pytest.approx(fmean(losses(clean)[len(found) - 10 : len(found)]), abs=0.2)
    assert found[0] - fmean(found[-10:]) > 0.7


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(train, clean):
    status, run, output = train(Poison([20], math.nan))
    assert status == 0, output
    found, expected = steps(run), steps(clean)
    assert [row["skipped_steps"] for row in found] == [0] * 19 + [1] * 36
    assert found[19]["grad_norm"] is None  # NaN in JSON
    assert [row["loss"] for row in found[:20]] == [row["loss"] for row in expected[:20]]  # the loss is that of before
    assert found[20]["loss"] != expected[20]["loss"]
    assert "far above the usual: step 20 (1 step(s) so far were skipped)" in (run / "logs" / "train.log").read_text()
    assert [row["next_sample"] for row in found] == [row["next_sample"] for row in expected[:STEPS]]
    assert_recovered(run, clean)


def test_a_skipped_step_changes_no_weight(train):
    from train.checkpoint import weights_sha256

    status, run, output = train(
        Poison([20], math.inf), "checkpointing.save_steps=1", "training.max_steps=21", "checkpointing.async_save=false"
    )
    assert status == 0, output
    hashes = [weights_sha256(step_folder(run, step)) for step in (18, 19, 20, 21)]
    assert hashes[1] == hashes[2]
    assert len(set(hashes)) == 3


def test_an_outlier_is_skipped(train, clean):
    """Clipping alone would have taken the whole step in its direction."""
    status, run, output = train(Poison([75], 1000.0), "training.max_steps=80")
    assert status == 0, output
    found, expected = steps(run), steps(clean)
    assert found[74]["grad_norm"] > 100 * expected[74]["grad_norm"]
    assert [row["skipped_steps"] for row in found] == [0] * 74 + [1] * 6
    assert found[:74] == expected[:74]
    assert_recovered(run, clean)


def test_ten_in_a_row_roll_the_run_back_past_their_data(train, clean, tmp_path):
    status, run, output = train(Poison(list(range(35, 45)), math.nan))
    assert status == 0, output
    first, beyond = 30 * GLOBAL_BATCH, 44 * GLOBAL_BATCH
    skipped = {"step": 30, "first_sample": first, "next_sample": beyond}
    assert json.loads((run / "rollbacks.json").read_text()) == [skipped]
    log = (run / "logs" / "train.log").read_text()
    assert f"back to {step_folder(run, 30)}, without the samples {first:,} to {beyond - 1:,}" in log
    found, expected = steps(run), steps(clean)
    assert found[:30] == expected[:30]
    following = [beyond + number * GLOBAL_BATCH for number in range(1, STEPS - 30 + 1)]
    assert [row["next_sample"] for row in found[30:]] == following
    assert {row["skipped_steps"] for row in found} == {0}  # what was undone does not count
    assert_recovered(run, clean)
    # From the checkpoint before the rollback the samples that were left out stay so.
    again = f"checkpointing.resume_from_checkpoint={step_folder(run, 30)}"
    status, output = train_here(tmp_path / "experiment.yaml", again)
    assert status == 0, output
    assert steps(run) == found


def test_a_bad_step_before_the_first_checkpoint_does_not_keep_a_run_from_going_back(train):
    status, run, output = train(Poison([5, *range(35, 44)], math.nan))
    assert status == 0, output
    kept = json.loads((run / "rollbacks.json").read_text())
    assert [one["step"] for one in kept] == [30]
    assert steps(run)[-1]["skipped_steps"] == 1


def test_rollbacks_that_do_not_help_end_the_run(train):
    status, run, output = train(Poison(list(range(35, 45)), math.nan, always=True))
    assert status == 2
    assert "error: the run went back to" in output
    assert "3 times and steps are skipped again" in output
    assert "training.max_skips=null" in output
    assert "Traceback" not in output
    kept = json.loads((run / "rollbacks.json").read_text())
    assert [one["step"] for one in kept] == [30, 30, 30]
    assert all(one["next_sample"] == after["first_sample"] for one, after in itertools.pairwise(kept))


def test_bad_steps_from_the_start_are_an_error(train):
    status, _, output = train(Poison(list(range(1, 11)), math.nan))
    assert status == 2
    assert "steps were skipped from step 1 on, and no checkpoint is older" in output


def test_without_a_limit_bad_steps_are_only_skipped(train, clean):
    status, run, output = train(Poison(list(range(35, 45)), math.nan), "training.max_skips=null")
    assert status == 0, output
    assert not (run / "rollbacks.json").exists()
    assert steps(run)[-1]["skipped_steps"] == 10
    assert_recovered(run, clean)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_skip_and_roll_back_alike(mixture, tmp_path, strategy):
    """The gradient of one rank is bad; both skip, or their weights would differ. Ten need not be in a row."""
    sections = {**SECTIONS, "training": {**SECTIONS["training"], "gradient_accumulation_steps": 1, "max_steps": 45}}
    config = write_experiment(tmp_path, mixture, **sections, parallel={"strategy": strategy})
    poison = json.dumps({"steps": [25, *range(31, 40), 42], "factor": math.nan, "rank": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "poisoned_run.py"), poison, "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    found = steps(run)
    assert [row["step"] for row in found] == list(range(1, 46))
    assert [row["skipped_steps"] for row in found] == [0] * 41 + [1] * 4
    skipped = {"step": 20, "first_sample": 20 * GLOBAL_BATCH, "next_sample": 39 * GLOBAL_BATCH}
    assert json.loads((run / "rollbacks.json").read_text()) == [skipped]
    assert found[-1]["next_sample"] == (45 + 19) * GLOBAL_BATCH
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
