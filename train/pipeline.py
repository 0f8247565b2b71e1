"""Pipeline parallelism: each stage has a range of the layers, micro-batches flow through (1F1B, arXiv 1806.03377).

`torch.distributed.pipelining` sends activations and gradients and orders the passes. Every rank of a pipeline loads the
same micro-batches, so only hidden states travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from shards.errors import UserError
from train.layout import Layout
from train.models.transformer import BaseModelForCausalLM, ModelOutput

Pass = Callable[..., ModelOutput]  # one micro-batch through the model; `hidden` is what the stage before gave


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The layers of a stage; the first stages have one more where they do not divide evenly, the last has the head."""
    size, more = divmod(layers, stages)
    first = stage * size + min(stage, more)
    return range(first, first + size + (stage < more))


def keep_stage(model: BaseModelForCausalLM, layout: Layout) -> None:
    """Leave this rank the part of a model on the meta device that its stage has.

    Raises:
        UserError: there are more stages than layers.
    """
    count, last = model.config.num_hidden_layers, layout.stage == layout.pp - 1
    if layout.pp > count:
        raise UserError(f"parallel.pp is {layout.pp}, but the model has only {count} layers to share among the stages")
    layers = dict(model.layers.named_children())
    model.layers = nn.ModuleDict({str(n): layers[str(n)] for n in stage_layers(count, layout.pp, layout.stage)})
    tied = model.config.tie_word_embeddings
    model.tied_across_stages = tied and (layout.stage == 0 or last)
    if layout.stage > 0 and not (tied and last):
        del model.embed_tokens
    if not last:
        model.norm = None
        if not tied:
            del model.lm_head


class Pipeline:
    """Runs the micro-batches of a step, or of an evaluation, through the stages."""

    def __init__(self, model: BaseModelForCausalLM, layout: Layout, *, batch_size: int, length: int) -> None:
        self._layout, self._device = layout, layout.ranks.device
        self._model, self._group = model, layout.mesh.get_group("pp")
        shape = (batch_size, length // layout.tp, model.config.hidden_size)
        self._hidden = torch.empty(shape, dtype=model.compute_dtype, device="meta")
        self._schedules: dict[int, tuple[_Stage, Schedule1F1B]] = {}

    def train(self, passes: Sequence[Pass], tokens: int) -> list[ModelOutput]:
        """Forward and backward of all micro-batches of a step of `tokens` tokens; gradients are left on the parameters.

        Returns:
            what each gave, without gradients; the loss is zero in all stages but the last.
        """
        if len(passes) not in self._schedules:
            stage = _Stage(self._model, self._layout, self._hidden, self._group)
            schedule = Schedule1F1B(stage, len(passes), loss_fn=lambda loss, _: loss, scale_grads=False)
            self._schedules[len(passes)] = stage, schedule
        stage, schedule = self._schedules[len(passes)]
        stage.passes, stage.tokens, stage.outputs = passes, tokens, []
        number = torch.arange(len(passes))  # the stage has its micro-batches already; these only count them
        arguments = (number,) if self._layout.stage == 0 else ()
        schedule.step(*arguments, target=number, return_outputs=False)
        return stage.outputs

    @torch.no_grad()
    def evaluate(self, run: Pass) -> ModelOutput:
        """One forward pass through all stages; the loss is there in the last."""
        stage, first, last = self._layout.stage, self._layout.stage == 0, self._layout.stage == self._layout.pp - 1
        hidden = None
        if not first:
            hidden = torch.empty_like(self._hidden, device=self._device)
            dist.recv(hidden, group=self._group, group_src=stage - 1)
        output = run(hidden=hidden)
        if not last:
            assert output.hidden is not None
            dist.send(output.hidden.contiguous(), group=self._group, group_dst=stage + 1)
        return output


class _Stage(PipelineStage):
    """Takes its micro-batches from `passes`, in the order in which 1F1B runs them forward."""

    passes: Sequence[Pass]
    tokens: int
    outputs: list[ModelOutput]

    def __init__(self, model: BaseModelForCausalLM, layout: Layout, hidden: Tensor, group: Any) -> None:
        first, last = layout.stage == 0, layout.stage == layout.pp - 1
        received = torch.empty(1, dtype=torch.int64, device="meta") if first else hidden.clone().requires_grad_()
        given = torch.empty((), device="meta", requires_grad=True) if last else hidden.clone().requires_grad_()
        super().__init__(
            model,
            layout.stage,
            layout.pp,
            layout.ranks.device,
            input_args=received,
            output_args=given,
            group=group,
        )

    def forward_maybe_with_nosync(self, received: Tensor, **_: Any) -> Tensor:
        """The next micro-batch: hidden states for the next stage, or in the last the part of the objective."""
        run = self.passes[len(self.outputs)]
        output = run() if self.is_first else run(hidden=received)
        if output.hidden is None:
            assert output.loss is not None
            result: Tensor = output.objective / self.tokens
        elif output.balance_loss is None:
            result = output.hidden
        else:
            result = _AddLoss.apply(output.hidden, output.balance_loss / self.tokens)
        done = output.detach()
        done.loss = torch.zeros((), device=self.device) if done.loss is None else done.loss
        done.hidden = None
        self.outputs.append(done)
        return result


class _AddLoss(torch.autograd.Function):
    """x as it is; in backward `loss` is minimised too. For a loss of a stage that hands on nothing but `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad, torch.ones((), dtype=dtype, device=device)
