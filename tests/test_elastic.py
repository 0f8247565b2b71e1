"""Ranks that die, come and go under torchrun; time limits of their exchanges; when they collect garbage."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import ROOT, kill, losses, results, rows, run, start, write_experiment, write_sources

from train import distributed

STEPS = 60
ONE_RANK, TWO_RANKS = "1 data rank(s) x 2 micro-batch(es)", "2 data rank(s) x 1 micro-batch(es)"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


def experiment(folder: Path, mixture: dict) -> Path:
    """60 steps of a batch that is meant for two ranks, a checkpoint every 5."""
    return write_experiment(
        folder,
        mixture,
        training={"max_steps": STEPS, "gradient_accumulation_steps": 1, "world_size": 2},
        checkpointing={"save_steps": 5, "save_total_limit": None},
        logging={"log_steps": 1, "eval_steps": None},
        parallel={"strategy": "fsdp"},
    )


@pytest.fixture(scope="module")
def uninterrupted(mixture, tmp_path_factory) -> Path:
    """The run folder of two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(experiment(folder, mixture), ranks=2)
    return folder / "run"


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A torchrun that has run alone does not tell one that joins it where to meet, unless the ranks meet anew each time.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rank_process(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for number in map(int, children):
        if f"RANK={rank}" in Path(f"/proc/{number}/environ").read_text().split("\0"):
            return number
    raise AssertionError(f"no rank {rank}")


def wait_for(log: Path, text: str, *, times: int = 1, seconds: float = 120) -> None:
    """Until a line with `text` stands in a log so many times."""
    end = time.monotonic() + seconds
    while not log.exists() or len(re.findall(text, log.read_text())) < times:
        assert time.monotonic() < end, f"no {text} in:\n" + (log.read_text() if log.exists() else "")
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [[(1, 12)], pytest.param([(0, 12), (1, 30)], marks=pytest.mark.slow)])
def test_torchrun_starts_the_ranks_again_and_the_run_is_the_same(mixture, uninterrupted, tmp_path, kills):
    """SIGKILL to one rank: the other ends, both start again and go on from the newest checkpoint."""
    config, log = experiment(tmp_path, mixture), tmp_path / "run" / "logs" / "train.log"
    process = torchrun(
        "--standalone", "--nproc-per-node=2", "--max-restarts=2", "train/pretrain.py", "--config", str(config)
    )
    for number, (killed, step) in enumerate(kills, start=1):
        wait_for(log, rf"step +{step}/")
        os.kill(rank_process(process, killed), signal.SIGKILL)
        wait_for(log, "resuming from", times=number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert log.read_text().count("resuming from") == len(kills)
    assert rows(tmp_path / "run") == rows(uninterrupted)
    assert results(tmp_path / "run") == results(uninterrupted)


@pytest.mark.slow
def test_other_numbers_of_ranks_continue_the_same_data(mixture, uninterrupted, tmp_path):
    """Two ranks until both and torchrun are killed, one until SIGTERM, two to the end."""
    config, log = experiment(tmp_path, mixture), tmp_path / "run" / "logs" / "train.log"
    process = start(config, ranks=2)
    wait_for(log, r"step +12/")
    kill(process)
    process = start(config)
    wait_for(log, r"step +30/")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped on request at step" in output
    assert ONE_RANK in output
    assert TWO_RANKS in run(config, ranks=2)
    assert_same_curve(tmp_path / "run", uninterrupted)


def assert_same_curve(found: Path, expected: Path) -> None:
    ours, theirs = ([row["next_sample"] for row in rows(path) if "loss" in row] for path in (found, expected))
    assert ours == theirs
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert len(losses(found)) == STEPS


@pytest.mark.slow
def test_nodes_may_come_and_go(mixture, uninterrupted, tmp_path):
    """torchrun --nnodes 1:2, both nodes on this machine: one starts alone, a second joins it and is killed."""
    config, log, gate = experiment(tmp_path, mixture), tmp_path / "run" / "logs" / "train.log", tmp_path / "gate"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(host: bool) -> subprocess.Popen[str]:
        return torchrun(
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=test",
            f"--rdzv-conf=is_host={int(host)},last_call_timeout=5",
            "--local-addr=127.0.0.1",
            "--monitor-interval=0.5",
            str(ROOT / "tests" / "gated_run.py"),
            str(gate),
            "--config",
            str(config),
        )

    gate.write_text("7")
    first = node(host=True)
    wait_for(log, r"step +8/")
    second = node(host=False)
    wait_for(log, re.escape(TWO_RANKS))
    assert re.findall("stopped on request at step .*, checkpoint saved", log.read_text())  # it loses nothing
    gate.write_text("30")
    wait_for(log, r"step +31/")
    kill(second)
    wait_for(log, re.escape(ONE_RANK), times=2)
    gate.write_text(str(STEPS))
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert_same_curve(tmp_path / "run", uninterrupted)


# What the ranks agree on


def test_the_time_limit_of_every_group_is_shortened(tmp_path):
    """An exchange that nobody else enters ends the process after the limit, in groups made later too."""
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from datetime import timedelta\n"
        "import torch, torch.distributed as dist\n"
        "from train.distributed import START_TIMEOUT, shorten_timeouts, start_ranks\n"
        "ranks = start_ranks('gloo')\n"
        "pair = dist.new_group([0, 1])\n"
        "ranks.barrier()\n"
        "shorten_timeouts(timedelta(seconds=1))\n"
        "if ranks.is_first:\n"
        "    for group in (ranks.host_group, pair):\n"
        "        begin = time.monotonic()\n"
        "        try:\n"
        "            dist.all_reduce(torch.ones(1), group=group)\n"
        "        except RuntimeError as error:\n"
        "            print('failed after', time.monotonic() - begin, error, flush=True)\n"
        "else:\n"
        "    time.sleep(6)\n"
    )
    process = torchrun("--standalone", "--nproc-per-node=2", str(program))
    output, _ = process.communicate(timeout=120)
    found = [float(seconds) for seconds in re.findall(r"failed after (\S+) .*[Tt]imed out", output)]
    assert len(found) == 2, output
    assert all(0.9 < seconds < 4 for seconds in found)
    assert timedelta(minutes=5) <= distributed.STEP_TIMEOUT < distributed.START_TIMEOUT


def test_the_flight_recorder_is_on_where_nobody_says_otherwise(tmp_path, monkeypatch):
    names = ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"]
    names += ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    for name in names:
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    distributed._record_exchanges(tmp_path / "flight")
    assert [os.environ.get(name) for name in names] == [None, "0", "1", str(tmp_path / "flight" / "rank-"), None]


def test_the_names_of_the_flight_recorder_are_those_of_this_torch():
    """In the compiled library or, of what only NCCL reads, in its header."""
    folder = Path(torch.__file__).parent
    library = (folder / "lib" / "libtorch_cpu.so").read_bytes()
    header = (folder / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        assert name.encode() in library
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        assert f'"{name}"' in header


@pytest.fixture
def frozen():
    distributed.freeze_garbage_collector()
    yield
    distributed.thaw_garbage_collector()


class Node:
    """Holds a tensor, and itself."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1000)
        self.itself = self


def test_garbage_is_collected_at_fixed_steps_only(frozen):
    """Cycles of tensors do not pile up, those that lived through a collection neither."""
    assert not gc.isenabled()
    alive: list[weakref.ref] = []
    held: list[Node] = []
    most, every = 0, distributed.GARBAGE_STEPS
    for step in range(1, 10 * every + 1):
        node = Node()
        alive.append(weakref.ref(node))
        held = [*held[-3:], node]  # some live on for a while
        del node
        distributed.collect_garbage(step)
        living = sum(reference() is not None for reference in alive[-3 * every :])
        most = max(most, living)
        if step % every == 0:
            assert living <= 5
    assert every - 5 <= most <= every + 5  # nothing else collected


def test_collecting_does_not_look_at_what_was_there(frozen):
    """Which is what takes half a second in a training process."""
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000


def test_thawing_gives_everything_back():
    distributed.freeze_garbage_collector()
    distributed.freeze_garbage_collector()
    distributed.thaw_garbage_collector()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_run_of_one_needs_no_groups():
    assert not dist.is_initialized()
    distributed.shorten_timeouts()
    assert distributed.process_groups() == []
