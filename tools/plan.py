"""`minigpt-plan`: what a run needs before it is started: memory, time, money, data, disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shards.errors import run_command

if TYPE_CHECKING:
    from rich.table import Table

    from tools.plan_run import RunPlan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def plan(
    config: Annotated[Path, typer.Option(metavar="FILE", help="Experiment file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.field=value…", help="Replace fields of the file.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100-80, a100-40, l40s, rtx4090, …")] = "h100",
    count: Annotated[int, typer.Option(min=1, help="GPUs, of one rank each.")] = 8,
    price: Annotated[float, typer.Option(min=0, help="Dollars for a GPU hour.")] = 2.5,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the bf16 peak that training reaches, causal attention.")
    ] = 0.45,
    disk: Annotated[float, typer.Option(min=0.001, help="GB/s that all ranks together write.")] = 2.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Also build rank 0 of all here, in real memory, and run a short step."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Plan a training run: memory of a GPU part by part, the largest micro-batch, time, cost, checkpoints, epochs.

    **Examples**

        minigpt-plan --config configs/experiments/active/exp001_llama7b_pretrain.yaml --gpu h100 --count 8

        minigpt-plan --config FILE.yaml --gpu h200 --count 64 --price 3.2 --mfu 0.5 training.batch_size=4

    Neither GPUs nor the token datasets have to be there: memory is counted by running the experiment's own step on
    tensors without memory (half a minute), sizes of sources are the `tokens` of the mixture file. Speed is not
    predicted: it follows from the MFU that you state.
    """
    from rich.console import Console

    from tools.plan_memory import memory_plan
    from tools.plan_run import run_plan
    from train.config import load_experiment
    from train.hardware import find_gpu

    experiment, card = load_experiment(config, overrides or []), find_gpu(gpu)
    run = run_plan(experiment, card, count, price=price, mfu=mfu, disk=disk * 1e9)
    with Console(stderr=True).status("running steps on tensors without memory, a minute or two at 7B"):
        memory = memory_plan(experiment, count, card)
    if as_json:
        print(json.dumps({"run": run.to_json(), "memory": memory.to_json()}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(
        f"[bold]{experiment.experiment.name}[/] on {count} x {gpu} ({card.tflops:g} TFLOP/s, {card.memory:g} GiB)"
    )
    console.print(memory.render())
    if advice := memory.advice():
        console.print(f"[bold red]{advice}")
    console.print(run_table(run))
    console.print(source_table(run))
    for number, line in enumerate(run.verdict()):
        console.print(("[bold]" if number == 0 else "  ") + line)
    if dry_run:
        from tools.plan_dry_run import dry_run as run_here

        run_here(experiment, count)


def run_table(run: RunPlan) -> Table:
    """Speed, time, cost and disk."""
    from rich.table import Table

    from shards.pages import amount

    table = Table(title="the run", show_header=False)
    active = "" if run.active_parameters == run.parameters else f", {run.active_parameters:,} at work on a token"
    tokens, write = run.tokens, run.checkpoint_bytes / run.disk
    rows = {
        "parameters": f"{run.parameters:,}{active}",
        "FLOPs of a token": f"{amount(run.flops)} ({amount(run.flops_full)} with the full square of attention)",
        "MFU, stated": f"{run.mfu:.1%} (the same speed is {run.mfu_full:.1%} with the full square)",
        "speed": f"{run.tokens_per_second:,.0f} tokens/s, {run.tokens_per_second / run.count:,.0f} a GPU",
        "a step": f"{run.step_tokens:,} tokens, {run.step_tokens / run.tokens_per_second:,.2f} s",
        "length": f"{run.steps:,} steps, {amount(tokens)} tokens, {tokens / run.parameters:.0f} per parameter",
        "": run.ending,
        "time": f"{run.time}, {run.hours * run.count:,.1f} GPU hours",
        "cost": f"${run.cost:,.2f} at ${run.price:g} a GPU hour",
        "checkpoint": f"{run.checkpoint_bytes / 1e9:,.2f} GB, {write:,.2f} s at {run.disk / 1e9:g} GB/s "
        f"(weights alone {4 * run.parameters / 1e9:,.2f} GB)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def source_table(run: RunPlan) -> Table:
    """What the run reads of each source."""
    from rich.table import Table

    from shards.pages import amount

    table = Table("source", title="data, sizes as the mixture file expects them")
    table.add_column("tokens", justify="right")
    table.add_column("epochs", justify="right")
    for source in run.sources:
        epochs = "?" if source.epochs is None else f"{source.epochs:.2f}"
        table.add_row(source.name, amount(source.tokens), epochs)
    return table


def main() -> None:
    """Entry point of `minigpt-plan`."""
    run_command(app)


if __name__ == "__main__":
    main()
