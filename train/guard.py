"""The judgement whether a step is to be skipped, made on the device from the gradient norms before it.

A step is skipped if its gradient norm is not finite, or an outlier among the norms of the last 128 steps:

    norm > max(mean + sigma * deviation, 2 * mean)

A rolling window and six deviations are OLMo-core's (`optim/skip_step_optimizer.py`), as is judging nothing until half
of the window is known. The second bound is ours: where norms hardly vary, six deviations are a few per cent, and a
gradient of no more than twice the usual size does no harm, least of all behind clipping.

An outlier enters the window cut down to the bound. A single one so widens the bound little, while norms that stay high
are accepted in the end: at 3 times the old mean after at most 9 skipped steps, at 10 times after 21, at 100 times after
41 (measured on norms that were constant before; sooner where they varied). A norm that is not finite does not enter.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128  # norms
KNOWN = 64  # norms, below which only one that is not finite is an outlier
RECENT = 100  # steps
HARMLESS = 2.0  # times the mean


class SkipGuard:
    """Judges gradient norms; holds all it knows in tensors on the device and never waits for it.

    Attributes:
        norms: float32 [128], the window, newest last; -1 where there is none yet.
        skips: float32 [100], 1.0 where one of the last steps was skipped, newest last.
        total: float32 [], steps skipped so far.
    """

    def __init__(self, sigma: float | None, device: torch.device) -> None:
        """`sigma`: deviations above the mean that make an outlier; None: nothing finite is one."""
        self.sigma = sigma
        self.norms = torch.full((WINDOW,), -1.0, device=device)
        self.skips = torch.zeros(RECENT, device=device)
        self.total = torch.zeros((), device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """Take in the gradient norm of a step, float32 []; returns 1.0 if it is to be skipped, else 0.0."""
        finite, limit = torch.isfinite(norm), self.limit()
        skipped = (~finite | (norm > limit)).float()
        entering = torch.cat((self.norms[1:], torch.minimum(norm, limit)[None]))
        self.norms.copy_(torch.where(finite, entering, self.norms))
        self.skips.copy_(torch.cat((self.skips[1:], skipped[None])))
        self.total += skipped
        return skipped

    def limit(self) -> Tensor:
        """The largest norm that is no outlier, float32 []; infinite while too little is known."""
        if self.sigma is None:
            return torch.full_like(self.total, torch.inf)
        norms, known = self.norms.double(), self.norms >= 0  # the squares of large norms overflow in float32
        count = known.sum()
        mean = torch.where(known, norms, 0.0).sum() / count
        deviation = (torch.where(known, norms - mean, 0.0).square().sum() / count).sqrt()
        limit = torch.maximum(mean + self.sigma * deviation, HARMLESS * mean)
        # Norms of zero set no scale: nothing could follow them.
        return torch.where((count >= KNOWN) & (mean > 0), limit, torch.inf).float()

    def recent(self) -> Tensor:
        """How many of the last 100 steps were skipped, float32 []."""
        return self.skips.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors themselves."""
        return {"norms": self.norms, "skips": self.skips, "total": self.total}
