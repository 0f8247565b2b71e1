"""Rules: named bounds on statistics. A document goes with the first rule that it breaks.

The values that rules look at can be kept as columns of the documents (`--stats-only`), so that thresholds can be tried
without measuring again: column `gopher_quality.word_count@1` holds the values of that rule under version 1 of its
statistic, measured on the text of the row. A suffix (`@1.3fa2b6c1`) names the cleaning that the text goes through
before it is measured, or several; once it has gone through them, these are the values of the text of the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from prep.stages import NOTHING_ADDED, Stage, Tally, Unit, replace_text
from shards.errors import UserError, unknown_name
from shards.settings import Settings

if TYPE_CHECKING:
    from prep.filters.measures import Values


@dataclass(frozen=True)
class Rule:
    """A bound, or for rules on lines perhaps only a switch.

    Attributes:
        name: "gopher_quality.word_count".
        statistic: what is bounded: of `measures.STATISTICS`, or what the cleaner of the step gives; "" for rules on
            single lines, which the cleaner applies.
        low: the smallest value that stays, if there is one.
        high: the largest value that stays, if there is one.
        source: where the bounds come from.
        active: whether it is applied.
    """

    name: str
    statistic: str = ""
    low: float | None = None
    high: float | None = None
    source: str = ""
    active: bool = True

    @property
    def part(self) -> str:
        """The name without its step."""
        return self.name.partition(".")[2]

    @property
    def on_lines(self) -> bool:
        """Whether it looks at single lines."""
        return not self.statistic

    def breaks(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which values lie below the lower bound, and which above the upper; bool [n] each."""
        nothing = np.zeros(len(values), bool)
        return nothing if self.low is None else values < self.low, nothing if self.high is None else values > self.high


class Bounds(Settings):
    """New bounds of a rule; one that is not named stays, null takes it away."""

    low: float | None = Field(default=None, allow_inf_nan=False)
    high: float | None = Field(default=None, allow_inf_nan=False)


Override = bool | Bounds


def override(rules: Sequence[Rule], changes: Mapping[str, Override], where: str) -> tuple[Rule, ...]:
    """Rules with other bounds, switched off (`false`) or on (`true`).

    Args:
        rules: all rules of the stages.
        changes: by the name of the rule.
        where: the file or option, for messages.

    Raises:
        UserError: a name that no rule has, or a bound that its rule cannot have.
    """
    names = [rule.name for rule in rules]
    for name in changes:
        if name not in names:
            raise UserError(f"{where}: rules: {unknown_name('rule', name, names)}")
    return tuple(_changed(rule, changes[rule.name], where) if rule.name in changes else rule for rule in rules)


def _changed(rule: Rule, change: Override, where: str) -> Rule:
    if isinstance(change, bool):
        if change and not rule.on_lines and rule.low is None and rule.high is None:
            raise UserError(f"{where}: rules.{rule.name}: it has no bound of its own; give low or high, not true")
        return replace(rule, active=change)
    bounds = {name: getattr(change, name) for name in change.model_fields_set}
    for name in bounds:
        if rule.on_lines and getattr(rule, name) is None:
            known = [name for name in ("low", "high") if getattr(rule, name) is not None]
            hint = f"only {known[0]}" if known else "only true or false"
            raise UserError(f"{where}: rules.{rule.name}: {name} means nothing for it; give {hint}")
    new = replace(rule, active=True, **bounds)
    if new.low is not None and new.high is not None and new.low > new.high:
        raise UserError(f"{where}: rules.{rule.name}: low {new.low} is above high {new.high}: nothing would stay")
    return new


def column_name(rule: Rule, behind: str = "") -> str:
    """The column that keeps the values of a rule, as the module's docstring has it; `behind` names the cleanings."""
    from prep.filters.measures import STATISTICS

    version = STATISTICS[rule.statistic].version if rule.statistic in STATISTICS else 1
    return f"{rule.name}@{version}" + (f".{behind}" if behind else "")


def _rejections(
    batch: pa.RecordBatch, values: Mapping[str, np.ndarray], rules: Sequence[Rule], tally: Tally
) -> np.ndarray:
    """Tell the tally which documents break which rule first; which ones stay, bool [n]."""
    left = np.ones(batch.num_rows, bool)
    for rule in _on_documents(rules):
        value = values[rule.name]
        tally.histogram(rule.name, value, unit=_unit(rule), low=rule.low, high=rule.high)
        for broken, bound in zip(rule.breaks(value), (rule.low, rule.high), strict=True):
            tally.reject(batch, broken & left, rule.name, value=value, threshold=bound)
            left &= ~broken
    return left


def _unit(rule: Rule) -> Unit:
    from prep.filters.measures import STATISTICS

    if rule.statistic in STATISTICS:
        return STATISTICS[rule.statistic].unit
    return "share" if rule.statistic == "words_removed" else "count"


@dataclass(frozen=True)
class FilterStage:
    """Applies rules to documents.

    Attributes:
        name: its name in the funnel.
        rules: in their order; only active ones without "on lines".
        behind: names the cleanings that the text went through in this chain of stages, with dots; "" for none.
    """

    name: str
    rules: tuple[Rule, ...]
    behind: str = ""

    @property
    def adds(self) -> pa.Schema:
        """Nothing."""
        return NOTHING_ADDED

    @property
    def leaves(self) -> str:
        """What stages behind it have as `behind`."""
        return self.behind

    def describe(self) -> dict[str, Any]:
        """Rules, and the version of every statistic."""
        columns = [column_name(rule, self.behind) for rule in self.rules if rule.active]
        return {"stage": "filter", "rules": _described(self.rules), "columns": columns}

    def measure(self, batch: pa.RecordBatch) -> Values:
        """Values of the active rules by rule; kept columns without nulls are taken as they are."""
        from prep.filters.measures import statistics

        active = [rule for rule in self.rules if rule.active]
        found: Values = {}
        for rule in active:
            place = batch.schema.get_field_index(column_name(rule))
            if place >= 0 and batch.column(place).null_count == 0:
                found[rule.name] = batch.column(place).to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
        missing = [rule for rule in active if rule.name not in found]
        measured = statistics(batch, [rule.statistic for rule in missing])
        return found | {rule.name: measured[rule.statistic] for rule in missing}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents that break no rule."""
        if batch.num_rows == 0:
            return batch
        left = _rejections(batch, self.measure(batch), self.rules, tally)
        return batch if left.all() else batch.filter(pa.array(left))


@dataclass(frozen=True)
class CleanStage:
    """Cleans the lines of documents, and applies rules to what the cleaning found.

    Attributes:
        name: its name in the funnel.
        cleaner: of `lines.CLEANERS`.
        rules: rules on lines, and on documents.
        behind: as in FilterStage, for the text that comes in.
    """

    name: str
    cleaner: str
    rules: tuple[Rule, ...]
    behind: str = ""
    version: int = 1

    @property
    def adds(self) -> pa.Schema:
        """Nothing."""
        return NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Rules, cleaner and its version."""
        return {
            "stage": "clean",
            "cleaner": self.cleaner,
            "version": self.version,
            "behind": self.behind,
            "rules": _described(self.rules),
        }

    @property
    def digest(self) -> str:
        """Names this cleaning: 8 hexadecimal digits of a hash of all that decides how it changes a text."""
        lines = _described([rule for rule in self.rules if rule.on_lines])
        text = json.dumps([self.cleaner, self.version, lines], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def leaves(self) -> str:
        """What stages behind it have as `behind`."""
        return f"{self.behind}.{self.digest}" if self.behind else self.digest

    def clean(self, texts: pa.Array) -> tuple[pa.Array, Values, dict[str, int]]:
        """The cleaned column, values of the document rules, and counts."""
        from prep.filters.lines import CLEANERS

        active = {rule.part: _range(rule) for rule in self.rules if rule.on_lines and rule.active}
        cleaned = CLEANERS[self.cleaner](texts, active)
        documents = [rule for rule in self.rules if not rule.on_lines]
        return cleaned.texts, {rule.name: cleaned.statistics[rule.statistic] for rule in documents}, cleaned.counts

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents that stay, cleaned; one of which nothing is left goes with the rule STEP.nothing_left."""
        if batch.num_rows == 0:
            return batch
        before = batch.column("text")
        texts, values, counts = self.clean(before)
        for name, number in counts.items():
            tally.count(name, number)
        left = _rejections(batch, values, self.rules, tally)
        empty = pc.equal(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False) & left
        tally.reject(batch, empty, f"{self.name}.nothing_left")
        left &= ~empty
        batch = replace_text(batch, texts, self.digest)
        return batch if left.all() else batch.filter(pa.array(left))


def _range(rule: Rule) -> tuple[float, float]:
    return (-np.inf if rule.low is None else rule.low, np.inf if rule.high is None else rule.high)


def _on_documents(rules: Sequence[Rule]) -> list[Rule]:
    return [rule for rule in rules if rule.active and not rule.on_lines]


def _described(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(rule).items() if name != "source"} for rule in rules if rule.active]


@dataclass(frozen=True)
class MeasureStage:
    """Adds the values of all rules of a chain of stages as columns, and removes and changes nothing (`--stats-only`).

    Statistics behind a cleaning are those of the cleaned text, as the stages themselves would see it.

    Attributes:
        stages: FilterStages and CleanStages; others have no statistics, and behind them texts would be other ones.
    """

    stages: tuple[Stage, ...]
    name: str = "statistics"

    def __post_init__(self) -> None:
        if others := [stage.name for stage in self.stages if not isinstance(stage, FilterStage | CleanStage)]:
            raise ValueError(f"stages without statistics: {', '.join(others)}")

    @property
    def _chain(self) -> list[FilterStage | CleanStage]:
        return [stage for stage in self.stages if isinstance(stage, FilterStage | CleanStage)]

    @property
    def _rules(self) -> list[tuple[Rule, str]]:
        return [(rule, stage.leaves) for stage in self._chain for rule in _on_documents(stage.rules)]

    @property
    def adds(self) -> pa.Schema:
        """A float64 column for each rule, `NAME@VERSION`."""
        names = dict.fromkeys(column_name(rule, behind) for rule, behind in self._rules)
        return pa.schema([(name, pa.float64()) for name in names])

    def describe(self) -> dict[str, Any]:
        """The columns."""
        return {"stage": "measure", "columns": self.adds.names}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """All documents, with the columns; those of them that were there already are made anew."""
        values: Values = {}
        current = batch
        for stage in self._chain:
            if isinstance(stage, FilterStage):
                found = stage.measure(current)
            else:
                texts, found, _ = stage.clean(current.column("text"))
                current = replace_text(current, texts, stage.digest)
            for rule in _on_documents(stage.rules):
                values[column_name(rule, stage.leaves)] = found[rule.name]
                tally.histogram(rule.name, found[rule.name], unit=_unit(rule), low=rule.low, high=rule.high)
        batch = batch.select([name for name in batch.schema.names if name not in values])
        schema = pa.schema([*batch.schema, *self.adds])
        columns = [pa.array(values[name], pa.float64()) for name in self.adds.names]
        return pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema)
