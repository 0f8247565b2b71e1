"""Commands of `minigpt-prep` around a whole preparation: run, sample, train-classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prep.cli_documents import print_report
from prep.cli_options import ExecutorName, KeepGoing, MaxBadRows, TextColumn, Workers, print_table, say


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    workers: Workers = 0,
    executor: ExecutorName = "local",
    dry_run: Annotated[
        int | None,
        typer.Option(min=1, help="Write nothing: show what the stages do to so many documents of each source."),
    ] = None,
    keep_going: KeepGoing = False,
) -> None:
    """Run a recipe: sources, stages, token shards.

    **Examples**

        minigpt-prep run configs/data/recipes/fineweb.yaml --dry-run 1000

        minigpt-prep run configs/data/recipes/fineweb.yaml

    A recipe:

        name: web

        output: data/web

        sources: [{name: crawl, path: "crawl/*.parquet", columns: [url]}]

        stages:

        - language: {languages: {en: 0.65}}

        - filter: {preset: fineweb}

        - dedup: {method: minhash}

        - tokenize: {tokenizer: tokenizer.json, val_fraction: 0.001}

    It ends in OUTPUT/documents, one token dataset for each source (or for each name under `datasets`) in OUTPUT/NAME,
    and OUTPUT/report.html. **Killed?** The same command goes on. **Changed an option?** What depends on it is made
    anew, and only that.
    """
    if dry_run is not None:
        from rich.console import Console

        from prep.recipe import load_recipe
        from prep.run_recipe import dry_run_recipe

        for part in dry_run_recipe(load_recipe(recipe), dry_run):
            Console().print(part)
        return
    from prep.executors import open_executor
    from prep.fast import load_fast_encoder, load_tokenizer, use_threads

    use_threads(workers)
    with open_executor(executor, workers) as opened:
        opened.warm_up()  # its processes load while this one does
        from prep.recipe import load_recipe
        from prep.run_recipe import run_recipe

        found = load_recipe(recipe)
        if found.tokenize is not None:
            load_fast_encoder(load_tokenizer(Path(found.tokenize.tokenizer))[0])  # while the documents are made
        report = run_recipe(found, opened, workers=workers, keep_going=keep_going, say=say)
    print_report(report, found.output.uri)
    for dataset in report["tokens"] or []:
        print(
            f"tokens: {found.output.path(dataset['name'])}  {dataset['tokens']:,} tokens, "
            f"{dataset['documents']:,} documents, {dataset['bytes_per_token']:.2f} bytes per token"
        )


def sample(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of a stage, or of a recipe.", show_default=False)
    ],
    rejected: Annotated[bool, typer.Option("--rejected", help="Documents that were removed.")] = False,
    rule: Annotated[str | None, typer.Option(help="Only those that this rule removed.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many.")] = 5,
    seed: Annotated[int, typer.Option(help="Another seed shows other documents.")] = 0,
    source: Annotated[str | None, typer.Option(help="Only documents of this source.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Whole texts, not their first 1,000 characters.")] = False,
) -> None:
    """Show documents of a stage, or what it removed and why.

    **Examples**

        minigpt-prep sample data/clean

        minigpt-prep sample data/clean --rejected

        minigpt-prep sample data/clean --rule gopher_quality.word_count --number 20 --full | less
    """
    from prep.samples import show

    show(
        folder,
        rejected=rejected,
        rule=rule,
        number=number,
        seed=seed,
        source=source,
        characters=None if full else 1000,
    )


def train_classifier(
    positive: Annotated[
        list[str], typer.Option("--positive", "-p", help="Files or folders of good documents; several.")
    ],
    negative: Annotated[list[str], typer.Option("--negative", "-n", help="Files or folders of others; several.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model: .bin, or .ftz for a quantised one.")],
    word_ngrams: Annotated[int, typer.Option(help="Longest n-gram of words that is a feature.")] = 2,
    dimension: Annotated[int, typer.Option(help="Size of a feature's vector.")] = 32,
    epochs: Annotated[int, typer.Option(help="Passes over the documents.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="Of the training.")] = 0.1,
    min_count: Annotated[int, typer.Option(help="Rarer words are left out.")] = 3,
    characters: Annotated[int, typer.Option(help="How much of each document is used; 0: all.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the documents that is kept for measuring.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the first vectors.")] = 0,
    sample_bytes: Annotated[int, typer.Option(help="Bytes of text of each class, at most.")] = 500_000_000,
    text_column: TextColumn = "text",
    max_bad_rows: MaxBadRows = 0.001,
) -> None:
    """Train a quality classifier (fastText) from good and other documents.

    **Examples**

        minigpt-prep train-classifier --positive textbooks/ --negative crawl.jsonl.zst --out hq.bin

        minigpt-prep filter crawl/ --classifier hq.bin:hq:0.2 --out data/best

    Labels are `hq` and `cc`. The table shows what thresholds keep of held-out documents; the same input gives the same
    model. Settings and figures go to OUT.json.
    """
    from prep.train_classifier import train_classifier as train

    done = train(
        positive,
        negative,
        out,
        word_ngrams=word_ngrams,
        dimension=dimension,
        epochs=epochs,
        learning_rate=learning_rate,
        min_count=min_count,
        characters=characters,
        held_out=held_out,
        seed=seed,
        sample_bytes=sample_bytes,
        text_column=text_column,
        max_bad_rows=max_bad_rows,
        say=say,
    )
    print_table(
        [
            ("model", f"{done.model} ({done.size / 1e6:.1f} MB)"),
            ("trained on", f"{done.positive:,} good and {done.negative:,} other documents"),
            ("measured on", f"{done.positive_held_out:,} and {done.negative_held_out:,} held out"),
            ("area under ROC", f"{done.auc:.4f}"),
            ("bad rows", f"{done.bad:,}"),
            ("time", f"{done.seconds:.1f} s"),
        ]
    )
    print(f"\n{done.table()}")
