"""fastText models as files: checked before they are loaded, loaded once per process, asked for whole batches.

fastText trusts what it loads: a truncated file makes it read for ever. So the file is walked through first: a header of
fixed size, the dictionary (words and labels), the input matrix and the output matrix, dense or quantised, and nothing
behind them (fastText 0.9.3: `fasttext.cc`, `dictionary.cc`, `densematrix.cc`, `quantmatrix.cc`). That also gives the
labels without loading anything.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.errors import UserError

MAGIC, VERSION = 793712314, 12
SUPERVISED = 3
PREFIX = "__label__"
CENTROIDS = 256  # of each part of a product quantiser


@dataclass(frozen=True)
class ModelFile:
    """A supervised fastText model on the disk: its labels as it writes them, and the xxh3-128 of its bytes."""

    path: Path
    labels: tuple[str, ...]
    digest: str

    def describe(self) -> dict[str, Any]:
        """What a stage's output depends on; the name says nothing, the content does."""
        return {"model": self.path.name, "model_xxh3": self.digest}


def open_model(path: str | Path, where: str) -> ModelFile:
    """Check a model's file and read its labels.

    Args:
        path: a `.bin` or `.ftz` file on this machine.
        where: the option or key that names it, for messages.

    Raises:
        UserError: no such file, not a fastText model, a truncated one, or one that was not trained on labels.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{where}: {path}: no such file; give the path of a fastText model (.bin or .ftz)")
    status = file.stat()
    return _open(file, status.st_size, status.st_mtime_ns, where)


def predict(model: ModelFile, texts: pa.Array, characters: int, count: int) -> tuple[list[list[str]], list[Any]]:
    """Ask a model about whole documents.

    Args:
        model: a checked file; it is loaded at the first call in a process.
        texts: string [n].
        characters: how many of each text are looked at; 0: all.
        count: how many of the most likely labels are wanted.

    Returns:
        n lists of labels, most likely first, and n float32 arrays of their probabilities.
    """
    if characters:
        texts = pc.utf8_slice_codeunits(texts, 0, characters)
    # to fastText a line is a document, and one that does not end has no end-of-line token
    lines = pc.binary_join_element_wise(pc.replace_substring(texts, "\n", " "), "\n", "")
    status = model.path.stat()
    loaded = _load(str(model.path), status.st_size, status.st_mtime_ns)
    labels, probabilities = loaded.multilinePredict(lines.to_pylist(), count, 0.0, "strict")
    return labels, probabilities


@lru_cache(maxsize=8)
def _load(path: str, size: int, modified: int) -> Any:
    """The bare model: its Python wrapper fails under numpy 2, and warns on loading."""
    import fasttext_pybind

    model = fasttext_pybind.fasttext()
    model.loadModel(path)
    return model


@lru_cache(maxsize=8)
def _open(file: Path, size: int, modified: int, where: str) -> ModelFile:
    if not size:
        raise UserError(f"{where}: {file}: an empty file, not a fastText model")
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        walk = _Walk(content)
        try:
            if walk.read("<ii") != (MAGIC, VERSION):
                raise UserError(f"{where}: {file}: not a fastText model (.bin or .ftz of version {VERSION})")
            labels = walk.model()
        except (struct.error, ValueError, IndexError):
            raise UserError(
                f"{where}: {file}: damaged or truncated at {size:,} bytes; copy or download it again"
            ) from None
        if labels is None:
            raise UserError(f"{where}: {file}: word vectors, not a classifier; it was trained without labels")
        return ModelFile(file.resolve(), labels, xxhash.xxh3_128_hexdigest(content))


class _Walk:
    """Reads a model's file front to back; any of its methods fails where the file ends too early."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    def read(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return values

    def skip(self, size: int) -> None:
        if size < 0 or self.at + size > len(self.content):
            raise ValueError("behind the end")
        self.at += size

    def model(self) -> tuple[str, ...] | None:
        arguments = self.read(
            "<12id"
        )  # dim ws epoch minCount neg wordNgrams loss model bucket minn maxn lrUpdateRate t
        entries, _, _, _, pruned = self.read("<iiiqq")
        labels = []
        for _ in range(entries):
            end = self.content.find(b"\0", self.at)
            if end < 0:
                raise ValueError("a word without an end")
            word = self.content[self.at : end]
            self.at = end + 1
            _, kind = self.read("<qb")
            if kind == 1:
                labels.append(word.decode())
        self.skip(8 * max(pruned, 0))
        for _ in range(2):
            (quantised,) = self.read("<?")
            self.quantised() if quantised else self.dense()
        if self.at != len(self.content):
            raise ValueError("bytes behind the end")
        return tuple(labels) if arguments[7] == SUPERVISED else None

    def dense(self) -> None:
        rows, columns = self.read("<qq")
        self.skip(4 * rows * columns)

    def quantised(self) -> None:
        normed, rows, _, codes = self.read("<?qqi")
        self.skip(codes)
        self.quantiser()
        if normed:
            self.skip(rows)
            self.quantiser()

    def quantiser(self) -> None:
        dimension, _, _, _ = self.read("<4i")
        self.skip(4 * dimension * CENTROIDS)
