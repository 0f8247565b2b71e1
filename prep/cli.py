"""`minigpt-prep`: raw text to clean documents and token shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prep import cli_documents, cli_recipe
from prep.cli_options import IdColumn, Inputs, KeepGoing, MaxBadRows, TextColumn, print_table, say
from prep.lean import hide_unused
from shards.errors import run_command

if TYPE_CHECKING:
    from prep.tokens import Summary

app = typer.Typer(
    help="Raw text to clean documents and token shards. Start with `minigpt-prep run --help`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def commands() -> None:
    """Raw text to clean documents and token shards. Start with `minigpt-prep run --help`."""


def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option("--tokenizer", "-t", help="A tokenizer.json, or a folder that holds one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the dataset.")],
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    source: Annotated[
        str | None, typer.Option(help="Name of the source; default: the stem of the file, the name of the folder.")
    ] = None,
    eos: Annotated[
        str | None, typer.Option(help="Control token behind each document; default: found from the tokenizer.")
    ] = None,
    bos: Annotated[str | None, typer.Option(help="Control token before each document; default: none.")] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the documents, chosen by the hash of their id, that goes to OUT/val.")
    ] = 0.0,
    shard_tokens: Annotated[
        int | None, typer.Option(help="Tokens per shard; each finished shard is a checkpoint.  [default: 2^27]")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Threads; 0: one per core. The output is the same for any number.")
    ] = 0,
    max_bad_rows: MaxBadRows = 0.001,
    keep_going: KeepGoing = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what another run left in OUT.")] = False,
) -> None:
    """Turn text into a dataset of token shards.

    **Examples**

        minigpt-prep tokenize books.jsonl.zst --tokenizer tokenizer.json --out data/books

        minigpt-prep tokenize 'crawl/*.parquet' -t tokenizer.json -o data/web --text-column content --val-fraction 0.01

        minigpt-prep tokenize src/ 'docs/**/*.md' -t tokenizer.json -o data/code --source code

    **Killed, or the disk was full?** Run the same command again: it goes on from the last finished shard and ends in
    the same bytes. Once finished, the same command does nothing. With other input or options, OUT is only replaced with
    --overwrite.

    **Bad rows** (no JSON, no text, not UTF-8) are set aside in OUT/rejected with file, row and reason. **A file that is
    broken in the middle** is read up to there; the dataset is then only finished with --keep-going. Empty documents are
    skipped. All of it is counted in the table at the end and in OUT/dataset.json.

    **Control tokens**: a literal `<|endoftext|>` in the text is encoded as ordinary text, and counted.

    Exit status: 0 finished, 2 stopped with a message.
    """
    from prep.fast import load_fast_encoder, load_tokenizer, use_threads

    # In the background of the imports and of the first checks: a third of a second of a run's start.
    use_threads(workers)
    load_fast_encoder(load_tokenizer(tokenizer)[0])
    from prep.tokens import DEFAULT_SHARD_TOKENS, Options
    from prep.tokens import tokenize as run

    shard_tokens = DEFAULT_SHARD_TOKENS if shard_tokens is None else shard_tokens
    options = Options(text_column, id_column, eos, bos, shard_tokens, val_fraction)
    summary = run(
        inputs,
        tokenizer,
        out,
        options,
        source=source,
        workers=workers,
        max_bad_rows=max_bad_rows,
        keep_going=keep_going,
        overwrite=overwrite,
        say=say,
    )
    if summary.up_to_date:
        print(f"{out}: up to date ({summary.counts.documents:,} documents, {summary.counts.tokens:,} tokens)")
    else:
        _print_summary(out, summary)


def train_tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Entries, control tokens and the 256 bytes among them.")],
    text_column: TextColumn = "text",
    id_column: IdColumn = None,
    special_token: Annotated[
        list[str] | None,
        typer.Option(
            help="Control token; may be given several times. They get the first ids. "
            "Default: <|endoftext|> (ends a document) and, for chat later, <|im_start|> and <|im_end|>.",
            show_default=False,
        ),
    ] = None,
    sample_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of text to train on; documents are chosen by the hash of their id.")
    ] = 100_000_000,
    max_bad_rows: MaxBadRows = 0.001,
    keep_going: KeepGoing = False,
) -> None:
    """Train a byte-level BPE tokenizer.

    **Examples**

        minigpt-prep train-tokenizer books.jsonl.zst --vocab-size 8192 --out tokenizer.json

        minigpt-prep train-tokenizer src/ docs/ --vocab-size 32000 --out tokenizer.json --sample-bytes 300000000

    Any text can be encoded (there is no unknown token), numbers are split into groups of up to three digits, and the
    same input gives the same file. One document in a hundred is held out to measure bytes per token. Bad rows and
    broken files are counted in the table at the end; too many bad rows, or a broken file without --keep-going, stop it.
    """
    from prep.train_tokenizer import DEFAULT_SPECIAL_TOKENS
    from prep.train_tokenizer import train_tokenizer as run

    report = run(
        inputs,
        out,
        vocab_size,
        special_tokens=special_token or DEFAULT_SPECIAL_TOKENS,
        sample_bytes=sample_bytes,
        text_column=text_column,
        id_column=id_column,
        max_bad_rows=max_bad_rows,
        keep_going=keep_going,
        say=say,
    )
    rows = [
        ("tokenizer", str(out)),
        ("vocabulary", f"{report.vocab_size:,}"),
        ("control tokens", ", ".join(report.special_tokens)),
        ("trained on", f"{report.documents:,} documents, {report.sample_bytes:,} bytes"),
        ("bytes per token", f"{report.bytes_per_token:.2f} on {report.measured_on}"),
        ("bad rows", f"{report.bad:,} of {report.rows:,}"),
        ("broken files", "; ".join(report.broken) or "none"),
        ("time", f"{report.seconds:.1f} s"),
    ]
    print_table(rows)


def _print_summary(out: Path, summary: Summary) -> None:
    counts = summary.counts
    literal = ", ".join(f"{name} × {number:,}" for name, number in sorted(counts.literal_specials.items()))
    val = summary.val
    rows = [
        ("dataset", str(out)),
        ("documents", f"{counts.documents:,}" + (f" ({val.documents:,} of them in {out / 'val'})" if val else "")),
        ("tokens", f"{counts.tokens:,}" + (f" ({val.tokens:,} of them in {out / 'val'})" if val else "")),
        ("text", f"{counts.text_bytes:,} bytes, {counts.text_bytes / counts.tokens:.2f} per token"),
        ("empty, skipped", f"{counts.empty:,}"),
        ("bad rows", f"{counts.bad:,} of {counts.rows:,}" + (f", see {out / 'rejected'}" if counts.bad else "")),
        ("broken files", "; ".join(counts.broken) or "none"),
        ("left out of folders", _list_left_out(summary.train.recipe["left_out"])),
        ("literal control tokens", literal or "none"),
        ("shards", f"{len(summary.train.shards):,} of {summary.train.shard_tokens:,} {summary.train.dtype} tokens"),
        ("time", f"{summary.seconds:.1f} s, {summary.done_bytes / summary.seconds / 1e6:,.0f} MB/s of text"),
        ("backend", summary.train.backend),
    ]
    print_table(rows)


def _list_left_out(folders: list[dict[str, Any]]) -> str:
    kinds = (f"{number:,} × {kind}" for folder in folders for kind, number in folder["files"].items())
    return ", ".join(kinds) or "none"


# In the order of --help.
app.command("run")(cli_recipe.run)
app.command("filter")(cli_documents.filter_documents)
app.command("dedup")(cli_documents.dedup)
app.command("decontaminate")(cli_documents.decontaminate)
app.command("tokenize")(tokenize)
app.command("sample")(cli_recipe.sample)
app.command("train-tokenizer")(train_tokenizer)
app.command("train-classifier")(cli_recipe.train_classifier)


def main() -> None:
    """Entry point of `minigpt-prep`."""
    hide_unused()
    run_command(app)


if __name__ == "__main__":
    main()
