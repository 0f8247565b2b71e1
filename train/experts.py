"""The experts of a run, step by step: their load over all micro-batches and ranks, and the routers' bias update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.layout import Layout
from train.models import BaseModelForCausalLM, ModelOutput


class ExpertBalance:
    """Counts over one step what `ModelOutput` says of the experts; for a dense model it does nothing."""

    def __init__(self, model: BaseModelForCausalLM, layout: Layout) -> None:
        self._model, self._ranks = model, layout.ranks
        routers = [name for name in model.whole_shapes if name.endswith(".mlp.gate.weight")]
        # Of the step so far, and behind them the loss: float32 [moe layers * experts + 1].
        shape = (len(routers), model.whole_shapes[routers[0]][0]) if routers else (0, 0)
        self._sums = torch.zeros(shape[0] * shape[1] + 1, device=layout.ranks.device)
        self._load = self._sums[:-1].view(shape)
        # A stage of a pipeline has some of the layers only, one behind the other.
        here = dict(model.layers.named_children())
        own = [number for number, name in enumerate(routers) if name.split(".")[1] in here]
        self._own = slice(own[0], own[-1] + 1) if own else slice(0)

    def add(self, output: ModelOutput, tokens: int) -> None:
        """Count a micro-batch of a step of `tokens` tokens."""
        if output.expert_load is not None:
            self._load[self._own] += output.expert_load
        if output.balance_loss is not None:
            self._sums[-1] += output.balance_loss / tokens

    def finish_step(self, skipped: Tensor) -> dict[str, Any]:
        """Sum over the ranks, let the biases follow the load unless the step was skipped (1.0), and start anew.

        Returns:
            tensors on the device: `balance_loss` as it was added to the loss; `expert_load` with `max_violation`, the
            mean over layers of (largest load / mean load - 1) (MaxVio of arXiv 2408.15664, section 4.1), and
            `unused`, the number of experts without a token. Empty for a dense model.
        """
        if not len(self._load):
            return {}
        self._ranks.sum_(self._sums)
        self._model.update_router_biases(self._load[self._own] * (1.0 - skipped))
        violation = self._load.amax(1) / self._load.mean(1).clamp_min(1.0) - 1.0
        found = {
            "balance_loss": self._sums[-1].clone(),
            "expert_load": {"max_violation": violation.mean(), "unused": (self._load == 0).sum()},
        }
        self._sums.zero_()
        return found
