"""The steps' micro-batches on the device: the next ones are on their way while a step runs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from shards.batch import Batch
from shards.loader import WindowLoader
from train.loss import IGNORE_INDEX


@dataclass(frozen=True)
class StepData:
    """What a rank works on in one step.

    Attributes:
        batches: its micro-batches, on the device.
        tokens: labels in them that count.
        next_sample: first sample of the step behind this one.
    """

    batches: list[Batch]
    tokens: int
    next_sample: int


class DeviceLoader:
    """Takes steps from a loader and sends them ahead, on a GPU from pinned memory and on a stream of its own.

    Attributes:
        next_sample: first sample of the step that `next` gives, whatever has been sent ahead.
    """

    def __init__(self, loader: WindowLoader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: StepData | None = None
        self.next_sample = loader.next_sample

    def __next__(self) -> StepData:
        step, self._ahead = self._ahead or self._send(), None
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            for batch in step.batches:
                batch.record_stream(stream)
        self.next_sample = step.next_sample
        return step

    def send_ahead(self) -> None:
        """Send the next step, if there is one; to be called when this one's work has been handed to the device."""
        if self._ahead is None:
            with contextlib.suppress(StopIteration):
                self._ahead = self._send()

    def close(self) -> None:
        """Stop the loader's threads."""
        self._loader.close()

    def _send(self) -> StepData:
        batches = next(self._loader)
        tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        with torch.cuda.stream(self._stream):  # without a stream it does nothing
            sent = [batch.to(self._device) for batch in batches]
        return StepData(sent, tokens, self._loader.next_sample)
