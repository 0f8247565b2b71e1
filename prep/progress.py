"""A progress line for long work: a bar with rate and time left on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

LINE_SECONDS = 10.0
Item = TypeVar("Item")


class Progress:
    """Shows how much of the input is done, on stderr.

    Args:
        title: what is being done.
        total: bytes of the input, as they lie on the disk, or a number of other things.
        done: how much of it an earlier run has done.
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

    def update(self, done: int, text_bytes: int | None = None) -> None:
        """Say that `done` of the total is done, and that this run has worked through `text_bytes` of text."""
        now = time.monotonic()
        if not self._bar and now - self.shown < LINE_SECONDS:
            return
        seconds = max(now - self.begin, 1e-9)
        rate = "" if text_bytes is None else f"{text_bytes / seconds / 1e6:,.0f} MB/s of text"
        if self._bar:
            self._bar.update(self._task, completed=done, rate=rate)
            return
        self.shown = now
        left = seconds * (self.total - done) / max(done - self.first, 1)
        said = [f"{done / self.total:.0%}", *([rate] if rate else []), f"about {left:,.0f} s left"]
        print(f"{self.title}: {', '.join(said)}", file=sys.stderr, flush=True)


def counted(title: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items as they come, `total` of them, with a progress line that counts them."""
    with Progress(title, total) as progress:
        for number, item in enumerate(items, 1):
            progress.update(number)
            yield item
