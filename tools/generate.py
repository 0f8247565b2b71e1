"""`minigpt-generate`: text from a trained run or from a folder of Hugging Face."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shards.errors import UserError, run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from train.generate import Completion, Engine
    from train.models import BaseModelForCausalLM
    from train.sampling import SamplingParams

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
RULE = "─" * 80


@app.command()
def generate(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run folder, such as experiments/demo, one of its checkpoints/step-… folders, a Hugging Face folder, "
            "or what minigpt-export wrote."
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help="Text to continue; may be given several times. `-` reads standard input."),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint folder; default: the newest of the run.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to the prompt at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 sharper, above 1 flatter; 0 takes the likeliest token each time (greedy).")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest tokens; 0: among all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens with this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that stand in the text already become less likely; 1.1 is mild.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A token that ends the text, beside the end of the document, such as '<|im_end|>'."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives a prompt the same text.")] = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Show each new token with its probability.")] = False,
    json_lines: Annotated[
        bool,
        typer.Option("--json", help="One JSON object per prompt: text, ids, log-probabilities, why it ended."),
    ] = False,
) -> None:
    """Continue prompts with a trained model.

    A single prompt is shown as it is written; several are computed together and shown one after the other. Text ends at
    the end of the document, at a `--stop` token, after `--max-new-tokens`, or where the model has no more positions.
    The filters work in the order repetition penalty, temperature, top-k, top-p, min-p, as in transformers. The model
    runs on the GPU in bf16 where there is one, else on the CPU in float32.

    Examples

        minigpt-generate experiments/demo -p "def main("

        minigpt-generate experiments/demo -p "import os" -p "Returns" --temperature 0 --logprobs

        cat story.txt | minigpt-generate exported/demo -p - --top-p 0.9 --top-k 0 --json
    """
    from train.sampling import SamplingParams

    if prompt.count("-") > 1:
        raise UserError("--prompt -: standard input can be read once; give it a single time")
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    writer = load(source, checkpoint).with_stops(stop or [])
    if len(prompts) == 1 and not json_lines:
        completion = writer.stream(prompts[0], params)
        if logprobs:
            typer.echo(writer.probabilities(completion))
        return
    for text, completion in zip(prompts, writer.complete(prompts, params), strict=True):
        if json_lines:
            typer.echo(json.dumps(writer.as_json(text, completion), ensure_ascii=False))
            continue
        typer.echo(text + writer.text(completion))
        if logprobs:
            typer.echo(writer.probabilities(completion))
        typer.echo(RULE)


@dataclass(frozen=True)
class Writer:
    """A model with its tokenizer."""

    model: BaseModelForCausalLM
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    special: bool  # whether the tokenizer adds what it has to add (BOS), and reads special tokens in a prompt as such

    def with_stops(self, tokens: list[str]) -> Writer:
        """The same, which also stops at these tokens.

        Raises:
            UserError: one of them is no token of the vocabulary.
        """
        ids = []
        for token in tokens:
            number = self.tokenizer.token_to_id(token)
            if number is None:
                raise UserError(f"--stop {token!r}: not one token of this vocabulary; give an end marker that is")
            ids.append(number)
        return replace(self, stop_ids=(*self.stop_ids, *ids))

    def complete(self, prompts: list[str], params: SamplingParams) -> list[Completion]:
        """Continue several prompts together; each draws with the same seed, so its place does not matter."""
        from train.generate import Completion, Engine

        engine = Engine(self.model)
        numbers = [self._submit(engine, prompt, params) for prompt in prompts]
        completions = {number: Completion() for number in numbers}
        while engine.busy:
            for new in engine.step():
                completions[new.request].add(new)
        return [completions[number] for number in numbers]

    def stream(self, prompt: str, params: SamplingParams) -> Completion:
        """Continue one prompt and print text as soon as its characters are complete."""
        from train.generate import Completion, Engine

        engine, completion, shown = Engine(self.model), Completion(), ""
        self._submit(engine, prompt, params)
        typer.echo(prompt, nl=False)
        while engine.busy:
            for new in engine.step():
                completion.add(new)
            text = self.text(completion)
            # A token may end inside a character; what comes out as a replacement is held back until it is whole.
            if not engine.busy or not text.endswith("\ufffd"):
                typer.echo(text[len(shown) :], nl=False)
                sys.stdout.flush()
                shown = text
        typer.echo()
        return completion

    def text(self, completion: Completion) -> str:
        """The continuation as text, without special tokens."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    def probabilities(self, completion: Completion) -> str:
        """A line per token: probability, log-probability, the token."""
        lines = [
            f"{math.exp(logprob):8.4f} {logprob:9.4f}  {self.tokenizer.decode([token], skip_special_tokens=False)!r}"
            for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        return "\n".join(["  probab.   logprob  token", *lines])

    def as_json(self, prompt: str, completion: Completion) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "prompt": prompt,
            "text": self.text(completion),
            "token_ids": completion.token_ids,
            "logprobs": completion.logprobs,
            "finish_reason": completion.finish_reason,
        }

    def _submit(self, engine: Engine, prompt: str, params: SamplingParams) -> int:
        ids = self.tokenizer.encode(prompt, add_special_tokens=self.special).ids
        try:
            return engine.submit(ids, replace(params, stop_ids=self.stop_ids))
        except UserError as error:
            raise UserError(f"prompt {prompt[:60]!r}: {error}") from None


def load(source: Path, checkpoint: Path | None = None) -> Writer:
    """The model of a run, of one of its checkpoints or of a Hugging Face folder, with its tokenizer and end of text.

    It is on the GPU in bf16 where there is one, else on the CPU in float32.

    Raises:
        UserError: the folder is neither, or something in it is missing or damaged.
    """
    import torch
    from tokenizers import Tokenizer

    from tools.hub_files import read_tokenizer

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a run, a checkpoint or a Hugging Face folder")
    # model.yaml without a manifest: written by minigpt-export --format pth
    exported = (source / "model.yaml").exists() and not (source / "manifest.json").exists()
    if exported or (source / "config.json").exists():
        from train.models.hf import load_pretrained

        if checkpoint is not None:
            raise UserError(f"{source}: a Hugging Face folder has no checkpoints; leave out --checkpoint")
        _, tokenizer = read_tokenizer(source)
        return Writer(load_pretrained(source, device, dtype), tokenizer, _end_ids(source, tokenizer), True)
    from train.load import find_checkpoint, load_run

    if not (source / "manifest.json").exists() and not (source / "state.json").exists():
        raise UserError(f"{source}: no model here: neither a run (manifest.json) nor a Hugging Face one (config.json)")
    if checkpoint is None:
        source, checkpoint = find_checkpoint(source)
    elif not (checkpoint / "state.json").exists():
        folders = ", ".join(sorted(path.name for path in (source / "checkpoints").glob("step-*"))) or "none"
        raise UserError(f"--checkpoint {checkpoint}: no checkpoint; in {source / 'checkpoints'} there are: {folders}")
    model, tokenizer_json, eos_id = load_run(source, checkpoint, device, dtype)
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.encode_special_tokens = True  # as in the training data, where such text is text
    return Writer(model, tokenizer, () if eos_id is None else (eos_id,), False)


def _end_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or of config.json, or `eos_token`: one, several or none."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    path = folder / "tokenizer_config.json"  # all that there is beside a model.yaml
    token = json.loads(path.read_text("utf-8")).get("eos_token") if path.exists() else None
    end = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return () if end is None else (end,)


def continue_prompts(
    run: Path, prompts: list[str], *, max_new_tokens: int, temperature: float = 0.8, top_k: int | None = 50
) -> list[str]:
    """Each prompt with its continuation by a run, its newest checkpoint, or a Hugging Face folder.

    Raises:
        UserError: the folder is not complete, or a prompt is empty or leaves no room.
    """
    from train.sampling import SamplingParams

    writer, params = load(run), SamplingParams(max_new_tokens, temperature, top_k)
    completions = writer.complete(prompts, params)
    return [prompt + writer.text(completion) for prompt, completion in zip(prompts, completions, strict=True)]


def main() -> None:
    """The command line."""
    run_command(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
