"""The profile of some steps of a run."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
from training_runs import train_here, write_experiment, write_sources

from train.config import ProfileSection
from train.distributed import Ranks
from train.profiling import Profiler

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


def steps_in(folder) -> list[int]:
    """The steps that the trace in a run's folder shows, in their order in time."""
    with gzip.open(folder / "logs" / "profile" / "trace-rank00000.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marks = {event["ts"]: event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", ""))}
    return [int(marks[time].split()[1]) for time in sorted(marks)]


def calls_of(folder, operator: str) -> int:
    """How often an operator ran, as the table says."""
    line = re.search(rf"^ *{operator} .* (\d+) *$", (folder / "logs" / "profile" / "operators.txt").read_text(), re.M)
    return int(line[1]) if line else 0


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
    loop(Profiler(ProfileSection(steps=steps), tmp_path, ALONE, said.append), first, last)
    assert steps_in(tmp_path) == recorded
    assert calls_of(tmp_path, "aten::mm") == len(recorded)
    memory = (tmp_path / "logs" / "profile" / "memory.txt").read_text()
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
    loop(Profiler(section, tmp_path, ranks, said.append), 1, 9)
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path):
    (tmp_path / "logs").write_text("no folder")
    said = []
    loop(Profiler(ProfileSection(steps=(1, 2)), tmp_path, ALONE, said.append), 1, 9)
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
    assert steps_in(tmp_path / "run") == [3, 4]
    assert f"profile of steps 3 to 4 in {tmp_path / 'run' / 'logs' / 'profile'}" in output
    # Two steps of two micro-batches, each with an embedding that is looked up once.
    assert calls_of(tmp_path / "run", "aten::embedding") == 4
