"""A file of lines that only grows, and that a full disk delays but never ends a run for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

SYNC_BYTES = 2**16  # kept in memory at most while the disk works


class AppendOnly:
    """Appends lines; no method but the first raises for the disk.

    A line stays in memory until a sync says that it is on the disk: a network file system may report only then that it
    is full. After an error the file is cut back to what is known to be there, and all that followed is written again
    with the next line.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Open `path`, which goes on where it ends; `say` is told once that it cannot be written, and that it can.

        Raises:
            OSError: it cannot be opened.
        """
        self._path, self._say = path, say
        self._file = path.open("ab", buffering=0)
        self._durable = os.fstat(self._file.fileno()).st_size  # bytes
        self._kept: list[bytes] = []  # the lines behind them
        self._written = 0  # how many of these are in the file
        self._failing = False

    def write(self, line: bytes) -> None:
        """Append a line, which ends with a newline."""
        self._kept.append(line)
        if self._failing or sum(map(len, self._kept)) > SYNC_BYTES:
            self.sync()
        else:
            self._attempt(self._write_kept)

    def sync(self) -> None:
        """Make all lines durable, if the disk lets it."""
        self._attempt(self._sync_kept)

    def close(self) -> None:
        """Write what is left, and say what is lost if that fails still."""
        self.sync()
        if self._kept:
            self._say(f"{self._path}: the last {self._lines()} could not be written")
        self._file.close()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._written = 0
            if not self._failing:
                self._failing = True  # before it is said: that may write here
                self._say(
                    f"{self._path} cannot be written ({error.strerror or error}); {self._lines()} and those to come "
                    "wait in memory until it can, and the run goes on"
                )
        else:
            if self._failing:
                self._failing = False
                self._say(f"{self._path} can be written again; nothing is missing")

    def _write_kept(self) -> None:
        if not self._written:  # after an error, a part of a line may be there
            self._file.truncate(self._durable)
        rest = b"".join(self._kept[self._written :])
        while rest:
            rest = rest[self._file.write(rest) :]
        self._written = len(self._kept)

    def _sync_kept(self) -> None:
        self._write_kept()
        os.fsync(self._file.fileno())
        self._durable += sum(map(len, self._kept))
        self._kept, self._written = [], 0

    def _lines(self) -> str:
        return f"{len(self._kept)} line(s)"
