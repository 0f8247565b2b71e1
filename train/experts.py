"""The experts of a run, step by step: their load over all micro-batches and ranks, and the routers' bias update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.distributed import Ranks
from train.models import BaseModelForCausalLM, ModelOutput


class ExpertBalance:
    """Counts over one step what `ModelOutput` says of the experts; for a dense model it does nothing."""

    def __init__(self, model: BaseModelForCausalLM, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._load: Tensor | None = None  # float32 [moe layers, experts] of the step so far
        self._loss = torch.zeros((), device=ranks.device)

    def add(self, output: ModelOutput, tokens: int) -> None:
        """Count a micro-batch of a step of `tokens` tokens."""
        if output.expert_load is None:
            return
        if self._load is None:
            self._load, self._loss = torch.zeros_like(output.expert_load), torch.zeros_like(self._loss)
        self._load += output.expert_load
        if output.balance_loss is not None:
            self._loss += output.balance_loss.detach() / tokens

    def finish_step(self, skipped: Tensor) -> dict[str, Any]:
        """Sum over the ranks, let the biases follow the load unless the step was skipped (1.0), and start anew.

        Returns:
            tensors on the device: `balance_loss` as it was added to the loss; `expert_load` with `max_violation`, the
            mean over layers of (largest load / mean load - 1) (MaxVio of arXiv 2408.15664, section 4.1), and
            `unused`, the number of experts without a token. Empty for a dense model.
        """
        if self._load is None:
            return {}
        sums = self._ranks.sum_(torch.cat((self._load.flatten(), self._loss[None])))
        load, loss = sums[:-1].view_as(self._load), sums[-1]
        self._model.update_router_biases(load * (1.0 - skipped))
        self._load = None
        violation = load.amax(1) / load.mean(1).clamp_min(1.0) - 1.0
        return {
            "balance_loss": loss,
            "expert_load": {"max_violation": violation.mean(), "unused": (load == 0).sum()},
        }
