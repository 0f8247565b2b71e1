"""Forward and backward passes of this rank's micro-batches, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor

from shards.batch import Batch
from train.layout import Layout
from train.models import BaseModelForCausalLM, ModelOutput
from train.parallel import delay_reduction, reduce_gradients
from train.pipeline import Pipeline


class Passes:
    """Runs micro-batches through the model, or through the pipeline that it is a stage of.

    Args:
        batch_size, length: of a micro-batch.
        each: called before every pass, with "step" or "evaluate".
    """

    def __init__(
        self,
        model: BaseModelForCausalLM,
        layout: Layout,
        *,
        batch_size: int,
        length: int,
        each: Callable[[Literal["step", "evaluate"]], None] = lambda what: None,
    ) -> None:
        self.model, self._layout, self._each = model, layout, each
        self._pipeline = Pipeline(model, layout, batch_size=batch_size, length=length) if layout.pp > 1 else None

    def train(self, batches: list[Batch], tokens: int) -> list[ModelOutput]:
        """The gradients of a step: of (loss + balance loss) / tokens, summed over micro-batches and ranks.

        Args:
            batches: this rank's micro-batches, on the device.
            tokens: that count in the step, over all ranks.

        Returns:
            this rank's part of what each micro-batch gave, without graph; losses are sums over tokens.
        """
        passes = [partial(self._forward, batch) for batch in batches]
        if self._pipeline is not None:
            outputs = self._pipeline.train(passes, tokens)
        else:
            outputs = []
            for number, run in enumerate(passes, start=1):
                delay_reduction(self.model, number < len(passes))
                output = run()
                (output.objective / tokens).backward()
                outputs.append(output.detach())
        reduce_gradients(self.model, self._layout)
        return outputs

    def token_losses(self, **inputs: Tensor | bool | None) -> Tensor | None:
        """Loss of each token without gradient, float32 [batch, length]; None on ranks that are not to count it.

        Takes what the model takes.
        """
        run = partial(self.model, **inputs, reduction="none")
        self._each("evaluate")
        return (run() if self._pipeline is None else self._pipeline.evaluate(run)).loss

    def _forward(self, batch: Batch, hidden: Tensor | None = None) -> ModelOutput:
        self._each("step")
        return self.model(
            batch.input_ids,
            labels=batch.labels,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            mask_documents=batch.position_ids is not None,
            reduction="sum",
            hidden=hidden,
        )
