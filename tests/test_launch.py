"""`minigpt-train` and the Slurm script as a user starts them: real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_pretrain_processes import read_until
from training_runs import ROOT, losses, results, rows, step_folder, train_here, write_experiment, write_sources

from shards.settings import load_yaml
from tools import launch
from tools.dry_run import dry_run
from train.config import load_experiment

STEPS = 30
SLURM = ROOT / "docs" / "slurm" / "train.sbatch"
SECTIONS = {
    "training": {"max_steps": STEPS, "gradient_accumulation_steps": 1},
    "checkpointing": {"save_steps": 1000},
    "logging": {"eval_steps": None},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(mixture, tmp_path_factory) -> Path:
    """The run folder of one rank with the global batch of two."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, output = train_here(write_experiment(folder, mixture, **SECTIONS), "training.gradient_accumulation_steps=2")
    assert status == 0, output
    return folder / "run"


def minigpt_train(config: Path, *arguments: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from tools.launch import main; main()", "--config", str(config), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        **options,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def assert_same_curve(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert len(losses(found)) == STEPS


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR2, 75)])
def test_two_ranks_stop_on_a_signal_and_the_same_command_goes_on(mixture, uninterrupted, tmp_path, number, status):
    """SIGTERM in the middle; SIGUSR2 before the ranks are there, who get it once they listen."""
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = minigpt_train(config, "--nproc", "2")
    printed = read_until(process, "torchrun")
    assert f"torchrun --standalone --nproc-per-node 2 train/pretrain.py --config {config}" in printed
    if number == signal.SIGTERM:
        read_until(process, "step      4/")
    process.send_signal(number)
    output = finish(process, status)
    assert "stopped on request at step" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/step-*")
    assert not (tmp_path / "run" / "results.json").exists()
    if number == signal.SIGUSR2:
        output = finish(minigpt_train(config, "--nproc", "2"))
        assert f"resuming from {checkpoint}" in output
        assert_same_curve(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_signal_to_all_processes_at_once_from_the_first_moment_on(mixture, tmp_path):
    """As `scancel --signal=USR2` does, and does again: nobody dies of it, not even while starting or ending."""
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = minigpt_train(config, "--nproc", "2")
    read_until(process, "torchrun")
    process.send_signal(signal.SIGUSR2)
    told = set()
    while process.poll() is None:
        below = launch._children(process.pid)
        for pid in [*below, *(rank for torchrun in below for rank in launch._children(torchrun))]:
            launch._send(pid, signal.SIGUSR2)
            told.add(pid)
        time.sleep(0.005)
    assert len(told) >= 3
    assert "stopped on request at step 1," in finish(process, 75)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGUSR2, 75)])
def test_one_process_stops_on_a_signal(mixture, tmp_path, number, status):
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = minigpt_train(config, "--nproc", "1")
    printed = read_until(process, "step      3/")
    assert f"python train/pretrain.py --config {config}" in printed
    process.send_signal(number)
    assert "stopped on request at step" in finish(process, status)
    assert len(list((tmp_path / "run").glob("checkpoints/step-*"))) == 1


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(mixture, tmp_path):
    """Even where the ranks do not react."""
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    process = minigpt_train(config, "--nproc", "2", "training.max_steps=100000")
    read_until(process, "step      3/")
    (torchrun,) = launch._children(process.pid)
    ranks = launch._children(torchrun)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    end = time.monotonic() + 10  # somebody has to take note of their end
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_midtraining_starts_from_a_run(mixture, uninterrupted, tmp_path):
    """The stage picks the entry file; --resume and overrides arrive."""
    sections = {**SECTIONS, "training": {**SECTIONS["training"], "max_steps": 5, "warmup_steps": 1}}
    model = {"type": None, "config_path": None, "from_pretrained": str(uninterrupted)}
    config = write_experiment(tmp_path, mixture, **sections, experiment={"stage": "midtrain"}, model=model)
    output = finish(minigpt_train(config, "--nproc", "1", "--resume", "training.max_steps=4"))
    assert "python train/midtrain.py --config" in output
    assert f"starting from the weights in {step_folder(uninterrupted, STEPS)}" in output
    assert results(tmp_path / "run")["initial_val_loss"] == pytest.approx(results(uninterrupted)["val_loss"], rel=1e-6)
    assert rows(tmp_path / "run")[-1]["step"] == 4
    config_used = load_yaml(tmp_path / "run" / "config.yaml")
    assert config_used["checkpointing"]["resume_from_checkpoint"] == "auto"


def test_a_dry_run_shows_everything_and_writes_nothing(mixture, tmp_path):
    config = write_experiment(tmp_path, mixture, **SECTIONS, parallel={"strategy": "fsdp", "tp": 2})
    before = sorted(tmp_path.rglob("*"))
    output = finish(minigpt_train(config, "--nproc", "4", "--dry-run", "training.learning_rate=1e-4"))
    assert sorted(tmp_path.rglob("*")) == before
    assert "learning_rate: 0.0001" in output
    assert "intermediate_size: 96" in output  # of the model file
    assert re.search(r"code +84\.\d K .* 70\.000%", output)
    assert "37,536 parameters" in output
    assert "layout: 4 rank(s), fsdp x dp_shard 2 x tp 2; 2 data rank(s) x 1 micro-batch(es) x 4 windows" in output
    assert re.search(r"memory of a rank, fsdp x dp_shard 2 x tp 2, 4 x 32 tokens +\n", output)
    assert re.search(r"│ total +│ 0\.00\d\d │", output)  # GiB, of so small a model
    first = train_here_first_document(mixture)
    assert first in output


def test_a_dry_run_leaves_out_what_the_run_will(mixture, tmp_path, capsys):
    """The samples that a rollback skipped behind the newest checkpoint."""
    config = write_experiment(tmp_path, mixture, **SECTIONS)
    assert train_here(config, "training.max_steps=6")[0] == 0
    skipped = {"step": 6, "first_sample": 24, "next_sample": 40}
    (tmp_path / "run" / "rollbacks.json").write_text(json.dumps([skipped]))

    def first_batch(*overrides: str) -> str:
        dry_run(load_experiment(config, overrides), 1)
        return re.search(r"samples \[\d+, \d+\)", capsys.readouterr().out).group()

    assert first_batch() == "samples [40, 44)"
    new = f"checkpointing.output_dir={tmp_path / 'new'}"  # another run that starts from the same checkpoint
    start = f"checkpointing.resume_from_checkpoint={step_folder(tmp_path / 'run', 6)}"
    assert first_batch(new, start) == "samples [24, 28)"
    dry_run(load_experiment(config, ["training.max_steps=6"]), 1)
    assert "step 6: nothing is left to do" in (said := capsys.readouterr().out)
    assert "none: the run is at its end" in said
    assert train_here(config, "training.max_steps=7")[0] == 0
    assert [row["next_sample"] for row in rows(tmp_path / "run") if row["step"] == 7 and "loss" in row] == [44]


def train_here_first_document(mixture: dict) -> str:
    """The text of sample 0 up to the end of its first document, as Python writes it."""
    from tokenizers import Tokenizer

    from shards.loader import WindowLoader
    from shards.mixture import MixtureConfig, MixturePlan

    plan = MixturePlan.build(MixtureConfig.model_validate(mixture), 32, total_samples=240)
    batch = next(WindowLoader(plan, batch_size=1, num_workers=0))[0]
    dataset = plan.sources[int(batch.sources[0])].dataset
    ids = [*batch.input_ids[0].tolist(), int(batch.labels[0, -1])]
    end = dataset.manifest.eos_id
    ids = ids[: ids.index(end) + 1] if end in ids else ids
    tokenizer = Tokenizer.from_str(dataset.tokenizer_json().decode())
    return repr(tokenizer.decode(ids, skip_special_tokens=False)[:200])


def test_mistakes_end_in_one_message(mixture, tmp_path, monkeypatch, capsys):
    config = write_experiment(tmp_path, mixture, **SECTIONS, model={"from_pretrained": "x"})

    def message(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["minigpt-train", *arguments])
        with pytest.raises(SystemExit) as stop:
            launch.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert message("--config", "nowhere.yaml") == "error: nowhere.yaml: no such file\n"
    assert "experiment.stage: Input should be 'pretrain' or 'midtrain'" in message(
        "--config", str(config), "experiment.stage=midtran"
    )
    assert "midtrain starts from trained weights: give model.from_pretrained" in message(
        "--config", str(config), "experiment.stage=midtrain", "model.from_pretrained=null"
    )
    assert "--nproc 0: at least one process" in message("--config", str(config), "--nproc", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--nproc 3: this machine has 2 GPU(s)" in message("--config", str(config), "--nproc", "3")
    assert launch.processes(None) == launch.processes(2) == 2
    assert "unknown option '--npoc'; did you mean '--nproc'?" in message("--config", str(config), "--npoc", "2")
    config = write_experiment(tmp_path, mixture, parallel={"strategy": "fsdp", "tp": 2})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for dry in (["--dry-run"], []):  # before torchrun starts
        assert "needs a multiple of 2 ranks" in message("--config", str(config), "--nproc", "3", *dry)


def test_an_entry_file_refuses_another_stage(mixture, tmp_path):
    config = write_experiment(tmp_path, mixture, experiment={"stage": "midtrain"}, model={"from_pretrained": "x"})
    status, output = train_here(config)
    assert status == 2
    assert "start it with train/midtrain.py, or with minigpt-train" in output


def test_starts_light():
    code = "import sys, tools.launch; assert not {'torch', 'numba', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# Slurm

FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho srun starts "$@"\nexec "$@"',
    "scontrol": 'case $1 in show) echo localhost;; requeue) echo "$2" >> "$REQUEUED";; esac',
}


def test_the_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", SLURM], check=True)


@pytest.mark.parametrize("when", ["srun starts", pytest.param("step      4/", marks=pytest.mark.slow)])
def test_the_slurm_script_trains_and_queues_itself_again(mixture, uninterrupted, tmp_path, when):
    """The script itself, on one node with two ranks; what stands in for Slurm only starts programs and notes things.

    When the ranks are told to stop before they are there, they stop as soon as they listen.
    """
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    queued = tmp_path / "requeued"
    environment = {"PATH": path, "NPROC": "2", "OMP_NUM_THREADS": "1", "REQUEUED": str(queued), **slurm}
    config = write_experiment(tmp_path / "job", mixture, **SECTIONS)

    def sbatch() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                "bash",
                SLURM,
                config,
                "logging.log_steps=1",
                "logging.eval_steps=1",
            ],  # the steps take some time
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    process = sbatch()
    printed = read_until(process, when)
    process.send_signal(signal.SIGUSR2)
    printed += finish(process)
    assert "stopped on request at step" in printed
    assert "Signal" not in printed  # what torchrun says of a rank that one has ended
    assert queued.read_text() == f"{os.getpid()}\n"
    if when == "srun starts":
        return
    finish(sbatch())
    assert queued.read_text() == f"{os.getpid()}\n"  # it was done
    assert_same_curve(tmp_path / "job" / "run", uninterrupted)
