"""What the loader gives: windows of tokens, and where the documents in them begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch of windows.

    Attributes:
        windows: int64 [batch, seq_len + 1], the tokens.
        sources: index of each window's source, int32 [batch].
        cu_seqlens: borders of the documents in the flattened [batch * seq_len] tokens, rows included: int32, from 0 to
            batch * seq_len. A document includes its EOS. None without a document mask, as is `position_ids`.
        position_ids: position of each token in its document, or from the row's start, int64 [batch, seq_len].
        max_seqlen: tokens of the longest piece.
    """

    windows: torch.Tensor
    sources: torch.Tensor
    cu_seqlens: torch.Tensor | None
    position_ids: torch.Tensor | None
    max_seqlen: int

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [batch, seq_len]."""
        return self.windows[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [batch, seq_len]; labels[:, t] is the target of input_ids[:, t]."""
        return self.windows[:, 1:]

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the host does not wait where this is in page-locked memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory on the device until what `stream` has to do now is done."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **changed)

    def _tensors(self) -> dict[str, torch.Tensor]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
