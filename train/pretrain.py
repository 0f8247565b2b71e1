"""Pretraining from one experiment file.

    torchrun --nproc-per-node 8 train/pretrain.py --config configs/experiments/FILE.yaml
    python train/pretrain.py --config FILE.yaml training.learning_rate=1e-4 checkpointing.save_steps=200

The same command again goes on where the run stopped, bit for bit. SIGTERM or Ctrl-C saves a checkpoint after the step
and exits with 0, SIGUSR2 with 75 (see train/signals.py). Signals are for the ranks, or for minigpt-train, which starts
them: torchrun exits with 1 on SIGTERM and kills what takes over 30 s.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError, run_command
from train.checkpoint import weights_sha256
from train.config import ExperimentConfig, load_experiment
from train.distributed import (
    Ranks,
    collect_garbage,
    freeze_garbage_collector,
    shorten_timeouts,
    start_ranks,
    thaw_garbage_collector,
)
from train.evaluate import Validation
from train.experts import ExpertBalance
from train.guard import RECENT
from train.loss import IGNORE_INDEX
from train.metrics import MetricsLog, check_mirrors, numbers, read_metrics
from train.models import BaseModelForCausalLM
from train.optim import create_optimizer
from train.parallel import parallelize
from train.passes import Passes
from train.plot import plot_losses
from train.prepare import Setup, prepare
from train.profiling import Profiler
from train.rollback import roll_back
from train.run_folder import RunFolder
from train.run_state import RunState
from train.schedule import learning_rate
from train.signals import StopRequest, exit_status
from train.sources import SourceLosses
from train.speed import MEASURED
from train.watch import Watch


def pretrain(config: ExperimentConfig, ranks: Ranks) -> int:
    """Train from the newest checkpoint, or from the start, to the end of the run or until told to stop.

    Returns:
        the exit status: 0, or what asks for another start (see `train.signals`).
    """
    with ExitStack() as closing:
        return _pretrain(config, ranks, closing)


def _pretrain(config: ExperimentConfig, ranks: Ranks, closing: ExitStack) -> int:
    stop = StopRequest()
    check_mirrors(config)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS has no other deterministic mode
        torch.use_deterministic_algorithms(True)
    setup = prepare(config, ranks)
    plan, layout, total_steps = setup.plan, setup.layout, setup.total_steps
    run = closing.enter_context(contextlib.closing(RunFolder(Path(config.checkpointing.output_dir), ranks)))
    setup.checkpoints.say = run.say
    model: BaseModelForCausalLM = setup.model
    parallelize(model, config, layout, fill=setup.fills)
    optimizer = create_optimizer(model, config.training, layout)
    watch = closing.enter_context(contextlib.closing(Watch(run.path, ranks, config.training.hang_timeout)))
    batch_size, documents = config.training.batch_size, config.data.document_mask
    passes = Passes(model, layout, batch_size=batch_size, length=plan.seq_len, each=lambda what: watch.beat(step, what))
    validation = Validation(config.evaluation, plan, batch_size, documents, layout)
    state = setup.resume(model, optimizer, run)
    if state.step < total_steps:
        setup.checkpoints.reserve(model, optimizer)
    if not validation.sets:
        run.say("no validation: evaluation.datasets is empty and no source has a val/ part (--val-fraction makes one)")
    experts = ExpertBalance(model, layout)
    sources = SourceLosses([source.name for source in plan.sources], ranks.device)
    speed = setup.speed(state.step)
    profiler = closing.enter_context(Profiler(config.profile, run.path, ranks, speed, run.say))
    data = setup.loader(state)
    log = MetricsLog(run.path, config, setup.past_steps(state), run.say) if ranks.is_first else None
    step, first_step, said_skips = state.step, state.step + 1, state.skipped_steps
    row: dict[str, Any] = {}  # the last one of the log

    def write(row: dict[str, Any]) -> None:
        if log is not None:
            with speed.waiting("log"):
                log.write({"step": step, "tokens": step * setup.global_batch * plan.seq_len, **row})

    def evaluate() -> None:
        if not validation.sets:
            return
        with speed.waiting("evaluate"):
            metrics = validation.run(passes)
        write(metrics)
        values = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items() if key != "val")
        run.say(f"step {step:>6}  {values}")

    def here() -> RunState:
        return setup.state_at(step, data.next_sample, int(optimizer.guard.total.item()), state.rollbacks)

    def save(*, wait: bool) -> None:
        watch.beat(step, "save")
        with speed.waiting("save"):
            if log is not None:
                log.sync()
            setup.checkpoints.save(here(), model, optimizer, wait=wait)

    if step == 0:
        evaluate()
    model.train()
    while step < total_steps:
        step += 1
        rate = learning_rate(step, config.training, total_steps)
        profiler.step(step)
        watch.beat(step, "data")
        with speed.waiting("data"):
            work = next(data)
        # One exchange between the hosts per step: the tokens that the loss is divided by, and whether to stop.
        told = [work.tokens if layout.counts else 0, stop.requested, stop.requeue]
        tokens, stopping, requeue = ranks.sum_on_host(told)
        loss = torch.zeros((), device=ranks.device)
        for batch, output in zip(work.batches, passes.train(work.batches, tokens), strict=True):
            assert output.loss is not None
            loss += output.loss / tokens
            experts.add(output, tokens)
            sources.add(output.window_losses, (batch.labels != IGNORE_INDEX).sum(1), batch.sources)
        norm, skipped = optimizer.step(rate)
        balance = experts.finish_step(skipped)
        with speed.waiting("data"):
            data.send_ahead()
        if step == first_step:
            shorten_timeouts()
            freeze_garbage_collector()
            closing.callback(thaw_garbage_collector)
        collect_garbage(step)

        last = step == total_steps
        if step % config.logging.log_steps == 0 or last:
            # The only place where the host waits for the device.
            guard = optimizer.guard
            found = {"loss": ranks.sum_(loss), "lr": rate, "grad_norm": norm, "sources": sources.collect(layout)}
            row = numbers({**found, **balance, "skipped_steps": guard.total.long()})
            bad = [step - RECENT + 1 + place for place in guard.skips.nonzero().flatten().tolist()]  # of the last ones
            write({"next_sample": data.next_sample, **row, **speed.measure(step)})
            run.say(f"{speed.status(step, row['loss'])}  lr {rate:.2e}  grad {row['grad_norm']:.2f}")
            if row["skipped_steps"] > said_skips:
                said_skips = row["skipped_steps"]
                run.say(
                    f"skipped, the gradient was not finite or far above the usual: step {', '.join(map(str, bad))} "
                    f"({said_skips} step(s) so far were skipped)"
                )
            if config.training.max_skips is not None and len(bad) >= config.training.max_skips:
                watch.beat(step, "save")  # reading may take as long
                if (before := roll_back(here(), bad, setup.checkpoints, ranks, model, optimizer, run)) is not None:
                    state, step, said_skips = before, before.step, before.skipped_steps
                    data.close()
                    data = setup.loader(state)
                    if log is not None:
                        log.close()
                        log = MetricsLog(run.path, config, step, run.say)
                    speed.go_back(step)
                    continue
        else:
            run.status(speed.status(step, row.get("loss")))
        if last or (config.logging.eval_steps and step % config.logging.eval_steps == 0):
            evaluate()
        if last or stopping or step % config.checkpointing.save_steps == 0:
            save(wait=last or stopping > 0)
        setup.checkpoints.poll()
        if stopping and not last:
            run.say(f"stopped on request at step {step}, checkpoint saved; the same command goes on from here")
            break
    data.close()
    if log is not None:
        log.close()
    run.say(speed.account())
    if step < total_steps:
        return exit_status(requeue > 0)
    finish(run, setup)
    return 0


def finish(run: RunFolder, setup: Setup) -> None:
    """Write `results.json` and the loss curve, and say where everything is."""
    if not setup.ranks.is_first:
        return
    checkpoint = next(reversed(setup.checkpoints.all()), setup.checkpoint)
    assert checkpoint is not None  # the last step was saved, here or where the run was started from
    rows = read_metrics(run.path / "metrics.jsonl")
    values: dict[str, Any] = {}
    for row in rows:
        values |= {key: value for key, value in row.items() if key not in (*MEASURED, "next_sample")}
    initial = {f"initial_{k}": v for row in rows[:1] for k, v in row.items() if k in ("val_loss", "val_bpb")}
    run.say(f"done: {setup.ending}")
    try:
        run.write_json("results.json", {**values, **initial, "weights_sha256": weights_sha256(checkpoint)})
        plot_losses(rows, run.path / "loss.png", setup.config.experiment.name)
    except OSError as error:
        run.say(f"results.json or loss.png could not be written ({error}): make room, the same command writes them")
    for label, name in [("results", "results.json"), ("curve", "loss.png"), ("metrics", "metrics.jsonl")]:
        run.say(f"  {label:<12}{run.path / name}")
    run.say(f"  {'checkpoint':<12}{checkpoint}")


def main(stage: str = "pretrain", description: str | None = __doc__) -> None:
    """The command line of a stage."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replaces a field of the file")
    arguments, dashed = parser.parse_known_args()  # --section.field=value is taken as well
    config = load_experiment(arguments.config, [*arguments.overrides, *dashed])
    if config.experiment.stage != stage:
        raise UserError(
            f"{arguments.config}: its experiment.stage is {config.experiment.stage}: start it with "
            f"train/{config.experiment.stage}.py, or with minigpt-train, which picks the right one"
        )
    ranks = start_ranks(config.training.backend, Path(config.checkpointing.output_dir))
    status = pretrain(config, ranks)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)


if __name__ == "__main__":
    run_command(main)
