"""Recipes: one YAML file from sources through stages to token shards.

    name: web
    output: ${MINIGPT_DATA:-data}/web
    sources:
      - {name: crawl, path: "crawl/*.parquet", columns: [url]}
      - {name: books, path: [books.jsonl.zst, more/], text_column: content}
    stages:
      - language: {languages: {en: 0.65}}
      - filter: {preset: fineweb, sources: [crawl]}        # `sources`: only their documents go through this stage
      - dedup: {method: minhash}
      - decontaminate: {against: [gsm8k-test.jsonl]}
      - tokenize: {tokenizer: tokenizer.json, val_fraction: 0.001, datasets: {web: [crawl], books: [books]}}

It ends in `OUTPUT/documents` (clean documents), `OUTPUT/NAME` (a token dataset for each source, or for each name of
`datasets`) and `OUTPUT/report.html`. Values may hold `${NAME}` or `${NAME:-default}`; paths start at the current
folder.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from prep.dedup.settings import DedupSettings
from prep.documents import Columns
from prep.part_writer import Format
from prep.parts import Files
from prep.pipeline import DedupStep, GuardedStep, Work
from prep.sources import check_inputs, find_inputs
from prep.stage_folder import Limits
from prep.stage_manifest import DOCUMENTS, find_documents, kept_columns
from prep.stages import Stage, Step
from prep.storage import Folder
from shards.errors import UserError, unknown_name
from shards.format import DEFAULT_SHARD_TOKENS
from shards.settings import Settings, expand_variables, load_yaml, validate

MAX_REMOVED = 0.5
PLAIN = Columns()
BETWEEN = "before-dedup"
_RESERVED = (DOCUMENTS, BETWEEN)


class SourceSettings(Settings):
    """A source: files, globs, folders or addresses, and how to read them; `columns` are kept beside text and id."""

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    path: str | list[str]
    text_column: str = "text"
    id_column: str | None = None
    columns: list[str] = Field(default_factory=list)

    def columns_read(self) -> Columns:
        """How its files are read."""
        return Columns(self.text_column, self.id_column, tuple(self.columns))


class TokenizeSettings(Settings):
    """The last stage: token datasets, by name, each of some sources (default: one for each source)."""

    tokenizer: str
    eos: str | None = None
    bos: str | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    val_fraction: float = 0.0
    datasets: dict[str, list[str]] | None = None


class DedupSection(DedupSettings):
    """A deduplication; `reference` names documents that none may repeat."""

    reference: list[str] = Field(default_factory=list)


class RecipeFile(Settings):
    """A recipe as it stands in its file; `max_bad_rows` as on the command line."""

    name: str = Field(min_length=1)
    output: str
    sources: list[SourceSettings] = Field(min_length=1)
    stages: list[dict[str, Any]] = Field(min_length=1)
    format: Format = "parquet"
    max_bad_rows: float = Field(0.001, ge=0, le=1)

    @field_validator("stages", mode="before")
    @classmethod
    def _one_key_each(cls, value: Any) -> Any:
        """`- dedup` stands for `- dedup: {}`."""
        stages = [{item: {}} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        for item in stages if isinstance(stages, list) else []:
            if not isinstance(item, dict) or len(item) != 1:
                raise ValueError(f"each stage is one `name: {{settings}}`, not {item!r}")
        return stages

    @model_validator(mode="after")
    def _names(self) -> RecipeFile:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources: names come twice among {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Recipe:
    """A recipe whose stages are built.

    Attributes:
        name: of the recipe.
        output: its folder.
        work: sources and steps, up to the clean documents.
        tokenize: the last stage, if there is one.
        datasets: name of a token dataset -> its sources.
    """

    name: str
    output: Folder
    work: Work
    tokenize: TokenizeSettings | None
    datasets: dict[str, list[str]]


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe's file, variables replaced; no input is looked for.

    Raises:
        UserError: what is wrong with the file.
    """
    return validate(RecipeFile, _expand(load_yaml(path), str(path)), str(path))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe, find its inputs and build its stages.

    Raises:
        UserError: anything that is wrong with the file, its inputs or what its stages need.
    """
    where = str(path)
    recipe = read_recipe(path)
    names = [source.name for source in recipe.sources]
    *stages, last = recipe.stages
    tokenize = None
    if "tokenize" in last:
        tokenize = validate(TokenizeSettings, last["tokenize"] or {}, f"{where}: stages.{len(stages) + 1}: tokenize")
    else:
        stages.append(last)
    datasets = _datasets(tokenize, names, where)
    steps: list[Step | GuardedStep | DedupStep] = []
    for number, stage in enumerate(stages, 1):
        ((kind, settings),) = stage.items()
        place = f"{where}: stages.{number}: {kind}"
        steps += build_steps(kind, settings or {}, place, names, recipe.sources[0].columns_read())
    output = Folder(recipe.output)
    work = Work(
        title=recipe.name,
        sources=tuple(open_source(source, output) for source in recipe.sources),
        steps=tuple(steps),
        out=output.child(DOCUMENTS),
        between=output.child(BETWEEN),
        format=recipe.format,
        limits=Limits(max_bad_rows=recipe.max_bad_rows),
    )
    return Recipe(recipe.name, output, work, tokenize, datasets)


def build_steps(
    kind: str,
    settings: dict[str, Any],
    where: str,
    sources: Sequence[str] | None = None,
    columns: Columns = PLAIN,
) -> list[Step | GuardedStep | DedupStep]:
    """The steps of one entry of a recipe.

    Args:
        kind: name of the stage, such as "filter".
        settings: what stands behind it.
        where: its place, for messages.
        sources: names of the recipe's sources; None: `sources` is no key here.
        columns: how a `reference` is read.

    Raises:
        UserError: an unknown stage, or wrong settings.
    """
    if not isinstance(settings, dict):
        raise UserError(f"{where}: expected settings (key: value), found {settings!r}")
    if kind == "dedup":
        section = validate(DedupSection, settings, where)
        options = section.model_dump(exclude={"reference"}, exclude_unset=True)
        reference = tuple([open_files(section.reference, columns._replace(keep=()))] if section.reference else [])
        return [DedupStep(DedupSettings(**options), reference)]
    if kind == "tokenize":
        raise UserError(f"{where}: tokenize is the last stage; what stands behind it would change nothing")
    if kind not in STAGES:
        raise UserError(f"{where}: {unknown_name('stage', kind, [*STAGES, 'dedup', 'tokenize'])}")
    settings = dict(settings)
    chosen = settings.pop("sources", None) if sources is not None else None
    if chosen is not None and (not isinstance(chosen, list) or not chosen):
        raise UserError(f"{where}: sources: {chosen!r} is not a list of names of sources")
    for name in chosen or []:
        if name not in (sources or []):
            raise UserError(f"{where}: sources: {unknown_name('source', str(name), sources or [])}")
    max_removed = settings.pop("max_removed", MAX_REMOVED) if kind == "decontaminate" else None
    steps = [Step(stage, tuple(chosen) if chosen else None) for stage in STAGES[kind](settings, where)]
    if max_removed is None:
        return list(steps)
    if isinstance(max_removed, bool) or not isinstance(max_removed, int | float) or not 0 <= max_removed <= 1:
        raise UserError(f"{where}: max_removed: {max_removed!r} is not a share, from 0 to 1")
    return [GuardedStep(step, max_removed) for step in steps]


def open_source(source: SourceSettings, exclude: Folder) -> Files:
    """Find the files of a source and look at their columns; what lies in `exclude` is left out."""
    paths = [source.path] if isinstance(source.path, str) else source.path
    return open_files(paths, source.columns_read(), source.name, exclude)


def open_files(
    arguments: Iterable[str],
    columns: Columns,
    source: str | None = None,
    exclude: Folder | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Files:
    """Find files and look at their columns; those of a stage's folder are all kept.

    Raises:
        UserError: nothing found, or a column that is missing.
    """
    arguments = list(arguments)
    found = find_inputs(arguments, source, exclude=exclude.local if exclude else None)
    for rest in found.left_out:
        say(str(rest))
    kept = list(columns.keep)
    for argument in arguments:
        stage = None if glob.has_magic(argument) else find_documents(Folder(argument))
        kept += [name for name in (kept_columns(stage.manifest) if stage else []) if name not in kept]
    columns = columns._replace(keep=tuple(kept))
    return Files(tuple(found.inputs), columns, check_inputs(found.inputs, columns))


def _language(settings: dict[str, Any], where: str) -> list[Stage]:
    from prep.filters.language import build

    return [build(settings, where)]


def _filter(settings: dict[str, Any], where: str) -> list[Stage]:
    from prep.filters.presets import build

    return build(settings, where)


def _classifier(settings: dict[str, Any], where: str) -> list[Stage]:
    from prep.filters.classifier import build

    return [build(settings, where)]


def _mask(settings: dict[str, Any], where: str) -> list[Stage]:
    from prep.filters.masking import build

    return [build(settings, where)]


def _decontaminate(settings: dict[str, Any], where: str) -> list[Stage]:
    from prep.decontaminate import build

    return [build(settings, where)]


STAGES: dict[str, Callable[[dict[str, Any], str], list[Stage]]] = {
    "language": _language,
    "filter": _filter,
    "classifier": _classifier,
    "mask": _mask,
    "decontaminate": _decontaminate,
}


def _datasets(tokenize: TokenizeSettings | None, sources: Sequence[str], where: str) -> dict[str, list[str]]:
    if tokenize is None:
        return {}
    datasets = tokenize.datasets or {name: [name] for name in sources}
    for name, of in datasets.items():
        if name in _RESERVED or "/" in name or not of:
            raise UserError(
                f"{where}: tokenize.datasets: '{name}' cannot be; a name is a folder's, other than "
                f"{' or '.join(_RESERVED)}, and has at least one source"
            )
        for source in of:
            if source not in sources:
                raise UserError(f"{where}: tokenize.datasets.{name}: {unknown_name('source', source, sources)}")
    return datasets


def _expand(value: Any, where: str) -> Any:
    """All strings with their variables replaced."""
    if isinstance(value, str):
        return expand_variables(value, where)
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _expand(item, where) for key, item in value.items()}
    return value
