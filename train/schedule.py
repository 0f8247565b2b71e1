"""Learning-rate schedules: pure functions of the step.

All warm up linearly over `warmup_steps` (step s of W has the rate s / W of the peak), then

    constant   stays at the peak
    linear     falls linearly to min_lr_ratio of the peak at the last step
    cosine     falls as half a cosine to min_lr_ratio (Loshchilov & Hutter 2017, arXiv 1608.03983)
    wsd        warm-up, stable, decay: the peak, then a linear fall over the last `decay_steps` (Hu et al. 2024,
               arXiv 2404.06395, section 4), or from the end of the warm-up where fewer steps are left
"""

from __future__ import annotations

import math

from train.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig, total_steps: int) -> float:
    """Learning rate of optimiser step `step`, counted from 1, in a run of `total_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    start = config.warmup_steps
    if config.lr_scheduler == "wsd":
        start = max(start, total_steps - config.wsd_decay_steps(total_steps))
    # 0 at the start of the fall, 1 at the last step
    fall = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    low = config.min_lr_ratio
    match config.lr_scheduler:
        case "constant":
            ratio = 1.0
        case "cosine":
            ratio = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall))
        case "linear" | "wsd":
            ratio = 1 - (1 - low) * fall
    return config.learning_rate * ratio
