"""AdamW with its state by parameter name, in float32 or bf16."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from train.config import TrainingConfig

SLICE = 2**25  # elements that are updated at a time where the state is bf16: two float32 copies of 128 MiB


class Slice(NamedTuple):
    """Elements [start, stop) of what this rank has of a parameter."""

    name: str
    start: int
    stop: int


class AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019), weight decay on matrices only, not on norms and biases.

    `exp_avg` and `exp_avg_sq` hold the moments by parameter name, laid out (sharded) as the parameter is; `steps` the
    number of updates made, float32 [] each.

    PyTorch's fused kernel takes the state in the dtype of the parameters only. State in bf16 is therefore updated slice
    by slice in a float32 copy of bounded size, with the same kernel, and rounded to nearest.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainingConfig) -> None:
        self.config = config
        self.parameters = parameters
        dtype = torch.bfloat16 if config.optimizer_state_dtype == "bf16" else torch.float32
        self.exp_avg = {name: torch.zeros_like(p, dtype=dtype) for name, p in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, dtype=dtype) for name, p in parameters.items()}
        self.steps = {name: torch.zeros((), device=local(p).device) for name, p in parameters.items()}
        self._groups: list[tuple[float, list[Slice]]] = []  # weight decay, and what is updated together
        for decay in (True, False):
            names = [name for name, p in parameters.items() if (p.ndim >= 2) == decay]
            weight_decay = config.weight_decay if decay else 0.0
            self._groups += [(weight_decay, group) for group in self._slices(names, dtype == torch.bfloat16)]

    def _slices(self, names: list[str], bounded: bool) -> list[list[Slice]]:
        groups: list[list[Slice]] = [[]]
        room = SLICE
        for name in names:
            size = local(self.parameters[name]).numel()
            step = SLICE if bounded else max(size, 1)
            for start in range(0, size, step):
                part = Slice(name, start, min(start + step, size))
                if bounded and part.stop - part.start > room:
                    groups.append([])
                    room = SLICE
                groups[-1].append(part)
                room -= part.stop - part.start
        return groups

    @torch.no_grad()
    def update(self, learning_rate: float, skipped: Tensor) -> None:
        """Update the parameters that have a gradient, unless the step is skipped (1.0; float32 [] on the device)."""
        for weight_decay, group in self._groups:
            slices = [part for part in group if self.parameters[part.name].grad is not None]
            if not slices:
                continue
            stored = [[_part(state[part.name], part) for part in slices] for state in (self.exp_avg, self.exp_avg_sq)]
            exp_avg, exp_avg_sq = ([tensor.float() for tensor in tensors] for tensors in stored)
            adamw(
                [_part(self.parameters[part.name], part) for part in slices],
                [_part(self.parameters[part.name].grad, part) for part in slices],
                exp_avg,
                exp_avg_sq,
                [],
                # Copies, as each call of the kernel counts.
                list(torch._foreach_mul([self.steps[part.name] for part in slices], 1.0)),
                fused=True,
                found_inf=skipped,
                amsgrad=False,
                beta1=self.config.betas[0],
                beta2=self.config.betas[1],
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=self.config.eps,
                maximize=False,
            )
            if stored[0][0].dtype != torch.float32:
                torch._foreach_copy_(stored[0] + stored[1], exp_avg + exp_avg_sq)
        updated = [self.steps[name] for name, p in self.parameters.items() if p.grad is not None]
        if updated:
            torch._foreach_add_(updated, 1.0 - skipped)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state as the tensors themselves: loading writes into them."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor | None, part: Slice) -> Tensor:
    assert tensor is not None
    return local(tensor).view(-1)[part.start : part.stop]
