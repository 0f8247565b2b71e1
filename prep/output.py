"""The output folder of a tokenize run: the datasets under construction, the rejected rows, and how far the run is.

`run.json` says what is being run; it is written first and stays. `progress.json` is replaced at each checkpoint and
removed at the end. A folder with `run.json` and `dataset.json` is finished, one with `run.json` and `progress.json`
can be resumed. What was written after the last checkpoint is cut away by a resume, so a killed run ends in the same
bytes as one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from prep.documents import Input, Position, Rejected
from shards.errors import UserError
from shards.files import lock_folder, publish, write_atomic
from shards.format import MANIFEST, TOKENIZER
from shards.writer import DatasetWriter

RUN, PROGRESS, REJECTED = "run.json", "progress.json", "rejected"
TRAIN, VAL = "train", "val"
MAX_PENDING_REJECTED = 10_000
_OWN = (f"{MANIFEST}*", f"{PROGRESS}*", f"{RUN}*", "shard-[0-9]*", "documents-[0-9]*", f"{REJECTED}/part-[0-9]*")
_REJECTED_ROWS = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("reason", pa.string()), ("excerpt", pa.string())]
)


class OtherRun(UserError):
    """The folder holds what a run with other input or other options has made."""


@dataclass
class Counts:
    """What a run has seen so far; `tokens` has EOS and BOS in it."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    bad: int = 0
    literal_specials: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Encoded documents for one dataset; the arguments of `DatasetWriter.append`."""

    tokens: np.ndarray
    ends: np.ndarray
    ids: pa.Array
    sources: pa.Array
    text_bytes: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A block, encoded: documents for TRAIN and, if any fell into it, for VAL; `broken`: why it could not be read."""

    parts: dict[str, Part]
    rows: int
    empty: int
    rejected: list[Rejected]
    literal_specials: Counter[str]
    broken: str | None = None


class Output:
    """The folder while a run writes into it.

    Args:
        out: the folder, made ready by `open_output`.
        state: what `open_output` gave.
        split: whether there is a validation part.
        settings: keyword arguments of `DatasetWriter`.

    Attributes:
        counts: totals since the run was first started.
        position: where in the input the next block begins.
    """

    def __init__(self, out: Path, state: dict[str, Any] | None, *, split: bool, settings: dict[str, Any]) -> None:
        self.out = out
        self.counts = Counts(**state["counts"]) if state else Counts()
        self.position = Position(*state["position"]) if state else Position()
        self._rejected: list[Rejected] = []
        self._rejected_parts: int = state["rejected_parts"] if state else 0
        for path in (out / REJECTED).glob("part-*"):
            if int(path.name[5:10]) >= self._rejected_parts:
                path.unlink()
        self._writers: dict[str, DatasetWriter] = {}
        for name, folder in ((VAL, out / VAL), (TRAIN, out)):  # in the order in which they are finished
            if (name == VAL and not split) or (folder / MANIFEST).exists():
                continue
            if state:
                self._writers[name] = DatasetWriter.resume(folder, state["writers"][name], **settings)
            else:
                self._writers[name] = DatasetWriter(folder, **settings)

    def take(self, encoded: Encoded, end: Position, broken: str | None) -> None:
        """Append a block that ends at `end`; a finished shard makes a checkpoint."""
        finished = self._shards_finished()
        counts = self.counts
        for name, part in encoded.parts.items():
            self._writers[name].append(part.tokens, part.ends, part.ids, part.sources, part.text_bytes)
            counts.documents += len(part.ends)
            counts.tokens += len(part.tokens)
            counts.text_bytes += int(part.text_bytes.sum())
        counts.rows += encoded.rows
        counts.empty += encoded.empty
        counts.bad += len(encoded.rejected)
        for special, number in encoded.literal_specials.items():
            counts.literal_specials[special] = counts.literal_specials.get(special, 0) + number
        if broken:
            counts.broken.append(broken)
        self._rejected += encoded.rejected
        self.position = end
        if self._shards_finished() > finished or len(self._rejected) >= MAX_PENDING_REJECTED:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make everything taken so far survive a crash."""
        if self._rejected:
            _write_rejected(self.out, self._rejected_parts, self._rejected)
            self._rejected_parts += 1
            self._rejected = []
        state = {
            "position": list(self.position),
            "counts": asdict(self.counts),
            "rejected_parts": self._rejected_parts,
            "writers": {name: writer.checkpoint() for name, writer in self._writers.items()},
        }
        write_atomic(self.out / PROGRESS, orjson.dumps(state))

    def finish(self, backend: str, recipe: dict[str, Any]) -> None:
        """Publish the datasets, the validation part first, so that a manifest in the folder means that all is done."""
        self.checkpoint()
        for name, writer in self._writers.items():
            if name == VAL and not writer.documents:
                writer.close()
                _clear(self.out / VAL)
                continue
            writer.finish(backend=backend, recipe={**recipe, "split": name})
        (self.out / PROGRESS).unlink(missing_ok=True)

    def _shards_finished(self) -> int:
        return sum(writer.shards_finished for writer in self._writers.values())


def describe_inputs(inputs: Sequence[Input]) -> dict[str, dict[str, Any]]:
    """What is read, by source: files, bytes, a digest of their names and sizes, and one of their times of change."""
    sources: dict[str, dict[str, Any]] = {}
    digests: dict[str, tuple[xxhash.xxh3_64, xxhash.xxh3_64]] = {}
    for item in inputs:
        entry = sources.setdefault(item.source, {"files": 0, "bytes": 0, "first": item.name})
        entry["files"] += 1
        entry["bytes"] += item.size
        entry["last"] = item.name
        files, times = digests.setdefault(item.source, (xxhash.xxh3_64(), xxhash.xxh3_64()))
        files.update(f"{item.name}\0{item.size}\n".encode())
        times.update(f"{item.modified}\n".encode())
    for name, (files, times) in digests.items():
        sources[name] |= {"digest": files.hexdigest(), "times": times.hexdigest()}
    return sources


@contextmanager
def open_output(out: Path, run: dict[str, Any], overwrite: bool) -> Iterator[dict[str, Any] | None]:
    """Make the folder ready for a run, and hold it while the run lasts.

    Args:
        out: the folder.
        run: all that the output depends on, as JSON.
        overwrite: throw away what another run left, and a finished dataset.

    Yields:
        The last checkpoint of the same run, `{"finished": True}` if it is finished, None if it starts from nothing.

    Raises:
        UserError: the folder holds something else (says what differs), or another process writes into it.
    """
    run = orjson.loads(orjson.dumps(run))
    state = _find_state(out, run, overwrite)
    if state and "finished" in state:
        (out / PROGRESS).unlink(missing_ok=True)
        yield state
        return
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        state = _find_state(out, run, overwrite)  # again: a process that held the folder may have changed it
        if state is None:
            _clear(out)
            write_atomic(out / RUN, orjson.dumps(run, option=orjson.OPT_INDENT_2) + b"\n")
        yield state


def _find_state(out: Path, run: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out is a folder")
    finished = (out / MANIFEST).exists()
    if not finished and not (out / PROGRESS).exists():
        return None
    try:
        before = _read(out / RUN)
        if before == run and not finished:
            return _read(out / PROGRESS)
    except UserError:
        if not overwrite:
            raise
    if overwrite:
        return None
    if before == run:
        return {"finished": True}
    if before is None:
        raise UserError(
            f"{out}: holds a dataset that no tokenize run made here; choose another --out or add --overwrite"
        )
    raise OtherRun(
        f"{out}: was made from other input or with other options; {_differences(before, run)}. "
        f"Choose another --out, or add --overwrite to replace it"
    )


def _write_rejected(out: Path, part: int, rows: Sequence[Rejected]) -> None:
    import pyarrow.parquet

    (out / REJECTED).mkdir(exist_ok=True)
    path = out / REJECTED / f"part-{part:05d}.parquet"
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=_REJECTED_ROWS)
    temporary = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(table, temporary, compression="zstd")
    publish(temporary, path)


def _clear(out: Path) -> None:
    """Remove the files of an earlier run, and no others; the manifest first: nothing half removed looks whole."""
    for folder in (out, out / VAL):
        if (folder / MANIFEST).exists():  # without one, a tokenizer.json here is the user's
            (folder / MANIFEST).unlink()
            (folder / TOKENIZER).unlink(missing_ok=True)
        for pattern in _OWN:
            for path in folder.glob(pattern):
                path.unlink()
    for folder in (out / REJECTED, out / VAL, out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        raise UserError(f"{path}: damaged; remove {path.parent} or add --overwrite") from None
    return content


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed, in words: "--val-fraction was 0.01 and is 0.02"."""
    changes = []
    for name in now["options"]:
        if (old := before["options"].get(name)) != now["options"][name]:
            changes.append(f"--{name.replace('_', '-')} was {old} and is {now['options'][name]}")
    if before["tokenizer_hash"] != now["tokenizer_hash"]:
        changes.append("--tokenizer is another one")
    for name in sorted({*before["inputs"], *now["inputs"]}):
        old, new = before["inputs"].get(name), now["inputs"].get(name)
        if old is None or new is None:
            changes.append(f"source '{name}' is {'new' if old is None else 'gone'}")
        elif old != new:
            was, now_is = (f"{entry['files']:,} file(s), {entry['bytes']:,} bytes" for entry in (old, new))
            if {**old, "times": ""} == {**new, "times": ""}:
                changes.append(f"the files of source '{name}' have new times, so they may have changed (still {was})")
            elif was == now_is:
                changes.append(f"source '{name}' has files of other names or sizes (still {was})")
            else:
                changes.append(f"source '{name}' has changed (was {was}, is {now_is})")
    return "; ".join(changes) or "its run.json is of another version"
