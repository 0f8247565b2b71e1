"""Files that are complete or absent: written beside their name, synced, renamed; and one writer to a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from shards.errors import UserError


def lock_folder(folder: Path) -> IO[bytes]:
    """Hold an output folder until the returned file is closed or the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    file = (folder / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{folder}: another process is writing here; wait for it, or stop it first") from None
    return file


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Sync a finished temporary file and give it its name."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(temporary, path)
