"""How long a run takes, what it costs, how much data and disk it needs: arithmetic on its shape and a stated MFU.

tokens/s = GPUs * peak FLOP/s * MFU / FLOPs per token        (attention counted as causal, `train.flops`)
cost     = GPUs * hours * price of a GPU hour
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from shards.mixture import MixturePlan
from shards.pages import amount
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.flops import flops_per_token
from train.hardware import Gpu
from train.layout import make_layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.muon import is_matrix_of_block
from train.prepare import load_data_config, load_model_config, run_length, share_batch
from train.speed import duration

BUDGET, WEEK = 10_000.0, 7.0  # dollars and days that a 7B model may take
ENOUGH = 20  # tokens per parameter: best use of FLOPs (Hoffmann et al. 2022, arXiv 2203.15556)
REACHABLE = 0.6  # MFU in bf16: the products themselves reach 70 to 75 % of an H100's peak


@dataclass(frozen=True)
class SourceUse:
    """How much of a source a run reads; None where its size is not known."""

    name: str
    tokens: int
    epochs: float | None


@dataclass(frozen=True)
class RunPlan:
    """A run on `count` GPUs at `price` dollars an hour each.

    Attributes:
        mfu: share of the peak, attention counted as causal.
        flops, flops_full: of a token, with attention as causal and as the full square.
        optimizer_bytes: of the whole model.
        disk: bytes per second that all ranks together write.
    """

    gpu: Gpu
    count: int
    price: float
    mfu: float
    disk: float
    parameters: int
    active_parameters: int
    flops: int
    flops_full: int
    step_tokens: int
    steps: int
    ending: str
    optimizer_bytes: int
    sources: tuple[SourceUse, ...]

    @property
    def tokens(self) -> int:
        """Of the run."""
        return self.steps * self.step_tokens

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.count * self.gpu.flops * self.mfu / self.flops

    @property
    def mfu_full(self) -> float:
        """The same speed with the full square of attention counted."""
        return self.mfu * self.flops_full / self.flops

    @property
    def hours(self) -> float:
        """From the first step to the last."""
        return self.tokens / self.tokens_per_second / 3600

    @property
    def time(self) -> str:
        """In days, or as `2h07m` where it is less than one."""
        return f"{self.days:,.1f} days" if self.days >= 1 else duration(3600 * self.hours)

    @property
    def days(self) -> float:
        """From the first step to the last."""
        return self.hours / 24

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.hours * self.count * self.price

    @property
    def checkpoint_bytes(self) -> int:
        """Weights in float32 and the optimiser's state."""
        return 4 * self.parameters + self.optimizer_bytes

    @property
    def met(self) -> bool:
        """Whether the run stays within the budget and the week."""
        return self.cost <= BUDGET and self.days <= WEEK

    def verdict(self) -> list[str]:
        """Whether the run stays within $10k and a week, and what alone would make it so or is left over."""
        goal = f"{amount(self.parameters)} parameters at <= ${BUDGET:,.0f} and <= {WEEK:g} days"
        lines = [f"{goal}: {'met' if self.met else 'not met'} (${self.cost:,.2f}, {self.time})"]
        seconds = min(WEEK * 86400, BUDGET / (self.count * self.price) * 3600)
        affordable = self.tokens_per_second * seconds
        lines.append(
            f"both allow {amount(affordable)} tokens ({affordable / self.parameters:.0f} per parameter; "
            f"{ENOUGH} are {amount(ENOUGH * self.parameters)}); the run has {amount(self.tokens)}"
        )
        if self.met:
            return lines
        steps = math.floor(affordable / self.step_tokens)
        lines.append(f"fewer tokens: training.max_steps={steps} meets both")
        gpu_hours = self.hours * self.count
        if self.cost > BUDGET:
            lines.append(f"a lower price: ${BUDGET / gpu_hours:.2f} a GPU hour instead of ${self.price:.2f}")
        if self.days > WEEK:
            lines.append(f"more GPUs: {math.ceil(gpu_hours / (24 * WEEK)):,} instead of {self.count} for the week")
        needed = self.mfu * max(self.cost / BUDGET, self.days / WEEK)
        if needed <= REACHABLE:
            lines.append(f"more speed: an MFU of {needed:.0%} instead of {self.mfu:.0%}")
        else:
            short = f"even an MFU of {REACHABLE:.0%} falls short by a factor of {needed / REACHABLE:.1f}"
            lines.append(f"speed alone does not do: {short}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        names = ("tokens", "tokens_per_second", "mfu_full", "hours", "days", "cost", "checkpoint_bytes", "met")
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("gpu", "sources")}
        sources = [vars(source) for source in self.sources]
        return {**fields, **{name: getattr(self, name) for name in names}, "sources": sources}


def run_plan(config: ExperimentConfig, gpu: Gpu, count: int, *, price: float, mfu: float, disk: float) -> RunPlan:
    """Plan an experiment on `count` GPUs; its token datasets need not be there.

    Raises:
        UserError: the ranks do not fit the experiment, the mixture does not allow so many epochs.
    """
    model_config, mixture = load_model_config(config), load_data_config(config)
    with torch.device("meta"):
        model = ModelRegistry.create_model(model_config.model_type, model_config)
    length = config.data.max_seq_length or model_config.max_position_embeddings
    layout = make_layout(config, Ranks(0, count, torch.device("cpu"), None))
    global_batch, _ = share_batch(config, config.training.world_size or layout.data_size, layout)
    max_steps = config.training.max_steps
    plan = MixturePlan.build(mixture, length, total_samples=max_steps and max_steps * global_batch, without_data=True)
    steps, ending = run_length(max_steps, mixture, plan, global_batch)
    return RunPlan(
        gpu,
        count,
        price,
        mfu,
        disk,
        parameters=model.get_num_params(),
        active_parameters=model.get_num_active_params(),
        flops=flops_per_token(model, length),
        flops_full=flops_per_token(model, length, full_attention=True),
        step_tokens=global_batch * length,
        steps=steps,
        ending=ending,
        optimizer_bytes=_optimizer_bytes(model, config),
        sources=_sources(plan, steps * global_batch),
    )


def _optimizer_bytes(model: BaseModelForCausalLM, config: ExperimentConfig) -> int:
    """Two moments of each element, with Muon one of a block's matrices."""
    size = 2 if config.training.optimizer_state_dtype == "bf16" else 4
    muon = config.training.optimizer == "muon"
    return sum(
        parameter.numel() * size * (1 if muon and is_matrix_of_block(name, parameter) else 2)
        for name, parameter in model.named_parameters()
    )


def _sources(plan: MixturePlan, samples: int) -> tuple[SourceUse, ...]:
    """What the first `samples` windows draw from each source."""
    return tuple(
        SourceUse(source.name, draws * plan.seq_len, None if given.tokens is None else draws / source.windows)
        for source, given, draws in zip(plan.sources, plan.config.sources, plan.counts(samples), strict=True)
    )
