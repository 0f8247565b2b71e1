"""Arrays of numpy in a folder that may be remote: `part-00000.KEY.npy`."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa

from prep.storage import Folder
from shards.errors import UserError


def part_stem(number: int) -> str:
    """`part-00000`, as in `prep.parts`."""
    return f"part-{number:05d}"


def load_array(folder: Folder, name: str) -> np.ndarray:
    """An array of a folder.

    Raises:
        UserError: it is missing.
    """
    content = folder.read(name)
    if content is None:
        raise UserError(f"{folder.uri}/{name}: missing; was something removed by hand? Add --overwrite to start anew")
    array: np.ndarray = np.load(io.BytesIO(content))
    return array


def save_array(folder: Folder, name: str, array: np.ndarray, *, durable: bool = True) -> None:
    """Write an array; one that every run makes anew need not be durable."""
    content = io.BytesIO()
    np.save(content, array)
    folder.write(name, content.getvalue(), durable=durable)


def array_length(folder: Folder, name: str) -> int:
    """Items on the last axis of an array, from its header; 0 if there is no such file."""
    if not folder.exists(name):
        return 0
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


def _header(file: pa.NativeFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    np.lib.format.read_magic(file)
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, by_column, dtype
