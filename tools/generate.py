"""`minigpt-generate`: text from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UserError, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Run folder, such as experiments/demo.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint folder; default: the newest of the run.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to the prompt.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw among the k likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue prompts with a trained model.

    Example

        minigpt-generate experiments/demo -p "def main(" -p "The following example" --temperature 0.7
    """
    for text in continue_prompts(run, prompt, checkpoint, max_new_tokens, temperature, top_k, seed):
        typer.echo(text)
        typer.echo("─" * 80)


def continue_prompts(
    run: Path,
    prompts: list[str],
    checkpoint: Path | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation, up to the end of the document or `max_new_tokens`.

    Raises:
        UserError: the run or its checkpoint is not complete, or a prompt is empty or leaves no room.
    """
    import torch
    from tokenizers import Tokenizer

    from train.load import load_run

    model, tokenizer_json, eos_token_id = load_run(run, checkpoint)
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.encode_special_tokens = True
    limit = model.config.max_position_embeddings
    texts = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if not 0 < len(ids) < limit:
            raise UserError(f"a prompt must have 1 to {limit - 1:,} tokens; this one has {len(ids):,}: {prompt[:60]!r}")
        output = model.generate(
            torch.tensor([ids]),
            len(ids) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=eos_token_id,
            seed=seed,
        )
        texts.append(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))
    return texts


def main() -> None:
    """The command line."""
    run_command(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
