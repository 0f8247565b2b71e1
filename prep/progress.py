"""A progress line for long work: a bar with rate and time left on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    """Shows how much of the input is done, on stderr.

    Args:
        title: what is being done.
        total: bytes of the input, as they lie on the disk.
        done: bytes of it that an earlier run has done.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.first = title, max(total, 1), done
        self.begin = self.shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.first, rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, text_bytes: int) -> None:
        """Say that `done` bytes of the input are done, and that this run has worked through `text_bytes` of text."""
        now = time.monotonic()
        if not self._bar and now - self.shown < LINE_SECONDS:
            return
        seconds = max(now - self.begin, 1e-9)
        rate = f"{text_bytes / seconds / 1e6:,.0f} MB/s of text"
        if self._bar:
            self._bar.update(self._task, completed=done, rate=rate)
            return
        self.shown = now
        left = seconds * (self.total - done) / max(done - self.first, 1)
        print(f"{self.title}: {done / self.total:.0%}, {rate}, about {left:,.0f} s left", file=sys.stderr, flush=True)
