"""A run that is slow beyond a step which a file says, so that things can happen to it there.

torchrun tests/gated_run.py GATE_FILE --config FILE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from train import pretrain

if __name__ == "__main__":
    from shards.errors import run_command

    gate, rate = Path(sys.argv.pop(1)), pretrain.learning_rate

    def learning_rate(step: int, *rest: Any) -> float:  # called at the beginning of each step
        if step > int(gate.read_text()):
            time.sleep(0.3)
        return rate(step, *rest)

    pretrain.learning_rate = learning_rate
    run_command(pretrain.main)
