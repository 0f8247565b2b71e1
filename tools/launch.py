"""`minigpt-train`: a run of any stage, on one process or on several.

The stage of the experiment picks the entry file of `train/`. One process is started plainly, several by torchrun.
Signals go on to the ranks themselves: torchrun kills what takes longer than 30 seconds to save, and exits with 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from shards.errors import UserError, run_command, unknown_name
from train.config import ExperimentConfig, load_experiment
from train.signals import REQUEUE

ENTRY_FILES = {"pretrain": "train/pretrain.py", "midtrain": "train/midtrain.py"}
ROOT = Path(__file__).parent.parent

EXAMPLES = """
examples:
  minigpt-train --config configs/experiments/active/demo.yaml
  minigpt-train --config FILE.yaml --nproc 8 training.learning_rate=1e-4 checkpointing.save_steps=200
  minigpt-train --config FILE.yaml --dry-run

The same command again goes on where the run stopped. SIGTERM or Ctrl-C saves a checkpoint and exits with 0, SIGUSR2
with 75 (start me again); a second Ctrl-C stops at once. On several machines torchrun is started on each, as in
docs/slurm/train.sbatch.
"""


def launch() -> None:
    """Read the command line and start what it asks for."""
    parser = argparse.ArgumentParser(
        "minigpt-train",
        description="Train what an experiment file describes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="experiment file (YAML)")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine; default: one per GPU, one without a GPU"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH|auto|never",
        help="the checkpoint to go on from; auto, also the default: the newest of the run; never: start anew",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print configuration, data, model, memory, layout and the first batch; write and train nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replaces a field of the file")
    arguments, dashed = parser.parse_known_args()  # --section.field=value is taken as well
    if unknown := [word for word in dashed if word.startswith("-") and "=" not in word]:
        known = ["--config", "--nproc", "--resume", "--dry-run"]
        raise UserError(unknown_name("option", unknown[0], known))
    overrides = [*arguments.overrides, *dashed]
    resume = arguments.resume
    if resume is not None and "=" in resume and not Path(resume).exists():  # --resume section.field=value
        overrides, resume = [*overrides, resume], "auto"
    if resume is not None:
        overrides.append(f"checkpointing.resume_from_checkpoint={resume}")
    config = load_experiment(arguments.config, overrides)
    if arguments.dry_run:
        from tools.dry_run import dry_run

        dry_run(config, arguments.nproc or processes(None))  # of a larger machine, too
        return
    nproc = processes(arguments.nproc)
    if nproc > 1:
        check_layout(config, nproc)
    entry = os.path.relpath(ROOT / ENTRY_FILES[config.experiment.stage])
    program = [entry, "--config", arguments.config, *overrides]
    torchrun = ["--standalone", "--nproc-per-node", str(nproc)]
    sys.exit(run_ranks(["torchrun", *torchrun, *program] if nproc > 1 else ["python", *program]))


def check_layout(config: ExperimentConfig, nproc: int) -> None:
    """Find a layout that does not fit before torchrun does, whose report of it is long.

    Raises:
        UserError: the ranks do not fit the experiment.
    """
    import torch

    from train.distributed import Ranks
    from train.layout import make_layout

    make_layout(config, Ranks(0, nproc, torch.device("cpu"), None))


def processes(asked: int | None) -> int:
    """How many processes to start.

    Raises:
        UserError: more than there are GPUs, or less than one.
    """
    if asked == 1:
        return 1
    import torch

    gpus = torch.cuda.device_count()
    if asked is None:
        return max(1, gpus)
    if asked < 1:
        raise UserError(f"--nproc {asked}: at least one process is needed")
    if 0 < gpus < asked:
        raise UserError(f"--nproc {asked}: this machine has {gpus} GPU(s), and a process needs one of its own")
    return asked


def run_ranks(command: list[str]) -> int:
    """Print a command and run it to its end while handing the signals that ask a run to stop on to its ranks.

    A rank gets a signal as soon as it catches SIGUSR2: before that it would die of it, or ignore it. SIGUSR2 itself is
    ignored until then, and by torchrun always: it may come to all processes at once (`scancel --signal=USR2`).

    Args:
        command: "python …", a single rank, or "torchrun …", whose children the ranks are.

    Returns:
        the exit status: that of the command; 75 where SIGUSR2 stopped the ranks of torchrun, which has no status for
        that; 130 after a second Ctrl-C.
    """
    received: list[int] = []
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(stop, lambda number, _: received.append(number))
    print(shlex.join(command), flush=True)
    torchrun = command[0] == "torchrun"
    program = [sys.executable, *(["-m", "torch.distributed.run"] if torchrun else []), *command[1:]]
    # In a session of its own Ctrl-C reaches it only through here.
    process = subprocess.Popen(
        program, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    )
    handed: dict[int, int] = {}  # rank process -> how many of the signals it has got
    while process.poll() is None:
        ranks = (_children(process.pid) if torchrun else [process.pid]) if received else []
        if received.count(signal.SIGINT) > 1:
            for pid in {*ranks, process.pid}:
                _send(pid, signal.SIGKILL)
            process.wait()
            return 128 + signal.SIGINT
        for pid in ranks:
            if _catches(pid, signal.SIGUSR2):
                for number in received[handed.get(pid, 0) :]:
                    _send(pid, number)
                handed[pid] = len(received)
        time.sleep(0.1)
    if process.returncode == 0 and torchrun and signal.SIGUSR2 in received[: max(handed.values(), default=0)]:
        return REQUEUE
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended meanwhile
        return


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def main() -> None:
    """The command line."""
    run_command(launch)


if __name__ == "__main__":
    main()
