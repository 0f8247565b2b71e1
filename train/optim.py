"""A step of the optimiser: the gradient norm of all ranks, whether to skip, clipping, and the update.

Everything stays on the device: whether a step is skipped, and by how much it is clipped, is decided there, so the host
never waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.adamw import AdamW, local
from train.config import TrainingConfig
from train.guard import SkipGuard
from train.layout import Layout
from train.models.transformer import BaseModelForCausalLM
from train.muon import Muon, is_matrix_of_block


class Optimizer:
    """The update rules of a model's parameters, and what they share.

    Attributes:
        parameters: all that this rank has, by name.
        guard: decides which steps are skipped.
    """

    def __init__(
        self, model: BaseModelForCausalLM, rules: list[AdamW | Muon], config: TrainingConfig, layout: Layout
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.guard = SkipGuard(config.skip_sigma, layout.ranks.device)
        self._rules, self._grad_clip, self._ranks = rules, config.grad_clip, layout.ranks
        self._copies = {
            name: layout.copies(
                parameter, cut=name in model.cuts, tied=model.tied_across_stages and name == "embed_tokens.weight"
            )
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients to the configured norm and update; gradients are released.

        Where the guard says so, weights and state stay as they are.

        Returns:
            the gradient norm before clipping, and 1.0 where the step was skipped; both float32 [], the same on all
            ranks.
        """
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        # Every rank adds its share of what it holds like others, so that a sum over all is the whole.
        norm = self._ranks.sum_(squared_norm(gradients, self._copies, self._ranks.device)).sqrt().float()
        skipped = self.guard.judge(norm)
        if self._grad_clip > 0 and gradients:
            torch._foreach_mul_(list(gradients.values()), torch.clamp(self._grad_clip / (norm + 1e-6), max=1.0))
        for rule in self._rules:
            rule.update(learning_rate, skipped)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, skipped

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state as the tensors themselves: loading writes into them. `guard` is the skip guard's."""
        state = {key: tensors for rule in self._rules for key, tensors in rule.state_dict().items()}
        return {**state, "guard": self.guard.state_dict()}


def create_optimizer(model: BaseModelForCausalLM, config: TrainingConfig, layout: Layout) -> Optimizer:
    """The optimiser that an experiment asks for: AdamW, or Muon with AdamW for what is no matrix of a block.

    With Muon all ranks have to call it together.
    """
    parameters, rules = dict(model.named_parameters()), list[AdamW | Muon]()
    if config.optimizer == "muon":
        matrices = {name: p for name, p in parameters.items() if is_matrix_of_block(name, p)}
        parameters = {name: p for name, p in parameters.items() if name not in matrices}
        rules.append(Muon(matrices, model, config, layout))
    return Optimizer(model, [*rules, AdamW(parameters, config)], config, layout)


def squared_norm(gradients: dict[str, Tensor], copies: dict[str, int], device: torch.device) -> Tensor:
    """Sum of the squares of all elements, those of each tensor divided by its number of copies; float64 []."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for count in sorted({copies[name] for name in gradients}):
        alike = [gradient for name, gradient in gradients.items() if copies[name] == count]
        # float32 sums of millions of squares would differ between layouts by 1e-5
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in alike]
        total += torch.stack(norms).square().sum() / count
    return total
