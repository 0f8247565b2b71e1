"""Memory of one GPU over a training step, part by part, and the largest micro-batch that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tools.plan_trace import StepMemory, one_of, step_memory
from train.config import ExperimentConfig
from train.hardware import Gpu
from train.layout import make_layout
from train.prepare import load_model_config, share_batch
from train.recompute import Recompute

GIB = 2**30
MODES: tuple[Recompute, ...] = ("none", "selective", "full")
# Estimates, not measured: CUDA's context and code take about 0.5 GiB, NCCL's buffers about 1; and the allocator cannot
# use every gap between tensors.
OVERHEAD = int(1.5 * GIB)
FRAGMENTED = 0.04  # of the card


@dataclass(frozen=True)
class MemoryPlan:
    """What a step takes on the fullest rank.

    Attributes:
        step: with the experiment's micro-batch and activation checkpointing.
        mode: that activation checkpointing.
        activations: bytes kept between forward and backward, by activation checkpointing.
        largest: micro-batch that fits the GPU, by activation checkpointing; 0: none does. Empty without a GPU.
    """

    gpu: Gpu | None
    layout: str
    batch_size: int
    length: int
    accumulation: int
    mode: Recompute
    step: StepMemory
    activations: dict[Recompute, int]
    largest: dict[Recompute, int]

    @property
    def total(self) -> int:
        """Bytes of the step and what lies under it on a GPU."""
        return self.step.peak + overhead(self.gpu)

    @property
    def fits(self) -> bool | None:
        """Whether the experiment's micro-batch fits the GPU; None without one."""
        return None if self.gpu is None else self.total <= self.gpu.bytes

    def advice(self) -> str | None:
        """What would fit, where the experiment does not."""
        if self.gpu is None or self.fits:
            return None
        if options := [(self.largest[mode], mode) for mode in MODES if self.largest[mode]]:
            choices = " or ".join(f"at most {batch} with activation_checkpointing {mode}" for batch, mode in options)
            return f"does not fit: training.batch_size can be {choices}"
        if self.total - self.step.gradients <= self.gpu.bytes:
            return "does not fit: with training.gradient_accumulation_steps=1 no gradients have to wait, and it does"
        return "does not fit, nor does a single window: take more GPUs with fsdp, parallel.tp or parallel.pp"

    def render(self) -> Table:
        """A table of all parts."""
        table = Table(title=f"memory of a rank, {self.layout}, {self.batch_size} x {self.length:,} tokens")
        table.add_column("part")
        table.add_column("GiB", justify="right")
        table.add_column("of it", style="dim")
        notes = {
            "weights": "float32",
            "optimizer": "state",
            "gradients": "of earlier micro-batches" if self.accumulation > 1 else "made in backward, below",
            "gathered": "embedding, norm and head, whole during a micro-batch",
            "activations": f"kept for backward, checkpointing {self.mode}",
            "working": "blocks gathered, gradients under way, activations computed again, logits",
        }
        for part, note in notes.items():
            table.add_row(part, gib(getattr(self.step, part)), note)
        if self.gpu is not None:
            table.add_row("overhead", gib(overhead(self.gpu)), "CUDA, NCCL, gaps between tensors: estimated")
        table.add_section()
        table.add_row("total", gib(self.total), "" if self.gpu is None else f"of {self.gpu.memory:g} GiB", style="bold")
        if self.gpu is not None:
            table.add_section()
            for mode in MODES:
                fits = f"largest micro-batch that fits: {self.largest[mode] or 'none'}"
                table.add_row(f"activations, {mode}", gib(self.activations[mode]), fits)
        return table

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**dataclasses.asdict(self), "total": self.total, "fits": self.fits}


def memory_plan(config: ExperimentConfig, world_size: int, gpu: Gpu | None = None) -> MemoryPlan:
    """Memory of an experiment on `world_size` ranks, by running its step on tensors without memory (some 10 s a run).

    Without a GPU the plan is for CPUs, whose attention kernel keeps something else, and `largest` stays empty.

    Raises:
        UserError: the ranks do not fit the experiment.
    """
    kernel = "sdpa" if gpu is None else "flash"
    model = load_model_config(config)
    length = config.data.max_seq_length or model.max_position_embeddings
    mode = config.training.activation_checkpointing or ("full" if model.gradient_checkpointing else "none")
    size = config.training.batch_size

    def step(batch_size: int, mode: Recompute) -> StepMemory:
        fields = {"batch_size": batch_size, "activation_checkpointing": mode}
        changed = config.model_copy(update={"training": config.training.model_copy(update=fields)})
        found = []
        for rank in {0, world_size - 1}:  # of the first and of the last stage
            with one_of(world_size, rank) as ranks:
                layout = make_layout(config, ranks)
                if layout.pp > 1 or rank == 0:
                    found.append(step_memory(changed, ranks, length, accumulation, kernel))
        return max(found, key=lambda memory: memory.peak)

    with one_of(world_size) as ranks:
        layout = make_layout(config, ranks)
    _, accumulation = share_batch(config, config.training.world_size or layout.data_size, layout)
    steps = {mode: step(size, mode) for mode in (MODES if gpu is not None else (mode,))}
    largest: dict[Recompute, int] = {}
    if gpu is not None:
        for name, memory in steps.items():
            more = step(2 * size, name)
            window = (more.peak - memory.peak) / size  # bytes
            room = gpu.bytes - overhead(gpu) - memory.peak
            largest[name] = max(0, int(size + room // window))
    activations = {name: memory.activations for name, memory in steps.items()}
    return MemoryPlan(gpu, str(layout), size, length, accumulation, mode, steps[mode], activations, largest)


def overhead(gpu: Gpu | None) -> int:
    """Bytes of a GPU that no tensor can have."""
    return 0 if gpu is None else OVERHEAD + int(FRAGMENTED * gpu.bytes)


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:,.2f}" if size >= GIB else f"{size / GIB:.4f}"
