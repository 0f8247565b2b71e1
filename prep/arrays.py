"""Arrays of numpy in a folder that may be remote: `part-00000.KEY.npy`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from prep.storage import Folder
from shards.errors import UserError


def load_array(folder: Folder, name: str) -> np.ndarray:
    """An array of a folder.

    Raises:
        UserError: it is missing.
    """
    content = folder.read(name)
    if content is None:
        raise UserError(f"{folder.uri}/{name}: missing; was something removed while the run went on? Run it again")
    array: np.ndarray = np.load(io.BytesIO(content))
    return array


def save_array(folder: Folder, name: str, array: np.ndarray, *, durable: bool = True) -> None:
    """Write an array; one that every run makes anew, or that is synced later, need not be durable."""
    content = io.BytesIO()
    np.save(content, array)
    folder.write(name, content.getvalue(), durable=durable)


def array_length(folder: Folder, name: str) -> int:
    """Items on the last axis of an array, from its header."""
    with folder.open(name) as file:
        return int(_header(file)[0][-1])


def read_row(folder: Folder, name: str, row: int) -> np.ndarray:
    """One row of a two-dimensional array, without reading the rest."""
    with folder.open(name) as file:
        shape, by_column, dtype = _header(file)
        if by_column:  # what numpy makes of an array that is one row or one column
            return load_array(folder, name)[row]
        width = shape[1] * dtype.itemsize
        file.seek(file.tell() + row * width)
        return np.frombuffer(file.read(width), dtype)


@contextmanager
def open_array(folder: Folder, name: str) -> Iterator[Callable[[int, int], np.ndarray]]:
    """A function that reads items begin:end of a one-dimensional array, and only these."""
    with folder.open(name) as file:
        _, _, dtype = _header(file)
        start = file.tell()

        def read(begin: int, end: int) -> np.ndarray:
            file.seek(start + begin * dtype.itemsize)
            return np.frombuffer(file.read((end - begin) * dtype.itemsize), dtype)

        yield read


def _header(file: pa.NativeFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    np.lib.format.read_magic(file)
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, by_column, dtype
