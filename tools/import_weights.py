"""`minigpt-import`: a Hugging Face folder as a folder that every command here takes for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command("import")
def import_weights(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A Hugging Face folder on this machine.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that an import made.")] = False,
) -> None:
    """Turn a Hugging Face model into a folder that generation, evaluation and export take for a run.

    **Example**

        minigpt-import models/Qwen3-0.6B --out experiments/qwen3-0.6b

        minigpt-generate experiments/qwen3-0.6b --prompt "Once upon a time"

    DIR holds config.json, tokenizer.json and the weights: safetensors, in one file or several with an index, or one
    file of torch with the same names (.pth, pytorch_model.bin). Families: llama, qwen2, qwen3, qwen3_moe, deepseek_v2,
    deepseek_v3, and what minigpt-export wrote. Every tensor must be there with its shape, and nothing else.

    The folder has model.yaml (a model file), tokenizer.json and checkpoints/step-00000000 with float32 weights.
    Weights are streamed: memory holds one tensor, not the model.

    To train from a Hugging Face model nothing has to be imported: `model.from_pretrained: DIR` in an experiment file
    reads DIR itself.
    """
    from tools.hub_import import import_pretrained

    parameters, checkpoint = import_pretrained(directory, out, overwrite=overwrite)
    typer.echo(f"{checkpoint}: {parameters:,} parameters from {directory}")


def main() -> None:
    """The command line."""
    run_command(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
