"""Cached greedy generation against `transformers.generate`: the same weights, prompts and tokens, taking turns.

`python -m tools.bench generate`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from train.generate import generate
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.hf import hub_parts
from train.parallel import initialize
from train.sampling import SamplingParams


def transformers_llama(model: BaseModelForCausalLM) -> Any:
    """The same llama in `transformers`, weights included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**model.config.model_dump(exclude={"model_type", "rope_scaling", "rope_theta"}))
    other = LlamaForCausalLM(config).eval()
    theirs, ours = dict(other.named_parameters()), model.state_dict()
    with torch.no_grad():
        for part in hub_parts(model):
            theirs[part.hub].copy_(ours[part.ours][part.place])
    return other


def main() -> None:
    """Time both in turns and print the best of each."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench generate", description=__doc__)
    parser.add_argument("--model", default="configs/model/llama/29m.yaml", help="model file of a llama")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=48, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; the best counts")
    arguments = parser.parse_args()

    model = ModelRegistry.create_from_yaml(arguments.model)
    initialize(model, 0)
    other = transformers_llama(model)
    params = SamplingParams(max_new_tokens=arguments.new, temperature=0.0)
    length = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new}
    title = f"greedy generation, {model.get_num_params():,} parameters, float32, {torch.get_num_threads()} threads"
    table = Table("batch", "transformers, tokens/s", "minigpt, tokens/s", "ratio", title=title)
    for batch in arguments.batch_sizes:
        ids = torch.randint(model.config.vocab_size, (batch, arguments.prompt))
        mask = torch.ones_like(ids)

        def theirs(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> list[list[int]]:
            found = other.generate(ids, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0, **length)
            return found[:, ids.shape[1] :].tolist()

        def ours(ids: torch.Tensor = ids) -> list[list[int]]:
            return [completion.token_ids for completion in generate(model, ids.tolist(), params)]

        same = sum(a == b for a, b in zip(theirs(), ours(), strict=True))
        if same < batch:  # a tie broken by rounding is possible
            Console().print(f"batch {batch}: {batch - same} of {batch} texts differ")
        seconds = best_of_turns(arguments.repeats, theirs, ours)
        rates = [batch * arguments.new / s for s in seconds]
        table.add_row(str(batch), *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}")
    Console().print(table)


def best_of_turns(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Shortest time of each work in seconds; they take turns, so that a slow moment hits them all."""
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for which, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[which] = min(best[which], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
