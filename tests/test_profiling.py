"""The profile of some steps of a run."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
from training_runs import rows, train_here, write_experiment, write_sources

from train.config import ProfileSection
from train.distributed import Ranks
from train.profiling import Profiler
from train.speed import Speed

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)
SPEED = Speed(0, 100, 1, flops_per_token=1, flops_per_token_full=1, peak=None, devices=1, device=CPU)


def trace(folder) -> list[str]:
    """What ran, in the order of its start, as the trace in a run's folder has it."""
    with gzip.open(folder / "logs" / "profile" / "trace-rank00000.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    return [event["name"] for event in sorted(events, key=lambda event: event["ts"])]


def steps_in(names: list[str]) -> list[int]:
    """The steps of a trace."""
    return [int(name.removeprefix("step ")) for name in names if re.fullmatch(r"step \d+", name)]


def loop(profiler: Profiler, first: int, last: int) -> None:
    """Steps with one matrix product each."""
    x = torch.ones(300, 300)
    with profiler:
        for step in range(first, last + 1):
            profiler.step(step)
            torch.mm(x, x)


@pytest.mark.parametrize(
    ("steps", "first", "last", "recorded"),
    [
        ((3, 5), 1, 9, [3, 4, 5]),
        ((1, 1), 1, 9, [1]),
        ((3, 5), 4, 9, [4, 5]),  # a run that goes on at step 4
        ((3, 5), 1, 4, [3, 4]),  # one that ends after it
    ],
)
def test_exactly_these_steps(tmp_path, steps, first, last, recorded):
    said = []
    loop(Profiler(ProfileSection(steps=steps), tmp_path, ALONE, SPEED, said.append), first, last)
    names = trace(tmp_path)
    assert steps_in(names) == recorded
    assert names.count("aten::mm") == len(recorded)
    profile = tmp_path / "logs" / "profile"
    operators, memory = (profile / "operators.txt").read_text(), (profile / "memory.txt").read_text()
    assert re.search(rf"aten::mm .* {len(recorded)} *$", operators, re.MULTILINE)
    largest = next(line.split() for line in memory.splitlines() if "aten::" in line)
    assert largest[0] == "aten::mm"  # before all others: its result
    assert said == [
        f"profile of steps {recorded[0]} to {recorded[-1]} in {tmp_path / 'logs' / 'profile'}: "
        "trace-rank00000.json.gz, operators.txt, memory.txt"
    ]


@pytest.mark.parametrize(
    ("section", "ranks"),
    [
        (None, ALONE),
        (ProfileSection(steps=(3, 5)), Ranks(1, 2, CPU, None)),  # only the first rank records
        (ProfileSection(steps=(30, 50)), ALONE),
    ],
)
def test_nothing_happens_otherwise(tmp_path, monkeypatch, section, ranks):
    def refuse(*_, **__):
        raise AssertionError("a profile was started")

    monkeypatch.setattr("train.profiling.profile", refuse)
    monkeypatch.setattr("train.profiling.record_function", refuse)
    said = []
    loop(Profiler(section, tmp_path, ranks, SPEED, said.append), 1, 9)
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path):
    (tmp_path / "logs").write_text("no folder")
    said = []
    loop(Profiler(ProfileSection(steps=(1, 2)), tmp_path, ALONE, SPEED, said.append), 1, 9)
    assert len(said) == 1
    assert "the profile could not be written (Not a directory)" in said[0]


def test_a_run_with_a_profile(tmp_path):
    torch.set_num_threads(1)
    config = write_experiment(
        tmp_path,
        write_sources(tmp_path / "data"),
        training={"max_steps": 6, "warmup_steps": 1},
        profile={"steps": [3, 4]},
    )
    status, output = train_here(config)
    assert status == 0, output
    names = trace(tmp_path / "run")
    assert steps_in(names) == [3, 4]
    assert f"profile of steps 3 to 4 in {tmp_path / 'run' / 'logs' / 'profile'}" in output
    # Two steps of two micro-batches, each with an embedding that is looked up once.
    assert names.count("aten::embedding") == 4
    written = {row["step"]: row["blocked"]["log"] for row in rows(tmp_path / "run", timed=True) if "loss" in row}
    assert written[5] > 0.5  # the time that the files took is stated as such
