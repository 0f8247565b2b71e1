"""What a deduplication does to each part: arrays that the decisions are made from, and the removal itself.

All are picklable and know documents by their place: the number of the part and the row in it. So the parts of the pass
that removes must hold the same documents, in the same order, as those of the pass that made the arrays. Each stage
knows how many documents (or units) those were, and stops the run where a part has others: a file may have been written
anew in between, or what could not be read the first time can be now.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from prep.arrays import load_array
from prep.dedup.exact import make_digests
from prep.dedup.minhash import SHINGLE_WORDS, make_band_keys, make_shingles, make_signatures, permutations
from prep.dedup.paragraphs import cut_units, split_units, unit_hashes
from prep.dedup.settings import VERSION, DedupSettings
from prep.parts import part_name
from prep.stages import NOTHING_ADDED, Tally, replace_text
from prep.storage import Folder
from shards.errors import UserError

STAGE = "dedup"
END_OF_ID = 0xFF  # no byte of UTF-8
DIGEST_ROWS = 2
DOCUMENTS = b"documents"  # in the metadata of decisions: how many documents the part had
SIGNATURES, UNITS, SHINGLES = "signatures", "units", "shingles"


@dataclass
class Signatures:
    """Product of the pass before exact or MinHash deduplication.

    Arrays of n documents: hashes, uint64 [2 + bands, n], the digest in rows 0 and 1, then, for MinHash, the band keys;
    best, float64 [n], unless the first document stays or they are not `ranked` (those of a reference); ids, uint8, the
    UTF-8 bytes of each and then END_OF_ID.
    """

    settings: DedupSettings
    ranked: bool = True
    name: str = SIGNATURES

    def describe(self) -> dict[str, Any]:
        """All that the arrays depend on; the threshold is not among it."""
        left_out = {"threshold"} if self.ranked else {"threshold", "keep"}
        what = {name: value for name, value in self.settings.describe().items() if name not in left_out}
        return {**what, "shingle_words": SHINGLE_WORDS}

    def __call__(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Arrays of a batch."""
        texts = batch.column("text")
        found = {"hashes": make_digests(texts), "ids": _ids(batch.column("id"))}
        if self.settings.method == "minhash":
            used = self.settings.bands * self.settings.rows
            parameters = permutations(self.settings.hashes, self.settings.seed)[:, :used]  # the rest is in no band
            signatures = make_signatures(texts, parameters)
            keys = make_band_keys(signatures, self.settings.bands, self.settings.rows)
            found["hashes"] = np.concatenate([found["hashes"], keys])
        if self.ranked and self.settings.keep != "first":
            found["best"] = _best(batch, self.settings)
        return found


@dataclass
class UnitHashes:
    """Product of the pass before paragraphs or lines are cut: hashes, uint64 [units that are long enough]."""

    settings: DedupSettings
    name: str = UNITS

    def describe(self) -> dict[str, Any]:
        """All that the hashes depend on."""
        what = self.settings.describe()
        what.pop("max_cut")
        return what

    def __call__(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Hashes of a batch."""
        level = self.settings.level
        assert level is not None
        return {"hashes": unit_hashes(batch.column("text"), level, self.settings.min_characters)}


@dataclass
class Shingles:
    """Product of the pass over the candidates: hashes, uint64, of one document after the other; sizes, int64 [n]."""

    name: str = SHINGLES

    def describe(self) -> dict[str, Any]:
        """All that the hashes depend on."""
        return {"version": VERSION, "shingle_words": SHINGLE_WORDS}

    def __call__(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Shingles of a batch."""
        hashes, ends = make_shingles(batch.column("text"))
        return {"hashes": hashes, "sizes": np.diff(ends)}


@dataclass
class ChooseRows:
    """Stage that lets through the documents of a part whose rows stand in `part-N.npy` of a folder.

    The rows are sorted; behind them stands how many documents the part has.
    """

    part: int
    folder: Folder
    name: str = "candidates"
    adds: pa.Schema = NOTHING_ADDED
    _rows: np.ndarray | None = field(default=None, repr=False)
    _at: int = 0

    def describe(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The chosen documents."""
        rows = self._load()
        self._at += batch.num_rows
        _check_place(self.part, self._at, rows[-1], "documents")
        begin = self._at - batch.num_rows
        first, last = np.searchsorted(rows[:-1], [begin, self._at])
        return batch.take(pa.array(rows[first:last] - begin))

    def finish(self) -> None:
        """Called behind the last batch."""
        _check_place(self.part, self._at, self._load()[-1], "documents", ended=True)

    def _load(self) -> np.ndarray:
        if self._rows is None:
            self._rows = load_array(self.folder, f"{part_name(self.part)}.npy")
        return self._rows


@dataclass
class RemoveDuplicates:
    """Stage that removes the documents of a part that `part-N.parquet` of a folder names (see `write_decisions`)."""

    part: int
    folder: Folder
    threshold: float
    name: str = STAGE
    adds: pa.Schema = NOTHING_ADDED
    _decisions: pa.Table | None = field(default=None, repr=False)
    _at: int = 0

    def describe(self) -> dict[str, Any]:
        """Nothing of its own: the digest of the decisions stands in the pass's."""
        return {}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents that stay."""
        decisions, documents = self._load()
        self._at += batch.num_rows
        _check_place(self.part, self._at, documents, "documents")
        begin = self._at - batch.num_rows
        first, last = np.searchsorted(decisions.column("row").to_numpy(), [begin, self._at])
        found = decisions.slice(first, last - first)
        rows = found.column("row").to_numpy() - begin
        if not len(rows):
            return batch
        if found.column("id").combine_chunks() != batch.column("id").take(pa.array(rows)).cast(pa.string()):
            raise changed(f"part {self.part} holds other documents than before")
        similarity = np.ones(batch.num_rows)
        similarity[rows] = found.column("similarity").to_numpy()
        keeper = np.full(batch.num_rows, None, object)
        keeper[rows] = found.column("keeper").to_numpy(zero_copy_only=False)
        stays = np.ones(batch.num_rows, bool)
        stays[rows] = False
        for method, threshold in (("exact", None), ("minhash", self.threshold)):
            chosen = np.zeros(batch.num_rows, bool)
            chosen[rows] = pc.equal(found.column("method"), method).to_numpy()
            tally.reject(
                batch,
                chosen,
                method,
                value=similarity,
                threshold=threshold,
                keeper=keeper.tolist(),
                similarity=similarity,
            )
        return batch.filter(pa.array(stays))

    def finish(self) -> None:
        """Called behind the last batch."""
        _check_place(self.part, self._at, self._load()[1], "documents", ended=True)

    def _load(self) -> tuple[pa.Table, int]:
        """What goes, and how many documents there are."""
        if self._decisions is None:
            name = f"{part_name(self.part)}.parquet"
            content = self.folder.read(name)
            if content is None:
                raise UserError(f"{self.folder.path(name)}: missing; {_AGAIN}")
            self._decisions = pyarrow.parquet.read_table(io.BytesIO(content))
        return self._decisions, int(self._decisions.schema.metadata[DOCUMENTS])


@dataclass
class CutRepeats:
    """Stage that cuts repeated units, as `part-N.npy` of a folder says: bool, for each unit that is long enough."""

    part: int
    folder: Folder
    settings: DedupSettings
    name: str = STAGE
    adds: pa.Schema = NOTHING_ADDED
    _repeated: np.ndarray | None = field(default=None, repr=False)
    _at: int = 0

    def describe(self) -> dict[str, Any]:
        """Options."""
        return self.settings.describe()

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents that stay, without their repeated units."""
        level, texts, repeated = self.settings.level, batch.column("text"), self._load()
        assert level is not None
        units = split_units(texts, level)
        gone = units.characters >= self.settings.min_characters  # those that have a place among the hashes
        begin = self._at
        self._at += int(np.count_nonzero(gone))
        _check_place(self.part, self._at, len(repeated), f"long {level}s")
        gone[gone] = repeated[begin : self._at]
        if not gone.any():
            return batch
        cut = cut_units(texts, units, gone)
        tally.count(f"{level}s.cut", int(cut.units.sum()))
        empty = pc.equal(pc.binary_length(cut.texts), 0).to_numpy(zero_copy_only=False)
        dropped = (cut.share > self.settings.max_cut) | (empty & (cut.units > 0))
        tally.reject(batch, dropped, level, value=cut.share, threshold=self.settings.max_cut)
        return replace_text(batch, cut.texts).filter(pa.array(~dropped))

    def finish(self) -> None:
        """Called behind the last batch."""
        _check_place(self.part, self._at, len(self._load()), f"long {self.settings.level}s", ended=True)

    def _load(self) -> np.ndarray:
        if self._repeated is None:
            self._repeated = load_array(self.folder, f"{part_name(self.part)}.npy")
        return self._repeated


DECISIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("method", pa.string()),
        ("keeper", pa.string()),
        ("keeper_source", pa.string()),
        ("similarity", pa.float64()),
    ]
)
_AGAIN = "run it again, with an empty folder for the result if that does not help"


def changed(what: str) -> UserError:
    """The error of a pass that sees other documents than the one before."""
    return UserError(f"dedup: the input changed while the run went on ({what}); {_AGAIN}")


def read_ids(array: np.ndarray) -> pa.Array:
    """The ids in an array of `Signatures`, as large_string."""
    stops = np.flatnonzero(array == END_OF_ID)
    ends = np.concatenate([[0], stops - np.arange(len(stops))]).astype(np.int64)
    return pa.LargeStringArray.from_buffers(len(stops), pa.py_buffer(ends), pa.py_buffer(array[array != END_OF_ID]))


def _check_place(part: int, found: int, expected: int, what: str, *, ended: bool = False) -> None:
    """Compare what a part has held so far, or in all, with what it held in the pass before."""
    if found > expected or (ended and found < expected):
        raise changed(f"part {part} has {found:,} {what}{'' if ended else ' or more'}, before {expected:,}")


def _ids(ids: pa.Array) -> np.ndarray:
    plain = ids.cast(pa.binary())
    _, borders, data = plain.buffers()
    ends = np.frombuffer(borders, np.int32)[plain.offset : plain.offset + len(plain) + 1]
    raw = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    found = np.full(ends[-1] - ends[0] + len(plain), END_OF_ID, np.uint8)
    number = np.repeat(np.arange(len(plain)), np.diff(ends))  # of the id that a byte belongs to
    found[np.arange(len(number)) + number] = raw[ends[0] : ends[-1]]
    return found


def _best(batch: pa.RecordBatch, settings: DedupSettings) -> np.ndarray:
    """What the keeper policy compares, float64; NaN where it is null."""
    if settings.column is None:
        return pc.binary_length(batch.column("text")).to_numpy().astype(np.float64)
    index = batch.schema.get_field_index(settings.column)
    if index < 0:
        known = [name for name in batch.schema.names if name not in ("id", "text", "source")]
        raise UserError(f"dedup: keep: the documents have no column '{settings.column}' (they have {known or 'none'})")
    column = batch.column(index)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise UserError(f"dedup: keep: column '{settings.column}' is {column.type}; its values must be numbers")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    return column.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy(zero_copy_only=False)
