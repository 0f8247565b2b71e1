"""A run whose gradients are bad at some steps, as a step on bad data or on a failing device would make them.

torchrun --nproc-per-node 2 tests/poisoned_run.py '{"steps": [5], "factor": NaN, "rank": 1}' --config FILE
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from train import pretrain


@dataclass
class Poison:
    """Multiplies the gradient behind the last norm in the first forward pass of some steps.

    Attributes:
        steps: the steps.
        factor: e.g. NaN.
        rank: the only rank to do so.
        always: also when a step comes again after a rollback.
    """

    steps: list[int]
    factor: float
    rank: int = 0
    always: bool = False

    def install(self, setattr: Any) -> None:
        """Patch the trainer by `setattr(object, name, value)`."""
        due, given = False, set[int]()
        rate, layout = pretrain.learning_rate, pretrain.parallelize

        def learning_rate(step: int, *rest: Any) -> float:  # called at the beginning of each step
            nonlocal due
            due = step in self.steps and (self.always or step not in given)
            given.add(step)
            return rate(step, *rest)

        def spoil(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal due
            if due and output.requires_grad and int(os.environ.get("RANK", 0)) == self.rank:
                due = False
                output.register_hook(lambda gradient: gradient * self.factor)

        def parallelize(model: nn.Module, *rest: Any, **named: Any) -> None:
            layout(model, *rest, **named)
            model.get_submodule("norm").register_forward_hook(spoil)

        setattr(pretrain, "learning_rate", learning_rate)
        setattr(pretrain, "parallelize", parallelize)


if __name__ == "__main__":
    from shards.errors import run_command

    Poison(**json.loads(sys.argv.pop(1))).install(setattr)
    run_command(pretrain.main)
