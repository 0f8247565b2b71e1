"""What a stage of the preparation is: a pure function of a batch of documents, and the tally of what it did.

Stages that look at one document at a time run one after the other over each part of the input, in one pass. A stage
gives back the documents that stay and tells its `Tally` which ones go, and why. Tallies of parts merge into the tally
of the run, so a report costs nothing and does not depend on who worked through which part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Unit = Literal["share", "count", "score"]
BINS = 50
COUNT_BINS = 128  # quarters of an octave up to 2^32
SAMPLES_PER_RULE = 3
EXCERPT_CHARACTERS = 600
# A column with the values of a rule (see `prep.filters.rules`), and the cleanings behind which they were measured.
STATISTIC = re.compile(r"(?P<measured>\w+\.\w+@\d+)(?P<cleanings>(\.[0-9a-f]{8})*)")

# What a rejected document has beside its own columns: the stage and rule that removed it, the measured value and the
# bound that it broke, more words where they help; for duplicates the document that stays, and the similarity to it.
REASON_COLUMNS = pa.schema(
    [
        ("stage", pa.string()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("detail", pa.string()),
        ("keeper", pa.string()),
        ("similarity", pa.float64()),
    ]
)


class Stage(Protocol):
    """A pure function of a batch, which may be empty; picklable; models load at the first call in a process."""

    @property
    def name(self) -> str:
        """Its name in the funnel."""
        ...

    @property
    def adds(self) -> pa.Schema:
        """The columns that it adds to a batch, behind those that are there; for most stages none."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the output depends on, as JSON: options, versions, digests of models and lists."""
        ...

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents that stay, in their order, their text changed or not."""
        ...


NOTHING_ADDED = pa.schema([])


class Product(Protocol):
    """What a pass computes for each part beside its documents, such as signatures; picklable."""

    @property
    def name(self) -> str:
        """Of the folder below the stage's folder; array KEY of part 0 is the file NAME/part-00000.KEY.npy."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the arrays depend on, as JSON."""
        ...

    def __call__(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """Arrays whose last axis is the documents of the batch; they are joined along it over the part."""
        ...


@dataclass
class Histogram:
    """Counts over fixed bins: of [0, 1] for shares and scores, of log2(1 + value) in quarters for counts."""

    unit: Unit
    low: float | None
    high: float | None
    counts: list[int]

    def edges(self) -> list[float]:
        """Borders of the bins, one more than there are bins."""
        if self.unit == "count":
            return [2.0 ** (number / 4) - 1 for number in range(len(self.counts) + 1)]
        return [number / BINS for number in range(BINS + 1)]


@dataclass
class Tally:
    """What one stage did to the documents that it saw.

    Attributes:
        stage: name of the stage.
        documents_in, bytes_in, documents_out, bytes_out: what came in and what stayed; bytes of UTF-8 text.
        rules: rule -> [documents, bytes] that it removed, in the order in which rules first removed something.
        counts: whatever else was counted.
        histograms: statistic -> its distribution over the documents that came in.
        samples: rule -> the first documents that it removed, for the report.
        sets: name -> distinct numbers seen, such as the items of a benchmark that were found.
        rejected: the removed documents of the part that is being worked on, with REASON_COLUMNS; not part of the JSON.
    """

    stage: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    rules: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sets: dict[str, set[int]] = field(default_factory=dict)
    rejected: list[pa.RecordBatch] = field(default_factory=list, repr=False)

    def reject(
        self,
        batch: pa.RecordBatch,
        chosen: np.ndarray,
        rule: str,
        *,
        value: np.ndarray | float | None = None,
        threshold: float | None = None,
        detail: Sequence[str | None] | str | None = None,
        keeper: Sequence[str | None] | None = None,
        similarity: np.ndarray | None = None,
    ) -> None:
        """Record that `rule` removes documents.

        Args:
            batch: the documents, n of them.
            chosen: which of them, bool [n].
            rule: its name.
            value: what was measured, [n] or one number for all.
            threshold: the bound that was broken.
            detail: more words, [n] or one text for all.
            keeper: ids of the documents that stay in their place, [n].
            similarity: to the keepers, [n].
        """
        if not chosen.any():
            return
        removed = batch.filter(pa.array(chosen))
        rows = removed.num_rows

        def column(given: Any, kind: pa.DataType) -> pa.Array:
            if given is None or isinstance(given, str | int | float):
                return pa.repeat(pa.scalar(given, kind), rows)
            if isinstance(given, np.ndarray):
                return pa.array(given[chosen], kind)
            return pa.array([given[index] for index in np.flatnonzero(chosen)], kind)

        given = (self.stage, rule, value, threshold, detail, keeper, similarity)
        reasons = [column(what, kind.type) for what, kind in zip(given, REASON_COLUMNS, strict=True)]
        schema = pa.schema([*removed.schema, *REASON_COLUMNS])
        self.rejected.append(pa.RecordBatch.from_arrays([*removed.columns, *reasons], schema=schema))
        entry = self.rules.setdefault(rule, [0, 0])
        entry[0] += rows
        entry[1] += text_bytes(removed)
        kept = self.samples.setdefault(rule, [])
        for row in self.rejected[-1].slice(0, SAMPLES_PER_RULE - len(kept)).to_pylist():
            kept.append(_sample(row))

    def count(self, name: str, number: int) -> None:
        """Add to a count."""
        if number:
            self.counts[name] = self.counts.get(name, 0) + int(number)

    def histogram(
        self, name: str, values: np.ndarray, *, unit: Unit, low: float | None = None, high: float | None = None
    ) -> None:
        """Add values of a statistic, [n]; what lies outside of the bins goes to the first or the last."""
        bins = COUNT_BINS if unit == "count" else BINS
        place = 4 * np.log2(1 + np.maximum(values, 0)) if unit == "count" else values * BINS
        found = np.bincount(np.clip(np.nan_to_num(place), 0, bins - 1).astype(np.int64), minlength=bins)
        known = self.histograms.setdefault(name, Histogram(unit, low, high, [0] * bins))
        known.counts = (np.array(known.counts) + found).tolist()

    def merge(self, other: Tally) -> None:
        """Add the tally of a later part."""
        for name in ("documents_in", "bytes_in", "documents_out", "bytes_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for rule, numbers in other.rules.items():
            self.rules[rule] = [a + b for a, b in zip(self.rules.get(rule, [0, 0]), numbers, strict=True)]
        for name, number in other.counts.items():
            self.count(name, number)
        for name, histogram in other.histograms.items():
            known = self.histograms.setdefault(
                name, Histogram(histogram.unit, histogram.low, histogram.high, [0] * len(histogram.counts))
            )
            known.counts = [a + b for a, b in zip(known.counts, histogram.counts, strict=True)]
        for rule, samples in other.samples.items():
            known_samples = self.samples.setdefault(rule, [])
            known_samples += samples[: SAMPLES_PER_RULE - len(known_samples)]
        for name, numbers_seen in other.sets.items():
            self.sets.setdefault(name, set()).update(numbers_seen)

    def to_json(self) -> dict[str, Any]:
        """Everything but the rejected documents themselves."""
        return {
            "stage": self.stage,
            "documents_in": self.documents_in,
            "bytes_in": self.bytes_in,
            "documents_out": self.documents_out,
            "bytes_out": self.bytes_out,
            "rules": self.rules,
            "counts": self.counts,
            "histograms": {name: vars(histogram) for name, histogram in self.histograms.items()},
            "samples": self.samples,
            "sets": {name: sorted(numbers) for name, numbers in self.sets.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Tally:
        """The tally that `to_json` wrote."""
        histograms = {name: Histogram(**histogram) for name, histogram in data["histograms"].items()}
        sets = {name: set(numbers) for name, numbers in data["sets"].items()}
        return cls(**{**data, "histograms": histograms, "sets": sets})


class Step(NamedTuple):
    """A stage of a pass, and the sources whose documents go through it (None: all)."""

    stage: Stage
    sources: tuple[str, ...] | None = None

    def applies(self, source: str) -> bool:
        """Whether the documents of a source go through it."""
        return self.sources is None or source in self.sources


def run_steps(batch: pa.RecordBatch, steps: Sequence[Step], source: str, tallies: Sequence[Tally]) -> pa.RecordBatch:
    """Run documents of one source through the steps, each of which sees what the one before it left.

    A tally counts the documents that pass a step by as well, so that a funnel over all sources adds up.
    """
    for step, tally in zip(steps, tallies, strict=True):
        tally.documents_in += batch.num_rows
        tally.bytes_in += text_bytes(batch)
        if step.applies(source):
            batch = step.stage(batch, tally)
        tally.documents_out += batch.num_rows
        tally.bytes_out += text_bytes(batch)
    return batch


def text_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of text in a batch."""
    return pc.sum(pc.binary_length(batch.column("text"))).as_py() or 0


def replace_text(batch: pa.RecordBatch, texts: pa.Array, cleaning: str = "") -> pa.RecordBatch:
    """The batch with other texts; statistics that were kept of a text that has changed become null.

    Args:
        batch: documents.
        texts: their new texts.
        cleaning: what made them, if statistics may have been kept of what it makes: `rule.name@1.CLEANING` now holds
            for the texts themselves, and so becomes the column `rule.name@1`.
    """
    changed = pc.not_equal(batch.column("text"), texts)
    names = [column.name for column in batch.schema]
    result = batch.set_column(names.index("text"), "text", texts)
    for name, kept in zip(names, batch.columns, strict=True):
        if STATISTIC.fullmatch(name):
            forgotten = pc.if_else(changed, pa.scalar(None, kept.type), kept)
            result = result.set_column(names.index(name), name, forgotten)
    for name, kept in zip(names, batch.columns, strict=True) if cleaning else ():
        found = STATISTIC.fullmatch(name)
        if found and (found["cleanings"] + ".").startswith(f".{cleaning}."):
            now = found["measured"] + found["cleanings"].removeprefix(f".{cleaning}")
            place = result.schema.get_field_index(now)
            if place < 0:
                result = result.append_column(now, kept)
            else:
                result = result.set_column(place, now, pc.coalesce(kept, result.column(place)))
    return result


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    text = row["text"]
    excerpt = text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + " …"
    names = ("rule", "id", "source", "value", "threshold", "detail", "keeper", "similarity")
    return {name: row[name] for name in names} | {"excerpt": excerpt}
