"""AdamW with its state by parameter name, the global gradient norm, and the update that skips a bad step.

Everything stays on the device: whether a step is skipped, and by how much it is clipped, is decided there, so the host
never waits for it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from train.config import TrainingConfig
from train.layout import Layout


class Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019), weight decay on matrices only, not on norms and biases.

    `exp_avg` and `exp_avg_sq` hold the moments by parameter name, laid out (sharded) as the parameter is; `steps` the
    number of updates made, float32 [] each.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, layout: Layout) -> None:
        self.layout = layout
        self.config = config
        self.parameters = dict(model.named_parameters())
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.steps = {name: torch.zeros((), device=local(p).device) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients to the configured norm and update; gradients are released.

        Where the gradient norm is not finite, weights and state stay as they are.

        Returns:
            the gradient norm before clipping, and 1.0 where the step was skipped; both float32 [].
        """
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm = gradient_norm(list(gradients.values()))
        skipped = (~torch.isfinite(norm)).float()
        if self.config.grad_clip > 0:
            scale = torch.clamp(self.config.grad_clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([local(g) for g in gradients.values()], scale)
        for decay in (True, False):
            names = [name for name in gradients if (self.parameters[name].ndim >= 2) == decay]
            adamw(
                [local(self.parameters[name]) for name in names],
                [local(gradients[name]) for name in names],
                [local(self.exp_avg[name]) for name in names],
                [local(self.exp_avg_sq[name]) for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                found_inf=skipped,
                amsgrad=False,
                beta1=self.config.betas[0],
                beta2=self.config.betas[1],
                lr=learning_rate,
                weight_decay=self.config.weight_decay if decay else 0.0,
                eps=self.config.eps,
                maximize=False,
            )
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm, skipped

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state as the tensors themselves: loading writes into them."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}


def create_optimizer(model: nn.Module, config: TrainingConfig, layout: Layout) -> Optimizer:
    """The optimiser that an experiment asks for."""
    return Optimizer(model, config, layout)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm of all gradients over all ranks, float32 []."""
    sharded = squared_norm([gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)])
    whole = squared_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    if sharded is not None:
        dist.all_reduce(sharded)
    parts = [part for part in (sharded, whole) if part is not None]
    return torch.stack(parts).sum().sqrt().float()


def squared_norm(tensors: list[Tensor]) -> Tensor | None:
    """Sum of the squares of all elements, float64 []; None of nothing."""
    # float32 sums of millions of squares would differ between layouts by 1e-5
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum() if norms else None
