"""One mixture-of-experts layer, forward and backward, beside the loop over experts of `transformers` on equal weights.

`python -m tools.bench moe-step`

The peer is `transformers`' Qwen3-MoE block with `experts_implementation="eager"`: one product per expert and a row-wise
addition. The forms take turns; the shortest time of each counts. Gradients are released after every pass, as a training
step does.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from train.models.moe import MixtureOfExperts, Router

SHAPES = {  # name: hidden, ffn, experts, top_k
    "minimind-3-moe": (768, 2432, 4, 1),
    "qwen3-30b-a3b, a quarter": (512, 192, 64, 8),
}


class OutputOnly(nn.Module):
    """Our layer without what it says about the load, as the peer's."""

    def __init__(self, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, hidden] -> the same."""
        out: Tensor = self.moe(x)[0]
        return out


def layers(hidden: int, ffn: int, experts: int, top_k: int) -> dict[str, nn.Module]:
    """The peer, ours eager and ours compiled, with the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    fields: dict[str, Any] = {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=ffn, **fields)
    config._experts_implementation = "eager"
    peer = Qwen3MoeSparseMoeBlock(config)
    for parameter in peer.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    forms: dict[str, nn.Module] = {"transformers": peer}
    for name in ("eager", "compiled"):
        ours = MixtureOfExperts(hidden, ffn, Router(hidden, experts, top_k, normalize=True))
        ours.load_state_dict(peer.state_dict())
        forms[name] = OutputOnly(ours)
    forms["compiled"].compile(fullgraph=True, dynamic=False)
    return forms


def measure(hidden: int, ffn: int, experts: int, top_k: int, tokens: int, rounds: int) -> dict[str, float]:
    """Shortest seconds of each form; their outputs are compared first."""
    torch._dynamo.reset()  # or the shapes measured so far count towards its limit of compilations
    forms = layers(hidden, ffn, experts, top_k)
    x, grad = torch.randn(1, tokens, hidden, requires_grad=True), torch.randn(1, tokens, hidden)
    expected = forms["transformers"](x).detach()
    for form in forms.values():
        torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    best = dict.fromkeys(forms, float("inf"))
    for turn in range(-2, rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form(x).backward(grad)
            seconds = time.perf_counter() - start
            x.grad = None
            form.zero_grad(set_to_none=True)
            if turn >= 0:
                best[name] = min(best[name], seconds)
    return best


def main() -> None:
    """Measure both shapes at several token counts and print times, rates and ratios."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench moe-step", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds; the best counts")
    arguments = parser.parse_args()

    title = f"one MoE layer, forward and backward, float32, {torch.get_num_threads()} threads"
    columns = ("layer", "tokens", "form", "ms, best", "GFLOP/s", "ratio to transformers")
    table = Table(*columns, title=title)
    for layer, (hidden, ffn, experts, top_k) in SHAPES.items():
        for tokens in arguments.tokens:
            best = measure(hidden, ffn, experts, top_k, tokens, arguments.rounds)
            work = 3 * 3 * 2 * tokens * top_k * hidden * ffn  # three passes over three matrices
            for form, seconds in best.items():
                name, count = (layer, f"{tokens:,}") if form == "transformers" else ("", "")
                ratio = f"{best['transformers'] / seconds:.2f}"
                table.add_row(name, count, form, f"{seconds * 1e3:.1f}", f"{work / seconds / 1e9:.0f}", ratio)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
