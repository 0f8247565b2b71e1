"""Parts: the unit of work, of resume and of scheduling.

The input is cut into parts of some megabytes of text, each of one source, at places that depend on the input alone. One
large file becomes many parts, many small files become one. Of many files of rows each is a part, so that the workers
read them. `run_part` takes a part through all steps of a pass, in any
process of any machine, and leaves under the part's number:

    part-00000.parquet              the documents that stay (or .jsonl.zst)
    rejected/part-00000.parquet     those that do not, with the reason; malformed rows of the input among them
    NAME/part-00000.KEY.npy         arrays of the pass's product, such as signatures
    state/part-00000.json           written last: what the part was made of, and the tallies

A part whose state names the same input and the same steps is done, and is not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from prep.arrays import save_array
from prep.characters import UNICODE_VERSION
from prep.documents import BLOCK_BYTES, START, Block, BrokenInput, Columns, Documents, Input, Position, Rejected
from prep.part_writer import Format, PartWriter, read_part
from prep.repeated_ids import IdCounter
from prep.sources import read_blocks
from prep.stage_manifest import STATE
from prep.stages import REASON_COLUMNS, Product, Stage, Step, Tally, run_steps, text_bytes
from prep.storage import Folder, stat

MIN_PART_BYTES, MAX_PART_BYTES = 4 << 20, 64 << 20
PARTS_WANTED = 64  # of a small input: enough to keep many workers busy to the end
ENGINE_VERSION = 2  # raise it when the same steps write other bytes than before
REJECTED = "rejected"


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of one source; `key` tells which bytes of which files they are."""

    number: int
    source: str
    blocks: Iterable[Block] = field(repr=False)
    size: int
    key: str
    consumed: int


class PlacedStage(Stage, Protocol):
    """A stage of one part that knows its documents by their place in it."""

    def finish(self) -> None:
        """Called behind the last batch of the part.

        Raises:
            UserError: the part did not hold what it should.
        """
        ...


@dataclass(frozen=True)
class Job:
    """What a pass does with each part; picklable.

    Attributes:
        folder: where everything goes.
        schema: columns of the documents that are read.
        steps: stages, in order.
        product: arrays to compute from the documents that the steps leave.
        writes: whether documents are written; a pass may be there for its product alone.
        format: of the documents.
        scratch: whether only the next pass reads them: neither compression nor waiting for the disk would pay.
        removal: makes the first stage of a part from its number (the removal of duplicates knows documents by place).
        removal_digest: what that stage depends on.
    """

    folder: Folder
    schema: pa.Schema
    steps: tuple[Step, ...]
    product: Product | None = None
    writes: bool = True
    format: Format = "parquet"
    scratch: bool = False
    removal: Callable[[int], PlacedStage] | None = None
    removal_digest: str | None = None

    def describe(self) -> dict[str, Any]:
        """All that the output of a part depends on, beside the part."""
        return {
            "engine": ENGINE_VERSION,
            "unicode": UNICODE_VERSION,
            "columns": [[column.name, str(column.type)] for column in self.schema],
            "steps": [
                {"stage": step.stage.name, "sources": step.sources, **step.stage.describe()} for step in self.steps
            ],
            "removal": self.removal_digest,
            "product": self.product.describe() if self.product else None,
            "format": self.format if self.writes else None,
            "scratch": self.scratch,
        }

    def digest(self) -> str:
        """Hash of `describe`."""
        return xxhash.xxh3_128_hexdigest(orjson.dumps(self.describe(), option=orjson.OPT_SORT_KEYS))

    def out_schema(self) -> pa.Schema:
        """Columns of the documents that are written; one that a step adds takes the place of one of that name."""
        added = {column.name: column for step in self.steps for column in step.stage.adds}
        return pa.schema([*(column for column in self.schema if column.name not in added), *added.values()])


def part_name(number: int) -> str:
    """`part-00000`."""
    return f"part-{number:05d}"


def part_bytes(total: int) -> int:
    """Bytes of text in a part, for an input of so many bytes: a power of two between 4 and 64 MB."""
    size = MIN_PART_BYTES
    while size < MAX_PART_BYTES and size * PARTS_WANTED < total:
        size *= 2
    return size


@dataclass(frozen=True)
class Files:
    """Files that are read in the same way: which columns, and the schema of the documents that come out."""

    inputs: Sequence[Input]
    columns: Columns
    schema: pa.Schema

    @property
    def size(self) -> int:
        """Bytes, as they lie on the disk."""
        return sum(item.size for item in self.inputs)


def cut_parts(groups: Sequence[Files]) -> Iterator[Part]:
    """Cut files into parts, in order."""
    size = part_bytes(sum(group.size for group in groups))
    number, consumed = 0, 0
    for group in groups:
        for source, run in groupby(group.inputs, key=lambda item: item.source):
            files = list(run)
            if len(files) >= PARTS_WANTED and all(item.kind in ("rows", "csv") for item in files):
                for item in files:  # enough of them to keep all workers busy: each reads its own
                    consumed += item.size
                    key = _key([item], group.columns, START, Position(1))
                    yield Part(number, source, FileBlocks(item, group), item.size, key, consumed)
                    number += 1
                continue
            begin = START
            for blocks in _gather(read_blocks(files, group.columns, schema=group.schema), size):
                filled, end = sum(block.size for block in blocks), blocks[-1].end
                key = _key(files, group.columns, begin, end)
                yield Part(number, source, blocks, filled, key, consumed + blocks[-1].consumed)
                number, begin = number + 1, end
                del blocks
            consumed += sum(item.size for item in files)


def written_parts(folder: Folder, states: Sequence[dict[str, Any]], schema: pa.Schema) -> Iterator[Part]:
    """The documents that a pass has written, one part for each of its parts."""
    consumed = 0
    for state in states:
        consumed += state["kept_bytes"]
        key = xxhash.xxh3_128_hexdigest(f"{state['key']} {state['digest']}".encode())
        blocks = WrittenBlocks(folder, part_name(state["number"]), schema)
        yield Part(state["number"], state["source"], blocks, state["kept_bytes"], key, consumed)


@dataclass(frozen=True)
class FileBlocks:
    """The blocks of a file, which is read where they are used."""

    item: Input
    group: Files

    def __iter__(self) -> Iterator[Block]:
        return read_blocks([self.item], self.group.columns, schema=self.group.schema)


@dataclass(frozen=True)
class WrittenBlocks:
    """Blocks of about 4 MB of a part that a pass has written; read where they are used."""

    folder: Folder
    name: str
    schema: pa.Schema

    def __iter__(self) -> Iterator[Block]:
        for group in read_part(self.folder, self.name, schema=self.schema):
            for batch in split_batch(group):
                yield Block(partial(_documents, conform(batch, self.schema)), batch.nbytes, START, 0)


def _documents(batch: pa.RecordBatch) -> Documents:
    return Documents(batch, rows=batch.num_rows)


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of about 4 MB, which stay in the processor's cache from one stage to the next."""
    rows = max(1, batch.num_rows * BLOCK_BYTES // max(batch.nbytes, 1))
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def _gather(blocks: Iterable[Block], size: int) -> Iterator[list[Block]]:
    """Consecutive blocks that hold no more than `size` bytes of text together, or one block alone."""
    gathered: list[Block] = []
    filled = 0
    for block in blocks:
        if gathered and filled + block.size > size:
            yield gathered
            gathered, filled = [], 0
        gathered.append(block)
        filled += block.size
        del block
    if gathered:
        yield gathered


def run_part(job: Job, digest: str, part: Part) -> dict[str, Any]:
    """Work through a part and publish what comes out; gives its state."""
    name = part_name(part.number)
    removal = job.removal(part.number) if job.removal else None
    steps = ((Step(removal),) if removal else ()) + job.steps
    tallies = [Tally(step.stage.name) for step in steps]
    counted = dict.fromkeys(("rows", "documents", "bytes", "empty", "malformed", "kept_documents", "kept_bytes"), 0)
    broken: list[str] = []
    arrays: dict[str, list[np.ndarray]] = {}
    ids = IdCounter()
    out_schema = job.out_schema()
    made = [f"{name}.{job.format}"] if job.writes else []
    with ExitStack() as files:
        writer = None
        if job.writes:
            writer = PartWriter(job.folder, name, out_schema, job.format, compressed=not job.scratch)
            files.enter_context(writer)
        rejects = files.enter_context(Rejects(job, name, part.source, out_schema))
        for documents in _load(part, broken):
            counted["rows"] += documents.rows
            counted["empty"] += documents.empty
            counted["malformed"] += len(documents.rejected)
            counted["documents"] += documents.batch.num_rows
            counted["bytes"] += text_bytes(documents.batch)
            ids.add(documents.batch.column("id"))
            batch = run_steps(conform(documents.batch, job.schema), steps, part.source, tallies)
            rejects.take(documents.rejected, tallies)
            counted["kept_documents"] += batch.num_rows
            counted["kept_bytes"] += text_bytes(batch)
            if job.product is not None:
                for key, array in job.product(batch).items():
                    arrays.setdefault(key, []).append(array)
            if writer is not None:
                writer.write(conform(batch, out_schema))
        if removal is not None:
            removal.finish()
    if rejects.any:
        made.append(f"{REJECTED}/{name}.{job.format}")
    if job.product is not None:
        made += save_arrays(job.folder, job.product.name, name, arrays)
    state = {"number": part.number, "source": part.source, "key": part.key, "digest": digest, **counted}
    state |= {"broken": broken, "flow": [[tally.documents_in, tally.documents_out] for tally in tallies]}
    state["ids"] = ids.found()
    state["files"] = {file: found.size for file in made if (found := stat(job.folder.path(file)))}
    whole = {**state, "tallies": [tally.to_json() for tally in tallies]}
    job.folder.child(STATE).write(f"{name}.json", orjson.dumps(whole), durable=False)
    return state


def read_tallies(folder: Folder, number: int) -> list[Tally]:
    """The tallies of a part that is done."""
    content = folder.child(STATE).read(f"{part_name(number)}.json")
    assert content is not None
    return [Tally.from_json(data) for data in orjson.loads(content)["tallies"]]


def read_state(folder: Folder, number: int) -> dict[str, Any] | None:
    """The state of a part that was finished, if there is one and its files are there; without its tallies.

    A part's files are synced behind the last part only, so after a power cut a file may be shorter than its state says.
    """
    content = folder.child(STATE).read(f"{part_name(number)}.json")
    try:
        state: dict[str, Any] | None = orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return None
    for file, size in state["files"].items() if state else ():
        found = stat(folder.path(file))
        if found is None or found.size != size:
            return None
    if state:
        del state["tallies"]  # of many parts together they would fill the memory
    return state


def save_arrays(folder: Folder, product: str, name: str, arrays: dict[str, list[np.ndarray]]) -> list[str]:
    """Join arrays along their last axis, write `PRODUCT/NAME.KEY.npy` for each, and give these names."""
    made = []
    for key, found in arrays.items():
        made.append(f"{product}/{name}.{key}.npy")
        save_array(folder.child(product), f"{name}.{key}.npy", np.concatenate(found, axis=-1), durable=False)
    return made


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of `schema`, nulls where it lacks one."""
    if batch.schema.equals(schema):
        return batch
    found = {name: batch.column(name) for name in batch.schema.names}
    columns = [
        found[column.name].cast(column.type) if column.name in found else pa.nulls(batch.num_rows, column.type)
        for column in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class Rejects:
    """The rejected documents and malformed rows of a part; makes a file only if there are any."""

    def __init__(self, job: Job, name: str, source: str, out_schema: pa.Schema) -> None:
        self.folder, self.name, self.format, self.source = job.folder.child(REJECTED), name, job.format, source
        self.schema = pa.schema([*out_schema, *REASON_COLUMNS])
        self._files = ExitStack()
        self._writer: PartWriter | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if kind is None and self._writer is None:  # an earlier run with other options may have left one
            self.folder.remove(f"{self.name}.{self.format}")

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return self._writer is not None

    def take(self, malformed: Sequence[Rejected], tallies: Sequence[Tally]) -> None:
        """Write what a block and the steps that saw it have set aside."""
        if malformed:
            self._write(_malformed(malformed, self.source))
        for tally in tallies:
            for removed in tally.rejected:
                self._write(removed)
            tally.rejected.clear()

    def _write(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            self._writer = self._files.enter_context(PartWriter(self.folder, self.name, self.schema, self.format))
        self._writer.write(conform(batch, self.schema))


def _load(part: Part, broken: list[str]) -> Iterator[Documents]:
    for block in part.blocks:
        if block.broken:
            broken.append(block.broken)
        try:
            yield block.load()
        except BrokenInput as error:
            broken.append(str(error))


def _malformed(rows: Sequence[Rejected], source: str) -> pa.RecordBatch:
    columns = {
        "id": [f"{row.file}:{row.row}" for row in rows],
        "text": [row.excerpt for row in rows],
        "source": [source] * len(rows),
        "stage": ["read"] * len(rows),
        "rule": ["malformed"] * len(rows),
        "detail": [f"{row.file}, row {row.row:,}: {row.reason}" for row in rows],
    }
    return pa.RecordBatch.from_pydict({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _key(files: Sequence[Input], columns: Columns, begin: Position, end: Position) -> str:
    """Which rows of which files, read how: names, sources, sizes, times of change, border rows, columns."""
    touched = files[begin.input : end.input + (end.row > 0)]
    what = [[item.name, item.source, item.size, item.modified] for item in touched]
    return xxhash.xxh3_128_hexdigest(orjson.dumps([what, begin.row, end.row, list(columns)]))
