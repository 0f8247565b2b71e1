"""How fast a run trains, what it waits for, and what memory it takes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

# Fields of a row that `Speed` measures: all others are the same each time that a run is made.
MEASURED = ("tokens_per_second", "tflops_per_device", "mfu", "mfu_full", "memory_gb", "data_wait", "blocked")
Wait = Literal["data", "evaluate", "log", "save"]
WAITS: tuple[Wait, ...] = get_args(Wait)
PROCESS_STATUS = Path("/proc/self/status")  # of Linux


class Speed:
    """How fast a run trains, and what it waits for.

    Tokens per second and all that follows from them count the time of training alone: what `waiting` spent on anything
    but "data" is left out of it, and stated as `blocked`.
    """

    def __init__(
        self,
        step: int,
        total_steps: int,
        tokens_per_step: int,
        *,
        flops_per_token: int,
        flops_per_token_full: int,
        peak: float | None,
        devices: int,
        device: torch.device,
    ) -> None:
        """Start the clock.

        Args:
            step: updates that are done already.
            total_steps: updates at the end of the run.
            tokens_per_step: over all ranks.
            flops_per_token, flops_per_token_full: with attention counted as causal, and as the full square.
            peak: FLOP/s of one device; None where it is not known.
            devices: that share the work.
            device: of this rank, whose memory is measured.
        """
        self._total_steps, self._tokens = total_steps, tokens_per_step
        self._flops, self._flops_full = flops_per_token, flops_per_token_full
        self._peak, self._devices, self._device = peak, devices, device
        self._step = step  # of the last row
        self._rate = math.nan  # tokens per second up to there
        self._start = self._time = time.perf_counter()
        self._waits = dict.fromkeys(WAITS, 0.0)  # seconds since the last row
        self._all_waits = dict.fromkeys(WAITS, 0.0)  # seconds before it
        self._waiting = False

    @contextlib.contextmanager
    def waiting(self, what: Wait) -> Iterator[None]:
        """Count the time of the block as spent on `what`; a block within another counts as the outer one's."""
        if self._waiting:
            yield
            return
        if what != "data" and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the steps that are still under way are training
        self._waiting = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waits[what] += time.perf_counter() - start
            self._waiting = False

    def measure(self, step: int) -> dict[str, Any]:
        """The fields `MEASURED` of a row, over the steps since the last call.

        Returns:
            `tokens_per_second` of all ranks together; `tflops_per_device`, the model's FLOPs with causal attention;
            where the peak is known `mfu`, their share of it, and `mfu_full` with the full square of attention counted;
            `memory_gb` as `memory_gb` has it; `data_wait` and, by name, `blocked`: shares of the time that passed.
        """
        now = time.perf_counter()
        passed = max(now - self._time, 1e-9)
        blocked = {what: seconds for what, seconds in self._waits.items() if what != "data"}
        training = max(passed - sum(blocked.values()), 1e-9)
        self._rate = (step - self._step) * self._tokens / training
        per_device = self._rate / self._devices
        row: dict[str, Any] = {
            "tokens_per_second": self._rate,
            "tflops_per_device": self._flops * per_device / 1e12,
        }
        if self._peak is not None:
            row["mfu"] = self._flops * per_device / self._peak
            row["mfu_full"] = self._flops_full * per_device / self._peak
        row["memory_gb"] = memory_gb(self._device)
        row["data_wait"] = self._waits["data"] / passed
        row["blocked"] = {what: seconds / passed for what, seconds in blocked.items()}
        self._begin(step, now)
        return row

    def go_back(self, step: int) -> None:
        """Count from an earlier step on, after a rollback."""
        self._begin(step, time.perf_counter())

    def status(self, step: int, loss: float | None) -> str:
        """Where the run stands, in a line, as far as it is known: `loss` and the speed are those of the last row.

        Asks the device nothing.
        """
        parts = [f"step {step:>6}/{self._total_steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if self._rate > 0:
            left = (self._total_steps - step) * self._tokens / self._rate
            parts += [f"{self._rate:,.0f} tok/s", f"ETA {duration(left)}"]
        return "  ".join(parts)

    def account(self) -> str:
        """What the time since the start was spent on, in a line."""
        passed = max(time.perf_counter() - self._start, 1e-9)
        shares = ", ".join(f"{what} {seconds / passed:.1%}" for what, seconds in self._summed_waits().items())
        return f"{duration(passed)} since the start, of it waiting for {shares}"

    def _begin(self, step: int, now: float) -> None:
        self._all_waits = self._summed_waits()
        self._waits = dict.fromkeys(WAITS, 0.0)
        self._step, self._time = step, now

    def _summed_waits(self) -> dict[Wait, float]:
        return {what: self._all_waits[what] + seconds for what, seconds in self._waits.items()}


def memory_gb(device: torch.device) -> dict[str, float]:
    """Memory in 1e9 bytes, of this process.

    On a GPU `allocated`, the peak since the last call, and `reserved`, what the allocator holds of the card. On a CPU
    `resident`, now, and `peak`, since the process began; empty where the system has no /proc.
    """
    if device.type == "cuda":
        found = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
        torch.cuda.reset_peak_memory_stats(device)
        return {name: size / 1e9 for name, size in found.items()}
    if not PROCESS_STATUS.exists():
        return {}
    lines = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 / 1e9 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h07m` or `4d02h`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
