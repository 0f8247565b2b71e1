"""A fastText classifier as a rule: documents whose score for one label is too low, or too high, are removed.

Any supervised model does: DCLM's (OpenHermes 2.5 and ELI5 against web text; label `__label__hq`, kept from 0.018112 on,
about the best tenth of DCLM's pool), or one of `minigpt-prep train-classifier`. The score is the probability that
fastText gives to the label among all labels, of the whole text with line breaks as spaces; at most 1 (fastText adds
1e-5 inside its logarithm).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from prep.filters.fasttext_model import PREFIX, ModelFile, open_model, predict
from prep.stages import NOTHING_ADDED, Tally
from shards.errors import UserError, unknown_name
from shards.settings import Settings, validate


class ClassifierSettings(Settings):
    """A section `classifier` of a recipe.

    Attributes:
        model: path of a supervised fastText model.
        label: the label whose probability counts, with or without its prefix.
        low, high: smallest and largest score of a document that stays; at least one of them, or `column`.
        characters: how much of each document is looked at; 0: all.
        column: name of a column to write the score into.
    """

    model: str
    label: str
    low: float | None = Field(None, ge=0, le=1)
    high: float | None = Field(None, ge=0, le=1)
    characters: int = Field(0, ge=0)
    column: str | None = None

    @model_validator(mode="after")
    def _does_something(self) -> ClassifierSettings:
        if self.low is None and self.high is None and not self.column:
            raise ValueError("give `low` or `high`, the bounds of the score, or a `column` to write it into")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: no document would stay")
        return self


@dataclass(frozen=True)
class ClassifierStage:
    """Keeps documents by their score; the rules are `classifier.low` and `classifier.high`.

    Attributes:
        model: the model.
        label: as the model writes it, with its prefix.
        low, high: bounds of the score, both inclusive.
        characters: how much of each document is looked at; 0: all.
        column: a column to add with the score, float32; rejected documents have it too.
    """

    model: ModelFile
    label: str
    low: float | None = None
    high: float | None = None
    characters: int = 0
    column: str | None = None
    name: str = "classifier"
    adds: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        adds = pa.schema([(self.column, pa.float32())]) if self.column else NOTHING_ADDED
        object.__setattr__(self, "adds", adds)

    def describe(self) -> dict[str, Any]:
        """Options and the digest of the model."""
        options = ("label", "low", "high", "characters", "column")
        return {**self.model.describe(), **{name: getattr(self, name) for name in options}}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents whose score lies within the bounds."""
        scores = self.scores(batch.column("text"))
        if self.column:
            if self.column in batch.schema.names:
                raise UserError(f"{self.name}: the documents already have a column '{self.column}'; choose another")
            batch = batch.append_column(self.column, pa.array(scores))
        tally.histogram("classifier_score", scores, unit="score", low=self.low, high=self.high)
        keep = np.ones(len(scores), bool)
        for rule, bound, broken in (
            ("classifier.low", self.low, scores < np.float32(self.low or 0)),
            ("classifier.high", self.high, scores > np.float32(1 if self.high is None else self.high)),
        ):
            if bound is not None:
                tally.reject(batch, keep & broken, rule, value=scores, threshold=bound)
                keep &= ~broken
        return batch if keep.all() else batch.filter(pa.array(keep))

    def scores(self, texts: pa.Array) -> np.ndarray:
        """The probability of the label, float32 [n]."""
        labels, probabilities = predict(self.model, texts, self.characters, len(self.model.labels))
        # a label that fastText leaves out has a probability of nothing
        scores = [
            row[names.index(self.label)] if self.label in names else 0.0
            for names, row in zip(labels, probabilities, strict=True)
        ]
        return np.minimum(np.array(scores, np.float32), np.float32(1))


def build(settings: dict[str, Any], where: str) -> ClassifierStage:
    """The stage of a recipe's section `classifier`.

    Args:
        settings: the section.
        where: its place, for messages.

    Raises:
        UserError: a wrong setting, no such model, or a label that the model does not have, with the nearest it has.
    """
    checked = validate(ClassifierSettings, settings, where)
    model = open_model(checked.model, f"{where}: model")
    label = checked.label if checked.label in model.labels else PREFIX + checked.label.removeprefix(PREFIX)
    if label not in model.labels:
        known = [name.removeprefix(PREFIX) for name in model.labels]
        problem = unknown_name("label", checked.label.removeprefix(PREFIX), known)
        raise UserError(f"{where}: label: {problem} ({model.path.name} has {', '.join(known[:20])})")
    return ClassifierStage(model, label, checked.low, checked.high, checked.characters, checked.column)
