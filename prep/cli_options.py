"""Options that several commands of `minigpt-prep` share, and how they print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

_INPUTS = typer.Argument(
    metavar="INPUT…",
    help="Files, globs ('data/*.jsonl.zst'), folders (searched recursively) and addresses (s3://bucket/x, gs://, "
    "hf://datasets/owner/name/…): JSON Lines (.jsonl .ndjson .json) and CSV (.csv .tsv), plain or .gz or .zst, "
    "Parquet, text files (.txt .md .py …; one file is one document), folders of Hugging Face's save_to_disk, and "
    "folders that another stage has written. What else a folder holds is left out and counted.",
    show_default=False,
)
Inputs = Annotated[list[str], _INPUTS]
OptionalInputs = Annotated[list[str] | None, _INPUTS]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder or s3:// address for the result; killed? run it again.")]
TextColumn = Annotated[str, typer.Option(help="Column or key that holds the text.")]
IdColumn = Annotated[
    str | None,
    typer.Option(help="Column or key with the document's id; default: 'id' where there is one, else FILE:ROW."),
]
KeptColumns = Annotated[
    list[str] | None,
    typer.Option("--column", "-c", help="Another column to keep, with its type; may be given several times."),
]
Source = Annotated[
    str | None, typer.Option(help="Name of the source; default: the stem of the file, the name of the folder.")
]
MaxBadRows = Annotated[
    float, typer.Option(min=0, max=1, help="Stop when more than this share of the rows, from 1,000 rows on, is bad.")
]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="Finish although a file is broken in the middle (a truncated .gz).")
]
MaxRemoved = Annotated[
    float, typer.Option(min=0, max=1, help="Stop where a source of 1,000 documents or more would lose more than this.")
]
OutputFormat = Annotated[str, typer.Option("--format", help="Of the documents: parquet or jsonl.zst.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0: one per core. The output is the same for any number.")]
ExecutorName = Annotated[
    str,
    typer.Option("--executor", help="local: processes; ray: a Ray cluster (RAY_ADDRESS), else Ray on this machine."),
]


def say(line: str) -> None:
    """A notice beside the output."""
    print(f"note: {line}", file=sys.stderr)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
