"""Forward and backward of whole models beside `transformers` with SDPA, both compiled, in one run.

`python -m tools.bench models`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from train.distributed import start_ranks
from train.flops import flops_per_token
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.hf_config import hf_config
from train.parallel import initialize

MODELS = ("configs/model/llama/29m.yaml", "configs/model/minimind/3-64m.yaml", "configs/model/minimind/3-moe-198m.yaml")


def build(path: str, dtype: torch.dtype, compiled: bool) -> BaseModelForCausalLM:
    """Our model as training has it: blocks, final norm and loss compiled."""
    ranks = start_ranks(None)
    with torch.device("meta"):
        model = ModelRegistry.create_from_yaml(path)
    model.to_empty(device=ranks.device)
    initialize(model, 1)
    model.compute_dtype = dtype
    if compiled:
        for module in [*model.layers, model.norm]:
            module.compile(fullgraph=True)
        model.loss_kernel = torch.compile(model.loss_kernel, fullgraph=True)
    return model.train()


def build_peer(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device, compiled: bool, loop: bool
) -> nn.Module:
    """The same shape in transformers; `loop` takes its loop over the experts instead of its grouped product."""
    from transformers import AutoConfig, AutoModelForCausalLM

    peer_config = AutoConfig.for_model(**config)
    options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": dtype}
    if loop:
        options["experts_implementation"] = "eager"
    peer = AutoModelForCausalLM.from_config(peer_config, **options).to(device).train()
    if compiled:
        peer.compile()
    return peer


def interleaved(work: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each piece of work, taking turns, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(-2, rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure the models in turn and print tokens per second and ratios."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench models", description=__doc__)
    parser.add_argument("--model", action="append", help="model file; may be given several times")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds; the medians and the best are shown")
    parser.add_argument("--bf16", action="store_true", help="bf16 activations (transformers: bf16 weights as well)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, on either side")
    arguments = parser.parse_args()

    device = start_ranks(None).device
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    tokens = arguments.batch_size * arguments.length
    title = f"forward and backward, {arguments.batch_size} x {arguments.length} tokens, {dtype}, {device}"
    table = Table("model", "form", "ms, median", "ms, best", "tokens/s, best", "ratio of medians", title=title)
    for path in arguments.model or MODELS:
        torch._dynamo.reset()
        model = build(path, dtype, not arguments.eager)
        config = {**hf_config(model.config, str(dtype).removeprefix("torch.")), "use_cache": False}
        ids = torch.randint(model.config.vocab_size, (arguments.batch_size, arguments.length + 1), device=device)
        forms: dict[str, nn.Module] = {"transformers": build_peer(config, dtype, device, not arguments.eager, False)}
        if model.experts():
            # The loop waits for the host to learn which experts are hit: compiled, its graph breaks in every layer.
            forms["transformers, loop"] = build_peer(config, dtype, device, not arguments.eager, True)
            forms["transformers, loop, eager"] = build_peer(config, dtype, device, False, True)
        work = {name: step_of(peer, ids[:, :-1]) for name, peer in forms.items()}
        times = interleaved({"minigpt": our_step(model, ids), **work}, arguments.rounds, device)
        ours = statistics.median(times["minigpt"])
        name = f"{path.removeprefix('configs/model/').removesuffix('.yaml')}, {model.get_num_params():,}"
        rate = flops_per_token(model, arguments.length) * tokens / min(times["minigpt"])
        for form, seconds in times.items():
            middle, best = statistics.median(seconds), min(seconds)
            label = f"{form} ({rate / 1e9:,.0f} GFLOP/s)" if form == "minigpt" else form
            cells = [f"{middle * 1e3:.0f}", f"{best * 1e3:.0f}", f"{tokens / best:,.0f}", f"{middle / ours:.2f}"]
            table.add_row(name, label, *cells)
            name = ""
    Console(width=150).print(table)


def our_step(model: BaseModelForCausalLM, ids: Tensor) -> Callable[[], None]:
    """Loss and gradients of our model."""

    def step() -> None:
        model(ids[:, :-1], labels=ids[:, 1:]).objective.backward()
        model.zero_grad(set_to_none=True)

    return step


def step_of(peer: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Loss and gradients of a model of transformers, which shifts the labels itself."""

    def step() -> None:
        peer(input_ids=ids, labels=ids).loss.backward()
        peer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
