"""Ranks that hang, in real processes: who is named, with which stack, and that the run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import ROOT, write_experiment, write_sources

from train.distributed import Ranks
from train.watch import HUNG, PATIENCE, Heartbeat, Watch, hanging

SECONDS = 2.5
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def watched_loop(run: Path, *behave: str) -> str:
    """Run `watched_loop.py` under torchrun to its end; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests" / "watched_loop.py"), str(run), f"--seconds={SECONDS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *(f"--behave={text}" for text in behave)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is at its end") == 2
    return done.stderr


def hangs(text: str) -> list[tuple[int, int, str]]:
    """Rank, step and phase of every report of a rank that hangs."""
    found = re.findall(r"rank (\d+) \(host \S+, pid \d+\) hangs .*in step (\d+), phase (\w+)", text)
    return [(int(rank), int(step), phase) for rank, step, phase in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run folder of two ranks of which one or the other does nothing for 1.8 times `SECONDS`, in seven ways."""
    run, long = tmp_path_factory.mktemp("watch") / "run", 1.8 * SECONDS
    output = watched_loop(
        run,
        f"1:1:step:sleep={long}",  # the first step, and a save: right
        f"1:2:save:sleep={long}",
        f"1:4:step:sleep={long}",
        f"0:6:data:sleep={long}",
        f"1:8:step:stop={long}",
        f"0:10:data:stop={long}",
        f"1:12:data:lock={long}",
    )
    assert hangs(output) == hangs((run / "logs" / "train.log").read_text())
    return run


@pytest.fixture(scope="module")
def reports(run) -> list[str]:
    """What the log says of each hang."""
    return re.split(r"(?m)^(?=\S+T\S+ rank .* hangs)", (run / "logs" / "train.log").read_text())[1:]


def test_the_rank_that_hangs_is_named_and_no_other(reports):
    """Not the one that waits for it, which is as silent; and nobody where it may take long."""
    found = [hang for report in reports for hang in hangs(report)]
    assert [rank for rank, *_ in found] == [1, 0, 1, 0, 1]
    assert found[:2] == [(1, 4, "step"), (0, 6, "data")]
    for (_, heard, _), step in zip(found[2:], [8, 10, 12], strict=True):  # it has no time to say where it is
        assert step - 4 <= heard <= step


def test_the_report_has_the_stack_and_the_others(run, reports):
    lines = reports[0].splitlines()
    assert "rank-00001.txt" in lines[1]
    assert lines[2].strip().startswith("File")
    assert lines[2].endswith("in sleep_in_the_forward_pass")
    assert "waiting for it: rank(s) 0, in step 4, phase step" in reports[0]
    assert "in all_reduce" in (run / "logs" / "stacks" / "rank-00000.txt").read_text()  # of the one that waits
    (seconds,) = re.findall(r"for (\d+) s", lines[0])
    assert HUNG * SECONDS - 1 < int(seconds) <= SECONDS + 1


def test_the_first_rank_reports_itself(reports):
    assert "in sleep_in_the_forward_pass" in reports[1]
    assert "waiting for it: rank(s) 1, in step 6, phase data" in reports[1]


@pytest.mark.parametrize("number", [2, 3])
def test_a_stopped_process_is_said_to_be_stopped(reports, number):
    """The first rank, too, which the second reports."""
    assert re.search(r"last heard of in .*stopped \(SIGSTOP\); kill -CONT \d+ lets it go on", reports[number])
    assert "no stack in" in reports[number]


def test_a_rank_that_holds_the_interpreter_has_a_stack(reports):
    assert "its heartbeat has stopped, too" in reports[4]
    assert "in hold_the_lock" in reports[4]


def test_that_a_rank_goes_on_is_said(reports):
    found = re.findall(r"rank (\d+) goes on, \d+ s after it fell silent", "".join(reports))
    assert sorted(found) == ["0", "0", "1", "1", "1"]


def test_nothing_is_left_but_the_stacks(run):
    assert {path.name for path in (run / "logs").iterdir()} == {"train.log", "stacks"}


# Who hangs, from the counts alone


@dataclasses.dataclass
class Run:
    """Ranks that run one program: a list of groups, in each of which their members meet."""

    program: list[frozenset[int]]
    stops: dict[int, int]  # rank: number of groups after which it does nothing more

    def heartbeats(self, world_size: int) -> tuple[list[Heartbeat], set[int]]:
        """Where all ranks are in the end, and who waits in a collective."""
        entered = [0] * world_size  # parts of the program that a rank has entered, those without it too
        waiting: set[int] = set()
        moved = True
        while moved:
            moved = False
            for rank in range(world_size):
                while entered[rank] < min(self.stops.get(rank, len(self.program)), len(self.program)):
                    if rank in waiting and any(entered[member] < entered[rank] for member in self._met(entered[rank])):
                        break
                    waiting.discard(rank)
                    if rank in self.program[entered[rank]]:
                        waiting.add(rank)
                    entered[rank] += 1
                    moved = True
                if rank in waiting and all(entered[member] >= entered[rank] for member in self._met(entered[rank])):
                    waiting.discard(rank)
        counts = [
            {str(sorted(group)): self.program[: entered[rank]].count(group) for group in self.program if rank in group}
            for rank in range(world_size)
        ]
        return [heartbeat(rank, counts[rank]) for rank in range(world_size)], waiting

    def _met(self, position: int) -> frozenset[int]:
        return self.program[position - 1]


def heartbeat(rank: int, collectives: dict[str, int]) -> Heartbeat:
    return Heartbeat(rank, "host", 1, 1, "step", 1, 99.0, 60.0, collectives, 0)


@st.composite
def runs(draw) -> tuple[int, Run]:
    world_size = draw(st.integers(2, 6))
    groups = st.frozensets(st.integers(0, world_size - 1), min_size=2)
    kinds = draw(st.lists(groups, min_size=1, max_size=4))
    program = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=12))
    stops = draw(st.dictionaries(st.integers(0, world_size - 1), st.integers(0, len(program) - 1), min_size=1))
    return world_size, Run(program, stops)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_whoever_is_blamed_is_awaited_and_waits_for_nobody(drawn):
    """Against a simulation of the ranks; whoever waits in a collective is never blamed."""
    world_size, run = drawn
    beats, waiting = run.heartbeats(world_size)
    blamed = {rank.rank for rank in hanging(beats, lambda rank: True)}
    if waiting:
        assert blamed
        assert blamed <= run.stops.keys() - waiting
        if len(run.stops) == 1:
            assert blamed == set(run.stops)
    else:
        assert blamed == set(range(world_size))


def test_without_collectives_stacks_tell():
    """Stages of a pipeline, which wait for messages of one that is at work on something."""
    beats = [heartbeat(rank, {}) for rank in range(3)]
    assert [rank.rank for rank in hanging(beats, lambda rank: rank.rank != 1)] == [1]
    assert len(hanging(beats, lambda rank: True)) == 3


# One process


def test_a_single_rank_reports_itself(tmp_path, capfd):
    watch = Watch(tmp_path, ALONE, 1.0)
    for step in (1, 2):
        watch.beat(step, "step")
    time.sleep(1.5)
    watch.beat(3, "step")
    watch.close()
    assert hangs(capfd.readouterr().err) == [(0, 2, "step")]
    assert "in test_a_single_rank_reports_itself" in (tmp_path / "logs" / "train.log").read_text()


def test_heartbeats_are_whole_and_new(tmp_path):
    watch = Watch(tmp_path, ALONE, 1.0)
    watch.beat(7, "evaluate")
    path = tmp_path / "logs" / "heartbeat" / "rank-00000.json"
    seen = set()
    end = time.monotonic() + 20
    while len(seen) < 5 and time.monotonic() < end:
        if path.exists():
            fields = json.loads(path.read_text())
            seen.add((fields["step"], fields["phase"], fields["beats"], fields["time"]))
    watch.close()
    assert fields["pid"] == os.getpid()
    assert len(seen) == 5
    assert {entry[:3] for entry in seen} >= {(7, "evaluate", 1)}
    assert list((tmp_path / "logs").iterdir()) == []
    assert "watch" not in {thread.name for thread in threading.enumerate()}


def test_what_may_take_long(tmp_path):
    """The first step of a phase compiles; every save may take its time."""
    watch = Watch(tmp_path, ALONE, 60.0)
    allowed = {}
    for step in (4, 5, 6):
        for phase in ("data", "step", "step", "evaluate", "save"):
            watch.beat(step, phase)
            allowed[step, phase] = watch._own().allowed / 60.0
    watch.close()
    assert {allowed[4, phase] for phase in ("data", "step", "evaluate", "save")} == {PATIENCE}
    assert allowed[6, "save"] == PATIENCE
    assert {allowed[step, phase] for step in (5, 6) for phase in ("data", "step", "evaluate")} == {1}


def test_a_disk_that_fails_costs_one_line(tmp_path, capfd):
    (tmp_path / "logs").write_text("not a folder")
    watch = Watch(tmp_path, ALONE, 0.3)
    for step in range(5):
        watch.beat(step, "step")
        time.sleep(0.05)
    time.sleep(0.5)
    watch.close()
    assert capfd.readouterr().err.count("a hang may go unreported") == 1


def test_a_beat_is_cheap(tmp_path):
    """Far below a millisecond; generous, for the machine may be busy."""
    watch = Watch(tmp_path, ALONE, 60.0)
    start = time.perf_counter()
    for step in range(10_000):
        watch.beat(step, "step")
    seconds = time.perf_counter() - start
    watch.close()
    assert seconds / 10_000 < 1e-4


# The trainer


@pytest.mark.slow
def test_a_training_run_reports_its_sleeping_rank_and_ends(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from shards.errors import run_command\n"
        "from train import pretrain\n"
        "from train.passes import Passes\n"
        "calls, forward = 0, Passes._forward\n"
        "def sleep_in_the_forward_pass(self, *rest):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 5 and self._layout.ranks.rank == 1:\n"
        "        time.sleep(6)\n"
        "    return forward(self, *rest)\n"
        "Passes._forward = sleep_in_the_forward_pass\n"
        "run_command(pretrain.main)\n"
    )
    training = {"gradient_accumulation_steps": 1, "max_steps": 10, "hang_timeout": 3.0}
    sections = {"logging": {"eval_steps": None}, "parallel": {"strategy": "fsdp"}, "training": training}
    config = write_experiment(tmp_path, write_sources(tmp_path / "data"), **sections)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(program), "--config", str(config)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run" / "logs" / "train.log").read_text()
    assert hangs(log) == [(1, 5, "data")]  # it has not got to its first pass
    assert "in sleep_in_the_forward_pass" in log
    assert "rank 1 goes on" in log
    assert "done: " in log
