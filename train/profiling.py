"""A profile of a few steps: what ran when, and what took the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from train.config import ProfileSection
from train.distributed import Ranks
from train.speed import Speed

ALLOCATIONS = 100_000  # that a memory snapshot goes back
OPERATORS = 50  # rows of a table


class Profiler:
    """Records the steps of `profile.steps`, from first to last, on the first rank; without the section, nothing.

    Their end writes into `logs/profile/` of the run folder `trace-rank00000.json.gz` (for ui.perfetto.dev and
    chrome://tracing), `operators.txt` (what took the time), and what took the memory: on a GPU
    `memory-rank00000.pickle` (for pytorch.org/memory_viz), on a CPU `memory.txt` (operators by what they allocated).
    """

    def __init__(
        self, section: ProfileSection | None, run: Path, ranks: Ranks, speed: Speed, say: Callable[[str], None]
    ) -> None:
        self._steps = section.steps if section is not None and ranks.is_first else None
        self._folder, self._device, self._speed, self._say = run / "logs" / "profile", ranks.device, speed, say
        self._profile: profile | None = None
        self._recorded: list[int] = []
        self._mark: record_function | None = None  # the current step, as the trace shows it

    def __enter__(self) -> Profiler:
        return self

    def step(self, number: int) -> None:
        """A step begins, and so the one before is over."""
        if self._steps is None:
            return
        self._end_mark()
        if not self._steps[0] <= number <= self._steps[1]:
            self._finish()
            return
        if self._profile is None:
            with self._speed.waiting("log"):
                self._start()
        self._recorded.append(number)
        self._mark = record_function(f"step {number}")
        self._mark.__enter__()

    def __exit__(self, *error: object) -> None:
        """The run is over, perhaps before the last step of the profile."""
        self._end_mark()
        self._finish()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # what earlier steps have left to do is not of these steps
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        try:
            with self._speed.waiting("log"):
                self._profile.stop()
                self._folder.mkdir(parents=True, exist_ok=True)
                names = self._write(self._profile)
            self._say(f"profile of steps {self._recorded[0]} to {self._recorded[-1]} in {self._folder}: {names}")
        except OSError as error:  # as of a full disk: it is not worth a run
            self._say(f"{self._folder}: the profile could not be written ({error.strerror or error})")
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._recorded = None, []

    def _write(self, recorded: profile) -> str:
        """Write all files; returns their names."""
        trace, operators = self._folder / "trace-rank00000.json.gz", self._folder / "operators.txt"
        recorded.export_chrome_trace(str(trace))
        averages = recorded.key_averages()
        cuda = self._device.type == "cuda"
        operators.write_text(averages.table(f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=OPERATORS))
        if cuda:
            memory = self._folder / "memory-rank00000.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
        else:
            memory = self._folder / "memory.txt"
            memory.write_text(averages.table("self_cpu_memory_usage", row_limit=OPERATORS))
        return ", ".join(path.name for path in (trace, operators, memory))
