"""`minigpt-train --dry-run`: what a run would be, without a run folder and without a step."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from shards.describe import decode, explain, summarize, tables
from shards.errors import UserError
from tools.plan_memory import memory_plan
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.evaluate import Validation
from train.hardware import gpu_of
from train.metrics import check_mirrors
from train.prepare import Setup, prepare
from train.rollback import with_rollbacks
from train.run_state import RunState
from train.start_weights import start_folder

DOCUMENTS, CHARACTERS = 3, 200  # of the first batch that are shown


def dry_run(config: ExperimentConfig, nproc: int) -> None:
    """Print the resolved configuration, the data, the model, its memory, the layout of `nproc` ranks, the first batch.

    Raises:
        UserError: what would stop the run at its start.
    """
    setup = prepare(config, Ranks(0, nproc, torch.device("cpu"), None))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    _title(console, "configuration")
    console.out(setup.config.to_yaml(), end="")
    _title(console, "data")
    summary = summarize(setup.plan)
    for part in tables(summary):
        console.print(part)
    for warning in summary["warnings"]:
        console.out(f"note: {warning}")
    _title(console, "run")
    for line in _run(setup, nproc):
        console.out(line)
    _title(console, "memory")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(memory_plan(setup.config, nproc, gpu_of(device)).render())
    if device.type == "cpu":
        console.out("as CPUs compute it; minigpt-plan --gpu plans for a card that is not here")
    _title(console, "first batch")
    for line in _first_batch(setup):
        console.out(line)
    try:
        check_mirrors(config)
    except UserError as missing:  # on this machine, which may not be the one that trains
        console.out(f"\nnote: {missing}")
    console.out("\ndry run: nothing was written")


def _title(console: Console, text: str) -> None:
    console.out(f"\n── {text} " + "─" * (100 - len(text)))


def _run(setup: Setup, nproc: int) -> list[str]:
    config, training = setup.model.config, setup.config.training
    sets = Validation(setup.config.evaluation, setup.plan, training.batch_size, False, setup.layout).sets
    tokens = setup.global_batch * setup.plan.seq_len
    pretrained = setup.config.model.from_pretrained
    if setup.checkpoint is not None:
        step = RunState.read(setup.checkpoint).step
        start = f"{setup.checkpoint}, step {step:,}" + (": nothing is left to do" if step >= setup.total_steps else "")
    elif pretrained is not None:
        start = f"the weights in {start_folder(pretrained)}"
    else:
        start = f"random weights of seed {setup.config.experiment.seed}"
    return [
        f"model: {config.model_type}, {config.num_hidden_layers} layers, {setup.parameters:,} parameters, "
        f"{setup.flops_per_token:,} FLOPs per token of training",
        f"starts from {start}",
        f"{setup.ending}; a step is {setup.global_batch} windows of {setup.plan.seq_len:,} tokens = {tokens:,} tokens",
        f"layout: {nproc} rank(s), {setup.layout}; {setup.layout.data_size} data rank(s) x {setup.accumulation} "
        f"micro-batch(es) x {training.batch_size} windows",
        "validation: " + (", ".join(f"{s.name} ({len(s.starts):,} windows)" for s in sets) or "none"),
    ]


def _first_batch(setup: Setup) -> list[str]:
    """Where the next step's windows come from, and the beginnings of its first documents."""
    first = 0
    if setup.checkpoint is not None:
        state = RunState.read(setup.checkpoint)
        if setup.past_steps(state):
            state = with_rollbacks(state, Path(setup.config.checkpointing.output_dir))
        first = state.next_sample
        if state.step >= setup.total_steps:
            return ["none: the run is at its end"]
    samples = range(first, first + setup.global_batch)
    names = [source.name for source in setup.plan.sources]
    counts = Counter(names[index] for index in setup.plan.locate(np.array(samples)).source)
    lines = [
        f"samples [{samples.start:,}, {samples.stop:,}): "
        + ", ".join(f"{count:,} of {name}" for name, count in counts.most_common())
    ]
    for window in explain(setup.plan, samples[:DOCUMENTS]):
        document, text = window["documents"][0], decode(setup.plan, window)[0]
        lines.append(f"sample {window['sample']:,}, {window['source']}, document {document['id']}:")
        lines.append(f"  {text[:CHARACTERS]!r}")
    return lines
