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

    Others may append to the same file. What they wrote behind the last sync is not cut off: the lines kept here then
    follow it, and some of them may be there twice.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Open `path`, which goes on where it ends; `say` is told once that it cannot be written, and that it can.

        Raises:
            OSError: it cannot be opened.
        """
        self._path, self._say = path, say
        self._file = path.open("a+b", buffering=0)
        self._fixed = os.fstat(self._file.fileno()).st_size  # bytes that are never cut off
        self._own = 0  # bytes written here behind them
        self._kept: list[bytes] = []  # lines that no sync has made durable
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
        rest = b"".join(self._kept[self._written :])
        if self._failing:
            rest = self._cut_back() + rest
        while rest:
            written = self._file.write(rest)
            self._own += written
            rest = rest[written:]
        self._written = len(self._kept)

    def _cut_back(self) -> bytes:
        """Remove what an error left in doubt, unless others have written there; returns what ends a part of a line."""
        size = os.fstat(self._file.fileno()).st_size
        if size <= self._fixed + self._own:
            size = min(size, self._fixed)
            self._file.truncate(size)
        self._fixed, self._own = size, 0
        last = os.pread(self._file.fileno(), 1, size - 1) if size else b"\n"
        return b"" if last == b"\n" else b"\n"

    def _sync_kept(self) -> None:
        self._write_kept()
        size = os.fstat(self._file.fileno()).st_size  # what others write from here on may not be on the disk
        os.fsync(self._file.fileno())
        self._fixed, self._own = size, 0
        self._kept, self._written = [], 0

    def _lines(self) -> str:
        return f"{len(self._kept)} line(s)"
