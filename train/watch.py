"""Which rank hangs, where, and what the others do: reported while it hangs, without ending the run.

Every rank arms a timer of `faulthandler` with its beats: a thread in C, which writes the stacks of a rank that falls
silent to `logs/stacks/rank-00003.txt` even where Python cannot run. A thread in Python writes a heartbeat to
`logs/heartbeat/rank-00003.json`, whatever the main thread does: its last beat, and how many collectives it has
entered in each process group.

In a hang all ranks are silent, for a step needs all of them. Rank a waits for rank b if a has entered a collective
that b has not. The ranks that hang are those that others wait for and that wait for nobody; where the counts do not
tell (the messages of a pipeline are not counted), those that are not in a call of torch.distributed by their stacks;
where those do not tell either, no rank is blamed.

The clocks of the hosts need not agree: a heartbeat says how long its rank has been silent, and the reader measures
how long the file has not changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Literal

import torch.distributed as dist

from train.distributed import Ranks, process_groups

Phase = Literal["step", "data", "evaluate", "save"]
HUNG = 0.8  # part of the time, so that the report is there when it is over
CERTAIN = 0.1  # part of the time for which all ranks must stand as they do
PATIENCE = 10  # times as long for what may rightly take long
STACK_LINES = 16  # of a stack in a report
STATES = {  # in /proc/PID/stat
    "T": "the process is stopped (SIGSTOP); kill -CONT {pid} lets it go on",
    "t": "the process is held by a debugger",
    "D": "the process waits in the kernel, mostly for a disk or a network file system",
    "Z": "the process is dead",
    "": "the process is gone",
}


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What a rank tells of itself every few seconds.

    Attributes:
        beats: calls of `Watch.beat` so far.
        silent: seconds since the last one.
        allowed: seconds of silence that are right in this phase.
        collectives: collectives entered so far, by process group.
        stack_start: where in the rank's stack file a dump of this silence begins, in bytes.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: Phase
    beats: int
    silent: float
    allowed: float
    collectives: dict[str, int]
    stack_start: int


def hanging(ranks: Sequence[Heartbeat], exchanging: Callable[[Heartbeat], bool]) -> list[Heartbeat]:
    """Those of the silent ranks that the others wait for; all of them if nothing tells them apart.

    Args:
        exchanging: whether a rank is in a call of torch.distributed.
    """

    def waits_for(a: Heartbeat, b: Heartbeat) -> bool:
        return any(count > b.collectives.get(group, count) for group, count in a.collectives.items())

    awaited = [b for b in ranks if any(waits_for(a, b) for a in ranks) and not any(waits_for(b, a) for a in ranks)]
    return awaited or [rank for rank in ranks if not exchanging(rank)] or list(ranks)


class Watch:
    """Reports ranks that do nothing, with their stacks, before `seconds` are over: from 0.8 times as many on.

    Ten times as long is right for `save`, and for the first step in which a process enters a phase, for it compiles.

    Files are read and written under `run_path/logs`; a disk that fails costs a line, not the run. The first rank
    reports; the second does where the first is stopped or holds the interpreter's lock.
    """

    def __init__(self, run_path: Path, ranks: Ranks, seconds: float) -> None:
        self._ranks, self._seconds = ranks, seconds
        self._interval = min(5.0, seconds / 30)  # of heartbeats
        self._logs = run_path / "logs"
        self._first_step: dict[Phase, int] = {}
        self._phase: Phase = "data"
        self._step, self._beats, self._allowed = 0, 0, seconds * PATIENCE
        self._beaten = self._armed = time.monotonic()
        self._stacks: IO[bytes] | None = None
        self._stack_start = 0
        self._seen: dict[int, tuple[str, float, int]] = {}  # of each rank: heartbeat, since when, size of the stacks
        self._suspects: tuple[list[tuple[int, int]], float] = ([], 0.0)  # that seem to hang (rank, beats), since when
        self._reported: dict[int, tuple[int, float]] = {}  # of each rank reported: its beats, and since when
        self._failed = False
        self._closing = threading.Event()
        try:
            for folder in ("stacks", "heartbeat", "flight"):
                (self._logs / folder).mkdir(parents=True, exist_ok=True)
            if ranks.is_first:
                for left in (self._logs / "heartbeat").glob("rank-*.json"):  # by a run that was killed
                    left.unlink(missing_ok=True)
            self._stacks = self._file("stacks", ranks.rank).open("ab")
        except OSError as error:
            self._complain(error)
        self._arm()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank begins with a part of `step`; about a microsecond, mostly."""
        now, allowed = time.monotonic(), self._seconds
        if phase == "save" or self._first_step.setdefault(phase, step) == step:
            allowed *= PATIENCE
        rearm = allowed != self._allowed or now - self._armed > self._seconds / 10
        self._step, self._phase, self._beats, self._allowed, self._beaten = step, phase, self._beats + 1, allowed, now
        if rearm:
            self._arm()

    def close(self) -> None:
        """Stop watching, and remove what has no more use."""
        faulthandler.cancel_dump_traceback_later()
        self._closing.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(OSError):
            self._file("heartbeat", self._ranks.rank).unlink(missing_ok=True)
            if self._stacks is not None:
                self._stacks.close()
                if not self._file("stacks", self._ranks.rank).stat().st_size:
                    self._file("stacks", self._ranks.rank).unlink()
        for folder in ("stacks", "heartbeat", "flight"):
            with contextlib.suppress(OSError):  # not empty: another rank's files, or dumps
                (self._logs / folder).rmdir()

    def _file(self, folder: Literal["stacks", "heartbeat"], rank: int) -> Path:
        return self._logs / folder / f"rank-{rank:05}.{'txt' if folder == 'stacks' else 'json'}"

    def _arm(self) -> None:
        """Start the timer anew: a dump comes after 0.7 to 0.8 of the time, as not every beat does so."""
        if self._stacks is not None:
            self._armed = time.monotonic()
            self._stack_start = os.fstat(self._stacks.fileno()).st_size
            faulthandler.dump_traceback_later(self._allowed * HUNG, file=self._stacks)

    def _run(self) -> None:
        while True:
            try:
                self._write()
                if self._ranks.rank < 2:
                    self._look()
            except OSError as error:
                self._complain(error)
            if self._closing.wait(self._interval):
                return

    def _write(self) -> None:
        """Write this rank's heartbeat; without fsync, for it need not survive a power cut."""
        path = self._file("heartbeat", self._ranks.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self._own()) | {"time": time.time()}))
        temporary.replace(path)

    def _own(self) -> Heartbeat:
        collectives = {}
        for group in process_groups():
            members = dist.get_process_group_ranks(group)
            name = f"{group.group_name}: {len(members)} ranks, {members[0]} to {members[-1]}"
            collectives[name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return Heartbeat(
            self._ranks.rank,
            socket.gethostname(),
            os.getpid(),
            self._step,
            self._phase,
            self._beats,
            time.monotonic() - self._beaten,
            self._allowed,
            collectives,
            self._stack_start,
        )

    def _look(self) -> None:
        """Report ranks that hang, and those that go on again."""
        if time.monotonic() - self._beaten < self._interval and not self._reported:
            return
        found = self._read()
        for rank in found:
            beats, since = self._reported.get(rank.rank, (rank.beats, 0))
            if rank.beats != beats:
                del self._reported[rank.rank]
                self._say(f"rank {rank.rank} goes on, {time.monotonic() - since:.0f} s after it fell silent")
        suspects = self._suspected(found)
        names, now = [(rank.rank, rank.beats) for rank in suspects], time.monotonic()
        if names != self._suspects[0]:
            self._suspects = (names, now)
        if now - self._suspects[1] < CERTAIN * self._seconds:  # the processes may have been stopped until now
            return
        if all(self._reported.get(rank, (-1, 0))[0] == beats for rank, beats in names):
            return
        for rank in suspects:
            self._reported[rank.rank] = (rank.beats, now - rank.silent)
        self._say(self._report(suspects, found))

    def _read(self) -> list[Heartbeat]:
        """The heartbeats of all ranks that have one, this rank's from memory; their silence as of now."""
        found, now = [], time.monotonic()
        with os.scandir(self._logs / "heartbeat") as folder:  # which makes a network file system look anew
            present = {entry.name for entry in folder}
        for rank in range(self._ranks.world_size):
            path = self._file("heartbeat", rank)
            if rank == self._ranks.rank:
                found.append(self._own())
            elif path.name in present:
                try:
                    text = path.read_text()
                except FileNotFoundError:  # it has just ended
                    continue
                if rank not in self._seen or text != self._seen[rank][0]:
                    stacks = self._file("stacks", rank)
                    self._seen[rank] = (text, now, stacks.stat().st_size if stacks.exists() else 0)
                fields = json.loads(text)
                del fields["time"]  # for people
                fields["silent"] += now - self._seen[rank][1]
                found.append(Heartbeat(**fields))
        return found

    def _is_stale(self, rank: Heartbeat) -> bool:
        """Whether not only the main thread of a rank is silent, but its heartbeat has stopped."""
        return rank.rank in self._seen and time.monotonic() - self._seen[rank.rank][1] > self._seconds / 3

    def _suspected(self, found: list[Heartbeat]) -> list[Heartbeat]:
        """Those that hang, and that this rank is to report."""
        if any(rank.silent < HUNG * self._seconds for rank in found):
            return []
        if self._ranks.rank == 1 and not any(rank.rank == 0 and self._is_stale(rank) for rank in found):
            return []
        suspects = hanging(found, self._exchanging)
        return suspects if all(rank.silent > HUNG * rank.allowed for rank in suspects) else []

    def _report(self, suspects: list[Heartbeat], found: list[Heartbeat]) -> str:
        """What there is to know of the hang: a line on each rank that hangs, with its stack, and one on the others."""
        lines = []
        alike = len(suspects) == len(found) > 1
        if alike:
            lines.append(
                f"all {len(found)} ranks hang at the same place: they wait for a device, the network or each other; "
                f"{self._logs / 'flight'} has the exchanges of each rank when one of them times out on GPUs"
            )
        for rank in suspects:
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - rank.silent))
            who = f"rank {rank.rank} (host {rank.host}, pid {rank.pid})"
            where = f"{'last heard of ' if self._is_stale(rank) else ''}in step {rank.step}, phase {rank.phase}"
            verb = "is silent" if alike else "hangs"
            lines.append(f"{who} {verb} since {since}, for {rank.silent:.0f} s, {where}{self._condition(rank)}")
            if len(lines) < 50:
                stack, path = self._stack(rank)[:STACK_LINES], self._file("stacks", rank.rank)
                lines.append(f"    its stack, innermost call first ({path}):" if stack else f"    no stack in {path}")
                lines += [f"    {line}" for line in stack]
        others = [rank for rank in found if rank not in suspects]
        if others:
            places = sorted({(rank.step, rank.phase) for rank in others})
            names = ", ".join(str(rank.rank) for rank in others)
            at = " or ".join(f"step {step}, phase {phase}" for step, phase in places)
            lines.append(f"  waiting for it: rank(s) {names}, in {at}; their stacks are in the same folder")
        if missing := set(range(self._ranks.world_size)) - {rank.rank for rank in found}:
            lines.append(f"  without a heartbeat: rank(s) {', '.join(map(str, sorted(missing)))}")
        return "\n".join(lines)

    def _condition(self, rank: Heartbeat) -> str:
        """What is known of its process."""
        if rank.host == socket.gethostname():
            try:
                state = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = ""
            if state in STATES:
                return "; " + STATES[state].format(pid=rank.pid)
        if not self._is_stale(rank):
            return ""
        return (
            "; its heartbeat has stopped, too: the process is stopped, its host is gone, a call holds Python's lock, "
            "or it cannot write to the run folder"
        )

    def _exchanging(self, rank: Heartbeat) -> bool:
        """Whether a rank's main thread is in a call of torch.distributed, but not where checkpoints are written."""
        innermost = (*self._stack(rank), "")[0]
        return "/torch/distributed/" in innermost and "/torch/distributed/checkpoint/" not in innermost

    def _stack(self, rank: Heartbeat) -> list[str]:
        """The stack of a rank's main thread, the innermost call first; empty where it could not be written."""
        # What was in the file when the heartbeat stopped is of an earlier silence; the heartbeat did not get to say so.
        start = self._seen[rank.rank][2] if self._is_stale(rank) else rank.stack_start
        try:
            with self._file("stacks", rank.rank).open("rb") as file:
                file.seek(start)
                threads = file.read().decode(errors="replace").split("\n\n")
        except OSError:
            return []
        return [line.strip() for line in threads[-1].splitlines() if line.startswith("  ")]  # the main thread is last

    def _say(self, message: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads the output any more
            print(message, file=sys.stderr, flush=True)
        with (self._logs / "train.log").open(
            "ab", buffering=0
        ) as log:  # in one piece, for the run's own log grows, too
            log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {message}\n".encode())

    def _complain(self, error: OSError) -> None:
        """Say once that the watch is limited."""
        if not self._failed:
            self._failed = True
            with contextlib.suppress(OSError):
                print(f"rank {self._ranks.rank}: a hang may go unreported: {error}", file=sys.stderr, flush=True)
