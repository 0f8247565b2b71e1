"""`minigpt-export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shards.errors import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class Format(StrEnum):
    """Of the file of weights."""

    safetensors = "safetensors"
    pth = "pth"


class Dtype(StrEnum):
    """Of the weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run folder (its newest checkpoint), or one of its checkpoints/step-… folders.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    file_format: Annotated[
        Format,
        typer.Option("--format", help="safetensors for transformers, vLLM and llama.cpp; pth: one file of torch."),
    ] = Format.safetensors,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the weights; float32 keeps the master weights exactly.")
    ] = Dtype.bfloat16,
    check: Annotated[bool, typer.Option("--check", help="Load the folder again and compare logits.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 500MB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that an export made.")] = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads with `from_pretrained`.

    **Examples**

        minigpt-export experiments/demo --out exports/demo --check

        minigpt-export experiments/demo/checkpoints/step-00001000 --out exports/demo-1000 --dtype float32

    The folder has config.json of a native architecture (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM,
    Qwen3MoeForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM: no remote code), the weights, in several files
    with an index beyond --max-shard-size, the tokenizer, generation_config.json and a model card. It is complete or not
    there. Weights are streamed: memory holds the largest tensor, not the model (with --format pth, the model).

    A model that transformers does not have, such as minimind 2 with experts, is written with --format pth: model.pth
    with Hugging Face's names, and model.yaml.

    --check computes a few texts in float32 with transformers and with the checkpoint, whose weights are rounded to
    --dtype first. The logits must agree within 1e-4 of the largest, whatever the dtype; what the rounding itself
    changes is printed beside it. It needs memory for the model in float32.

    Exit status: 0 all well, 1 the check failed, 2 it could not be done.
    """
    from rich.filesize import decimal

    from tools.hub_export import compare, export_pretrained
    from tools.hub_files import parse_size

    made = export_pretrained(
        source,
        out,
        file_format=file_format.value,
        dtype=dtype.value,
        max_shard_size=parse_size(max_shard_size),
        overwrite=overwrite,
    )
    kind = made.architecture or "model.yaml"
    typer.echo(f"{out}: {kind}, {decimal(made.size)} of {made.dtype} in {len(made.files)} file(s)")
    if not check:
        return
    found = compare(source, made)
    good = found.difference <= found.tolerance
    typer.echo(
        f"check: logits of {found.loader} differ by at most {found.difference:.2e} (tolerance {found.tolerance:.1e}): "
        + ("equal" if good else "NOT EQUAL")
    )
    typer.echo(f"       rounding the weights to {made.dtype} moved them by at most {found.rounding:.2e}")
    if not good:
        sys.exit(1)


def main() -> None:
    """The command line."""
    run_command(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
