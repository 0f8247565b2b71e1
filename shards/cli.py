"""`minigpt-mix`: look at a mixture before, during and after a run."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shards.errors import UserError, run_command, unknown_name

if TYPE_CHECKING:
    from shards.mixture import MixturePlan

app = typer.Typer(
    help="Look at a mixture of token datasets. Start with `minigpt-mix inspect --help`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Mixture = Annotated[Path, typer.Argument(metavar="MIX.yaml", help="The mixture file.", show_default=False)]
SeqLen = Annotated[int, typer.Option(help="Tokens per window, as in training (data.max_seq_length).")]
Sample = Annotated[int | None, typer.Option(help="Global number of one sample, from 0.")]
Step = Annotated[int | None, typer.Option(help="All samples of this optimiser step; steps count from 1.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="With --step: samples per step over all ranks (batch_size x accumulation x world_size)."),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="Tokens of the run, instead of the file's total_tokens (fractions in phases refer to it)."),
]
Split = Annotated[str, typer.Option(help="'train', or 'val' for the validation parts.")]
OptionalMixture = Annotated[
    Path | None,
    typer.Argument(metavar="[MIX.yaml]", help="The mixture file, if not --run.", show_default=False),
]
OptionalSeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window, as in training (data.max_seq_length); a run knows its own.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="A run folder: the samples of its steps."),
]
OnlySource = Annotated[str | None, typer.Option("--source", metavar="NAME", help="Only windows of this source.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command()
def inspect(
    mixture: Mixture,
    seq_len: SeqLen = 2048,
    tokens: Tokens = None,
    plan_only: Annotated[
        bool,
        typer.Option("--plan-only", help="Without the data: sizes are the `tokens` that the file gives."),
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with the picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each source and phase gives: tokens, windows, weights asked and realised, epochs, repetition.

    **Examples**

        minigpt-mix inspect mixture.yaml --seq-len 4096

        minigpt-mix inspect mixture.yaml --tokens 5_000_000_000 --html mixture.html

        minigpt-mix inspect configs/data/pretrain/phase1/mixture1.yaml --plan-only

    Shares and epochs are exact counts of what a run of this length draws, not estimates; without a length they go up to
    the first source's end. A mixture that would exceed a `max_epochs` is refused with what would fit. Relative paths in
    the file start at the current folder.

    With --plan-only no dataset is opened: epochs and `max_epochs` are counted from the sources' `tokens`, an optional
    field that is used for nothing else, and are left open where a source has none.
    """
    from shards.describe import page, summarize, tables

    plan = _plan(mixture, seq_len, tokens, without_data=plan_only)
    summary = summarize(plan)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(summary), encoding="utf-8")
    if as_json:
        _print_json(summary)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in tables(summary):
        console.print(part)
    for warning in summary["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if html is not None:
        console.print(f"wrote {html}", highlight=False)


@app.command()
def explain(
    mixture: OptionalMixture = None,
    seq_len: OptionalSeqLen = None,
    sample: Sample = None,
    step: Step = None,
    batch_size: BatchSize = None,
    run: RunFolder = None,
    source: OnlySource = None,
    tokens: Tokens = None,
    split: Split = "train",
    as_json: AsJson = False,
) -> None:
    """Where samples come from: source, epoch, shard, token range and document ids.

    **Examples**

        minigpt-mix explain --run experiments/demo --step 1000

        minigpt-mix explain mixture.yaml --seq-len 2048 --sample 123_456

        minigpt-mix explain mixture.yaml --seq-len 2048 --step 1000 --batch-size 512 --json

    The loss jumped at step 1000? These are its documents; `minigpt-mix show` prints their text. With --run all else is
    read from the run folder: mixture, length, batch size, and the samples that a rollback skipped. Data that have
    changed since the run are refused.
    """
    from shards.describe import explain as explain_samples

    plan, samples = _select(mixture, run, seq_len, sample, step, batch_size, tokens, split)
    windows = _of_source(explain_samples(plan, samples), plan, source)
    if as_json:
        _print_json(windows)
        return
    for window in windows:
        print(_heading(window))
        for document in window["documents"]:
            print(f"  {_document_line(document)}")


@app.command()
def show(
    mixture: OptionalMixture = None,
    seq_len: OptionalSeqLen = None,
    sample: Sample = None,
    step: Step = None,
    batch_size: BatchSize = None,
    run: RunFolder = None,
    source: OnlySource = None,
    tokens: Tokens = None,
    split: Split = "train",
) -> None:
    """The text of samples, decoded with the dataset's tokenizer, with the borders of documents.

    **Examples**

        minigpt-mix show mixture.yaml --seq-len 2048 --sample 0

        minigpt-mix show --run experiments/demo --step 1000 | less
    """
    from shards.describe import decode
    from shards.describe import explain as explain_samples

    plan, samples = _select(mixture, run, seq_len, sample, step, batch_size, tokens, split)
    for number in samples:  # one at a time: output starts at once
        for window in _of_source(explain_samples(plan, range(number, number + 1)), plan, source):
            print(f"══ {_heading(window)}")
            for document, text in zip(window["documents"], decode(plan, window), strict=True):
                print(f"── {_document_line(document)}")
                print(text)


@app.command()
def verify(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="Dataset folders; a val/ inside is read too.")
    ],
) -> None:
    """Read every byte of datasets and check checksums, counts, offsets, document ends and the largest id.

    **Examples**

        minigpt-mix verify data/web

        minigpt-mix verify data/*

    Exit status: 0 all well, 1 problems were found (each is named with its file and what to do).
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from shards.verify import verify_dataset

    console = Console(stderr=True)
    failed = False
    for directory in _with_validation_parts(directories):
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(str(directory), total=_tokens(directory))
            found = verify_dataset(directory, partial(progress.advance, task))
        print(
            f"{directory}: {found.shards:,} shards, {found.documents:,} documents, {found.tokens:,} tokens: "
            + (f"{len(found.problems)} problem(s)" if found.problems else "all well")
        )
        for problem in found.problems:
            print(f"  {problem}")
        failed = failed or bool(found.problems)
    if failed:
        sys.exit(1)


def _plan(
    mixture: Path, seq_len: int, tokens: int | None, split: str = "train", without_data: bool = False
) -> MixturePlan:
    from shards.mixture import MixturePlan, load_mixture

    config = load_mixture(mixture)
    if tokens is not None:
        if tokens < 1:
            raise UserError(f"--tokens: {tokens} is not a length")
        config = config.model_copy(update={"total_tokens": tokens})
    return MixturePlan.build(config, seq_len, split=split, without_data=without_data)


def _select(
    mixture: Path | None,
    run: Path | None,
    seq_len: int | None,
    sample: int | None,
    step: int | None,
    batch_size: int | None,
    tokens: int | None,
    split: str,
) -> tuple[MixturePlan, range]:
    """The plan of a mixture file or of a run, and the samples that are asked for."""
    if run is None:
        if mixture is None or seq_len is None:
            raise UserError("give MIX.yaml and --seq-len L, or --run DIR")
        return _plan(mixture, seq_len, tokens, split), _samples(sample, step, batch_size)
    if mixture is not None or (seq_len, batch_size, tokens, split) != (None, None, None, "train"):
        raise UserError(
            f"--run {run}: the run has its own mixture, lengths and batch size; give only --step or --sample"
        )
    from shards.runs import Run

    opened = Run.open(run)
    if step is not None and sample is None:
        return opened.plan, opened.step(step)
    samples = _samples(sample, step, None)
    opened.check(samples.stop)
    return opened.plan, samples


def _of_source(windows: list[dict[str, Any]], plan: MixturePlan, source: str | None) -> list[dict[str, Any]]:
    names = [known.name for known in plan.sources]
    if source is not None and source not in names:
        raise UserError(f"--source: {unknown_name('source', source, names)}")
    return [window for window in windows if source in (None, window["source"])]


def _samples(sample: int | None, step: int | None, batch_size: int | None) -> range:
    """The samples that --sample, or --step with --batch-size, select."""
    if sample is not None and step is None and batch_size is None and sample >= 0:
        return range(sample, sample + 1)
    if sample is None and step is not None and batch_size is not None and step >= 1 and batch_size >= 1:
        return range((step - 1) * batch_size, step * batch_size)
    raise UserError("give --sample G (from 0), or --step N (from 1) with --batch-size B (samples per step, all ranks)")


def _heading(window: dict[str, Any]) -> str:
    return (
        f"sample {window['sample']:,}: {window['source']}, epoch {window['epoch']}, window {window['window']:,}, "
        f"shard {window['shard']:05d} from {window['offset']:,}, tokens [{window['start']:,}, {window['stop']:,})"
    )


def _document_line(document: dict[str, Any]) -> str:
    part = "" if document["whole"] else ", cut by the window"
    return f"{document['id']} ({document['source']}): tokens [{document['start']:,}, {document['stop']:,}){part}"


def _with_validation_parts(directories: list[Path]) -> list[Path]:
    return [part for folder in directories for part in (folder, folder / "val") if part == folder or part.is_dir()]


def _tokens(directory: Path) -> int | None:
    from shards.format import Manifest

    try:
        return Manifest.read(directory).tokens
    except UserError:  # verify_dataset reports it
        return None


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point of `minigpt-mix`."""
    try:
        run_command(app)
    except BrokenPipeError:  # `minigpt-mix show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
