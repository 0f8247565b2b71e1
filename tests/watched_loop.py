"""A loop as the trainer's, without a model, whose ranks misbehave on request.

torchrun --nproc-per-node 2 tests/watched_loop.py RUN --seconds 3 --behave 1:5:sleep=6
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from train.distributed import start_ranks
from train.watch import Watch

STEPS, SAVE_STEP, STEP_SECONDS = 16, 2, 0.1


def sleep_in_the_forward_pass(seconds: float) -> None:
    time.sleep(seconds)


def hold_the_lock(seconds: float) -> None:
    """Sleep in C without letting other threads of Python run."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def stop(seconds: float) -> None:
    """SIGSTOP to this process; another lets it go on."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


ACTIONS = {"sleep": sleep_in_the_forward_pass, "lock": hold_the_lock, "stop": stop}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--behave", action="append", default=[], metavar="RANK:STEP:PHASE:ACTION=SECONDS")
    arguments = parser.parse_args()
    ranks = start_ranks("gloo")
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks.world_size - 1, 2)]
    watch = Watch(arguments.run, ranks, arguments.seconds)

    def behave(step: int, phase: str) -> None:
        for text in arguments.behave:
            rank, at, where, action, seconds = re.split("[:=]", text)
            if (int(rank), int(at), where) == (ranks.rank, step, phase):
                ACTIONS[action](float(seconds))

    for step in range(1, STEPS + 1):
        watch.beat(step, "data")
        behave(step, "data")
        ranks.sum_on_host([step])
        watch.beat(step, "step")
        behave(step, "step")
        if pairs:
            dist.all_reduce(torch.ones(1), group=pairs[ranks.rank // 2])
        time.sleep(STEP_SECONDS)
        dist.all_reduce(torch.ones(1))
        if step == SAVE_STEP:
            watch.beat(step, "save")
            behave(step, "save")
        ranks.barrier()
    watch.close()
    print(f"rank {ranks.rank} is at its end", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
