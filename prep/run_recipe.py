"""A recipe from its sources to token shards and the report of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from prep.dry_run import dry_run
from prep.executors import Executor
from prep.fast import load_tokenizer
from prep.pipeline import DedupStep, read_report, run, write_report
from prep.recipe import Recipe, TokenizeSettings
from prep.report import funnel_table
from shards.errors import UserError


def run_recipe(
    recipe: Recipe,
    executor: Executor,
    *,
    workers: int = 0,
    keep_going: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Do all that a recipe asks for; what is done already is not done again.

    Args:
        recipe: what to do.
        executor: makes the documents.
        workers: threads that tokenize; 0: one per core.
        keep_going: go on behind files that are broken in the middle.
        say: takes one-line notices.

    Returns:
        The report of the whole, which is also written to the recipe's folder.

    Raises:
        UserError: a mistake that the user can mend; what was done until then is kept.
    """
    begin = time.monotonic()
    if recipe.tokenize is not None:
        if recipe.output.local is None:
            raise UserError(
                f"{recipe.output}: token shards are written to a local folder; leave tokenize out of the recipe, and "
                f"run `minigpt-prep tokenize {recipe.work.out}` where the model is trained"
            )
        load_tokenizer(Path(recipe.tokenize.tokenizer))  # a wrong path is told before the work, not behind it
    work = replace(recipe.work, limits=replace(recipe.work.limits, keep_going=keep_going))
    result = run(work, executor, say)
    report, unchanged = result.report, result.up_to_date
    if recipe.tokenize is not None:
        report["tokens"] = []
        for name, sources in recipe.datasets.items():
            if not any(state["kept_documents"] for state in result.states if state["source"] in sources):
                raise UserError(
                    f"{name}: no document of {', '.join(sources)} is left to make a dataset of. See why: minigpt-prep "
                    f"sample {recipe.output} --rejected; or name other datasets under tokenize"
                )
            dataset, up_to_date = _tokenize(recipe, recipe.tokenize, name, sources, workers, say)
            report["tokens"].append(dataset)
            unchanged &= up_to_date
    before = read_report(recipe.output) if unchanged else None
    if before and [before[name] for name in ("config", "tokens")] == [report[name] for name in ("config", "tokens")]:
        return before
    report["title"], report["seconds"] = recipe.name, time.monotonic() - begin
    write_report(recipe.output, report)
    return report


def dry_run_recipe(recipe: Recipe, number: int) -> list[Any]:
    """What the stages do to a sample, as parts for the terminal."""
    report, projection = dry_run(recipe.work.sources, recipe.work.steps, number)
    parts: list[Any] = funnel_table(report, rejects=True, projection=projection)
    if any(isinstance(step, DedupStep) for step in recipe.work.steps):
        parts.append("Deduplication is left out: a sample does not tell how much repeats in the whole.")
    return parts


def _tokenize(
    recipe: Recipe,
    settings: TokenizeSettings,
    name: str,
    sources: list[str],
    workers: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], bool]:
    """One token dataset, for the report, and whether it was there; one made from other documents is replaced."""
    from prep.output import OtherRun
    from prep.tokens import Options, tokenize

    options = Options(
        eos=settings.eos, bos=settings.bos, shard_tokens=settings.shard_tokens, val_fraction=settings.val_fraction
    )
    out = Path(recipe.output.path(name))

    def make(overwrite: bool) -> Any:
        return tokenize(
            [recipe.work.out.uri],
            Path(settings.tokenizer),
            out,
            options,
            sources=sources,
            workers=workers,
            overwrite=overwrite,
            say=say,
        )

    try:
        summary = make(overwrite=False)
    except OtherRun:
        summary = make(overwrite=True)
    counts = summary.counts
    if summary.up_to_date:
        say(f"{name}: up to date ({counts.documents:,} documents, {counts.tokens:,} tokens)")
    entry = {
        "name": name,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "bytes": counts.text_bytes,
        "bytes_per_token": counts.text_bytes / max(counts.tokens, 1),
    }
    return entry, summary.up_to_date
