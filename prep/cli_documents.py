"""Commands of `minigpt-prep` that make clean documents: filter, dedup, decontaminate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from prep.cli_options import (
    ExecutorName,
    IdColumn,
    Inputs,
    KeepGoing,
    KeptColumns,
    MaxBadRows,
    MaxRemoved,
    OptionalInputs,
    Out,
    OutputFormat,
    Source,
    TextColumn,
    Workers,
    say,
)
from shards.errors import UserError

if TYPE_CHECKING:
    from prep.parts import Files
    from prep.pipeline import DedupStep, GuardedStep
    from prep.stages import Step
    from prep.storage import Folder

    AnyStep = Step | GuardedStep | DedupStep


def filter_documents(
    inputs: Inputs,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder or s3:// address for the result.")] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option("--preset", "-p", help="Set of rules: gopher, c4, fineweb, dclm, code … (docs/FILTERS.md)."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule", "-r", help="Other bounds for a rule: NAME=LOW..HIGH, NAME=..HIGH, NAME=LOW.., NAME=off."
        ),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", "-l", help="Language to keep, such as en or en:0.65; several.")
    ] = None,
    language_columns: Annotated[
        bool, typer.Option("--language-columns", help="Write the columns language and language_score.")
    ] = False,
    classifier: Annotated[
        str | None, typer.Option(help="A fastText model as a rule: MODEL:LABEL:LOWEST_SCORE, such as hq.bin:hq:0.018.")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="What to mask, with commas: email, ip, phone, secrets.")] = None,
    url_domains: Annotated[
        list[str] | None, typer.Option(help="File of blocked domains (needs --column url), one per line.")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="File of words that no document may have, one per line.")
    ] = None,
    stats_only: Annotated[
        bool, typer.Option("--stats-only", help="Remove nothing: write all statistics of the rules as columns.")
    ] = False,
    dry_run: Annotated[
        int | None,
        typer.Option(min=1, help="Write nothing: show what the rules do to so many documents of each source."),
    ] = None,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    column: KeptColumns = None,
    source: Source = None,
    format: OutputFormat = "parquet",
    workers: Workers = 0,
    executor: ExecutorName = "local",
    max_bad_rows: MaxBadRows = 0.001,
    keep_going: KeepGoing = False,
) -> None:
    """Keep the documents that pass rules: quality, repetition, language, classifier; mask what is private.

    **Examples**

        minigpt-prep filter crawl/*.parquet --preset fineweb --language en:0.65 --out data/clean

        minigpt-prep filter crawl/*.parquet --preset gopher --dry-run 1000

        minigpt-prep filter src/ --preset code --mask email,secrets --out data/code

        minigpt-prep filter crawl/ --preset gopher --stats-only --out data/stats

        minigpt-prep filter data/stats --preset gopher --rule 'gopher_quality.word_count=100..' --dry-run 5000

    OUT holds `part-*.parquet`, every removed document with rule, value and threshold in `rejected/`, `report.json` and
    `report.html`. Look at documents with `minigpt-prep sample OUT --rejected`. Statistics that a folder of --stats-only
    already has are not computed again.
    """
    stages = _filter_settings(preset, rule, language, language_columns, classifier, mask, url_domains, words)
    if not stages:
        raise UserError("nothing to filter by; give --preset, --rule, --language, --classifier, --mask, --words …")
    if stats_only:
        others: dict[str, Any] = {"--language": language, "--classifier": classifier, "--mask": mask, "--words": words}
        others |= {"--url-domains": url_domains, "--language-columns": language_columns}
        if named := [name for name, given in others.items() if given]:
            raise UserError(
                f"--stats-only: only the rules of --preset and --rule have statistics; leave out {', '.join(named)} "
                f"and give them to the filter that reads the result"
            )

    def make_steps() -> list[AnyStep]:
        from prep.filters.rules import MeasureStage
        from prep.recipe import build_steps
        from prep.stages import Step

        steps = [step for kind, settings in stages for step in build_steps(kind, settings, kind)]
        if stats_only:
            return [Step(MeasureStage(tuple(step.stage for step in steps if isinstance(step, Step))))]
        return steps

    reading = Reading(text_column, id_column, tuple(column or ()), source, max_bad_rows, keep_going)
    if dry_run is not None:
        _dry_run(inputs, reading, make_steps, dry_run)
    else:
        _run("filter", inputs, reading, make_steps, _required(out), format, workers, executor)


def dedup(
    inputs: OptionalInputs = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder or s3:// address for the result.")] = None,
    method: Annotated[
        str, typer.Option(help="minhash (exact copies, then near-duplicates), exact, paragraph, line.")
    ] = "minhash",
    threshold: Annotated[
        float | None, typer.Option(help="Lowest Jaccard similarity of near-duplicates.  [default: 0.8]")
    ] = None,
    bands: Annotated[int | None, typer.Option(help="Bands of the LSH.  [default: 18]")] = None,
    rows: Annotated[int | None, typer.Option(help="Signature values in a band.  [default: 7]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the permutations.  [default: 1]")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Which of several stays: first, longest, highest:COLUMN.  [default: first]")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Documents that none may repeat (files, folders); they are not written themselves."),
    ] = None,
    min_characters: Annotated[
        int | None, typer.Option(help="For paragraph and line: shorter ones are never cut.")
    ] = None,
    max_cut: Annotated[
        float | None, typer.Option(help="For paragraph and line: a document that loses more than this share goes.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Only print the bands' curve, memory and disk needed; INPUT may be left out."),
    ] = False,
    max_removed: MaxRemoved = 0.5,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    column: KeptColumns = None,
    source: Source = None,
    format: OutputFormat = "parquet",
    workers: Workers = 0,
    executor: ExecutorName = "local",
    max_bad_rows: MaxBadRows = 0.001,
    keep_going: KeepGoing = False,
) -> None:
    """Remove duplicates: copies, near-duplicates (each verified against a document that stays), repeated paragraphs.

    **Examples**

        minigpt-prep dedup data/clean --out data/unique

        minigpt-prep dedup new/ --reference data/unique --out data/new-unique

        minigpt-prep dedup crawl/ --column score --keep highest:score --out data/unique

        minigpt-prep dedup crawl/ --explain --bands 14 --rows 8

    A document goes only if its exact Jaccard similarity (of word 5-grams) to a document that stays reaches the
    threshold. `OUT/duplicates.parquet` names the keeper and the similarity for each; `rejected/` holds the text. What
    the passes hand to each other is in `OUT/scratch`; it can be removed when all is done.
    """
    settings = {
        "method": method,
        "threshold": threshold,
        "bands": bands,
        "rows": rows,
        "seed": seed,
        "keep": keep,
        "min_characters": min_characters,
        "max_cut": max_cut,
        "max_removed": max_removed,
        "reference": reference,
    }
    settings = {name: value for name, value in settings.items() if value is not None}  # others are not for each method
    kept = [*(column or []), *([keep.partition(":")[2]] if keep and keep.startswith("highest:") else [])]
    reading = Reading(text_column, id_column, tuple(dict.fromkeys(kept)), source, max_bad_rows, keep_going)
    make_steps = partial(_build_steps, "dedup", settings, reading)
    if explain:
        from prep.dry_run import explain_dedup

        print(explain_dedup([reading.open(inputs, None)] if inputs else [], make_steps()[0], workers))
    elif not inputs:
        raise UserError("INPUT…: name what is to be deduplicated: files, folders or addresses")
    else:
        _run("dedup", inputs, reading, make_steps, _required(out), format, workers, executor)


def decontaminate(
    inputs: Inputs,
    out: Out,
    against: Annotated[
        list[str],
        typer.Option(
            help="File of evaluation items (JSONL, JSON, Parquet), or FILE:column,column; default: its text columns. "
            "Each value is one item. May be given several times."
        ),
    ],
    ngram: Annotated[int, typer.Option(help="Consecutive words that make a match.")] = 13,
    min_words: Annotated[
        int | None,
        typer.Option(help="Shorter items are skipped and counted; others below --ngram match whole.  [default: 5]"),
    ] = None,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the place out instead of removing the document.")] = False,
    margin: Annotated[int, typer.Option(help="With --cut: characters around a match that go too.")] = 200,
    min_characters: Annotated[int, typer.Option(help="With --cut: a document with less left goes.")] = 200,
    max_removed: MaxRemoved = 0.5,
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    column: KeptColumns = None,
    source: Source = None,
    format: OutputFormat = "parquet",
    workers: Workers = 0,
    executor: ExecutorName = "local",
    max_bad_rows: MaxBadRows = 0.001,
    keep_going: KeepGoing = False,
) -> None:
    """Remove documents that hold items of evaluations, or cut the place out.

    **Examples**

        minigpt-prep decontaminate data/unique --against gsm8k-test.jsonl --against HumanEval.jsonl.gz --out data/final

        minigpt-prep decontaminate data/unique --against mmlu.parquet:question --cut --out data/final

    Words are compared without case, punctuation and line breaks. The report has a line for each benchmark: items, items
    found, documents.
    """
    settings = {"against": against, "ngram": ngram, "min_words": min_words, "action": "cut" if cut else "remove"}
    settings |= {"margin": margin, "min_characters": min_characters, "max_removed": max_removed}
    reading = Reading(text_column, id_column, tuple(column or ()), source, max_bad_rows, keep_going)
    make_steps = partial(_build_steps, "decontaminate", settings, reading)
    _run("decontaminate", inputs, reading, make_steps, out, format, workers, executor)


class Reading(NamedTuple):
    """How the inputs are read, as the options say."""

    text_column: str
    id_column: str | None
    columns: tuple[str, ...]
    source: str | None
    max_bad_rows: float
    keep_going: bool

    def open(self, inputs: list[str], out: Folder | None) -> Files:
        """Find the files and look at their columns."""
        from prep.documents import Columns
        from prep.recipe import open_files

        return open_files(inputs, Columns(self.text_column, self.id_column, self.columns), self.source, out, say)


def _build_steps(kind: str, settings: dict[str, Any], reading: Reading) -> list[AnyStep]:
    from prep.documents import Columns
    from prep.recipe import build_steps

    return build_steps(kind, settings, kind, columns=Columns(reading.text_column, reading.id_column))


def _run(
    title: str,
    inputs: list[str],
    reading: Reading,
    make_steps: Callable[[], list[AnyStep]],
    out: str,
    format: str,
    workers: int,
    executor: str,
) -> None:
    from prep.executors import open_executor

    with open_executor(executor, workers) as opened:
        opened.warm_up()  # its processes load while this one does
        from prep.part_writer import check_format
        from prep.pipeline import Work, run
        from prep.stage_folder import Limits
        from prep.storage import Folder

        folder = Folder(out)
        limits = Limits(reading.max_bad_rows, reading.keep_going)
        files, steps = reading.open(inputs, folder), tuple(make_steps())
        work = Work(title, (files,), steps, folder, folder.child("scratch"), check_format(format), limits)
        report = run(work, opened, say).report
    print_report(report, folder.uri)


def print_report(report: dict[str, Any], where: str) -> None:
    """The funnel, and where everything lies."""
    from rich.console import Console

    from prep.report import duration, funnel_table, size

    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in funnel_table(report):
        console.print(part)
    rate = report["text_bytes"] / max(report["seconds"], 1e-9)
    console.print(f"\n{where}: {duration(report['seconds'])}, {size(rate)}/s of text", highlight=False, soft_wrap=True)
    console.print(f"report: {where}/report.html", highlight=False, soft_wrap=True)


def _dry_run(inputs: list[str], reading: Reading, make_steps: Callable[[], list[AnyStep]], number: int) -> None:
    from rich.console import Console

    from prep.dry_run import dry_run
    from prep.report import funnel_table

    report, projection = dry_run([reading.open(inputs, None)], make_steps(), number)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in funnel_table(report, rejects=True, projection=projection):
        console.print(part)


def _required(out: str | None) -> str:
    if out is None:
        raise UserError("--out: name the folder for the result")
    return out


def _filter_settings(
    preset: list[str] | None,
    rule: list[str] | None,
    language: list[str] | None,
    language_columns: bool,
    classifier: str | None,
    mask: str | None,
    url_domains: list[str] | None,
    words: list[str] | None,
) -> list[tuple[str, dict[str, Any]]]:
    """The options as stages of a recipe, in the order of their work."""
    stages: list[tuple[str, dict[str, Any]]] = []
    if language:
        pairs = (item.partition(":") for item in language)
        languages = {name: _number(score, "--language") if colon else 0.65 for name, colon, score in pairs}
        stages.append(("language", {"languages": languages, "columns": language_columns}))
    rules: dict[str, Any] = {}
    if preset:
        rules["preset"] = preset
    if rule:
        rules["rules"] = dict(_bounds(item) for item in rule)
    if url_domains:
        rules["urls"] = {"domains": url_domains}
    if words:
        rules["words"] = [{"files": words}]
    if rules:
        stages.append(("filter", rules))
    if classifier:
        parts = classifier.rsplit(":", 2)
        if len(parts) != 3:
            raise UserError(f"--classifier: '{classifier}' is not MODEL:LABEL:LOWEST_SCORE, such as hq.bin:hq:0.018")
        stages.append(("classifier", {"model": parts[0], "label": parts[1], "low": _number(parts[2], "--classifier")}))
    if mask:
        wanted = dict.fromkeys((kind.strip() for kind in mask.split(",")), True)
        stages.append(("mask", {"email": False, "ip": False, **wanted}))
    return stages


def _bounds(text: str) -> tuple[str, Any]:
    """`name=50..100000` -> ("name", {"low": 50, "high": 100000}); one side alone leaves the other as it is."""
    name, equals, value = text.partition("=")
    if equals and value in ("on", "off"):
        return name, value == "on"
    low, dots, high = value.partition("..")
    if not equals or not dots or not (low or high):
        raise UserError(f"--rule: '{text}' is not NAME=LOW..HIGH, NAME=LOW.., NAME=..HIGH or NAME=off")
    sides = (("low", low), ("high", high))
    return name, {side: _number(given, f"--rule {name}") for side, given in sides if given}


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: '{text}' is not a number") from None
