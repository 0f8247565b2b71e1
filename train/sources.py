"""Loss and tokens of each source of the mixture, between two rows of the log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.layout import Layout


class SourceLosses:
    """Sums per source on the device; the host waits for nothing before the numbers are fetched."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        # float64 holds sums of float32 exactly, in whatever order a GPU adds them, and counts up to 2^53.
        self._sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)

    def add(self, window_losses: Tensor | None, window_tokens: Tensor, source_index: Tensor) -> None:
        """Count a micro-batch; its tensors may be on the host.

        Args:
            window_losses: float32 [batch], sum of each window's token losses, or this rank's share of it; None: it has
                no share, as the first stage of a pipeline.
            window_tokens: int64 [batch], tokens of each window that have a loss, alike on all ranks that share it.
            source_index: int32 [batch], each window's source, as the number of its name.
        """
        losses = torch.zeros_like(window_tokens) if window_losses is None else window_losses
        device = self._sums.device
        values = [part.detach().to(device, torch.float64, non_blocking=True) for part in (losses, window_tokens)]
        self._sums.index_add_(0, source_index.to(device, non_blocking=True), torch.stack(values, 1))

    def collect(self, layout: Layout) -> dict[str, dict[str, Tensor]]:
        """Sums over all ranks since the last call, which all ranks make together.

        Returns:
            for each source `loss`, float64 [], the mean in nats per token (NaN where there was no token), and `tokens`,
            int64 [], on the device.
        """
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        if not layout.counts:
            sums[:, 1] = 0
        layout.ranks.sum_(sums)
        losses, tokens = (sums[:, 0] / sums[:, 1]).unbind(), sums[:, 1].long().unbind()
        return {name: {"loss": losses[i], "tokens": tokens[i]} for i, name in enumerate(self._names)}
