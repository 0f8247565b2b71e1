"""What a run says of itself: `metrics.jsonl` (the truth) and its mirrors TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

import orjson

from shards.files import write_atomic
from train.config import ExperimentConfig


class MetricsLog:
    """Appends rows to `metrics.jsonl` in the run folder and mirrors their numbers. Used by the first rank only."""

    def __init__(self, run: Path, config: ExperimentConfig, resume_step: int) -> None:
        """Open the log, cut back to the checkpoint's step; without a checkpoint (step 0) it starts empty."""
        self.path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step] if resume_step else []
        write_atomic(self.path, b"".join(orjson.dumps(row) + b"\n" for row in kept))
        self._file = self.path.open("ab")
        self._tensorboard = _open_tensorboard(run, config, resume_step) if config.logging.use_tensorboard else None
        self._wandb = _open_wandb(run, config, resume_step) if config.logging.use_wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which has a `step`."""
        self._file.write(orjson.dumps(row) + b"\n")  # NaN, which JSON does not have, becomes null
        self._file.flush()
        values = {key: value for key, value in flatten(row).items() if key != "step"}
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=row["step"])

    def sync(self) -> None:
        """Make all rows durable; a checkpoint does this before it is published."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the log and its mirrors."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as `outer/inner`.

    >>> flatten({"loss": 2.5, "val": {"code": {"loss": 2.0}}})
    {'loss': 2.5, 'val/code/loss': 2.0}
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    """The same nested values with every tensor [] fetched from its device."""
    return {key: numbers(value) if isinstance(value, dict) else value.item() for key, value in values.items()}


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


class Speed:
    """Tokens per second since the last row, and the time that is left."""

    def __init__(self, step: int, total_steps: int, tokens_per_step: int) -> None:
        self._step, self._total, self._tokens = step, total_steps, tokens_per_step
        self._time = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training (validation, saving)."""
        self._time += seconds

    def measure(self, step: int) -> tuple[float, str]:
        """Tokens per second over the steps since the last call, and the remaining time as text."""
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rate = (step - self._step) * self._tokens / seconds
        self._step, self._time = step, now
        return rate, duration((self._total - step) * self._tokens / rate)


def _open_tensorboard(run: Path, config: ExperimentConfig, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    directory = Path(config.logging.tensorboard_dir or run / "tensorboard")
    return SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)


def _open_wandb(run: Path, config: ExperimentConfig, resume_step: int) -> Any:
    import wandb

    id_file = run / "wandb_id"  # a run that goes on is the same run there; one that starts anew is another
    if not (resume_step and id_file.exists()):
        write_atomic(id_file, uuid.uuid4().hex[:12])

    return wandb.init(
        project=config.logging.wandb_project,
        entity=config.logging.wandb_entity,
        name=config.logging.wandb_run_name or config.experiment.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run),
        tags=config.experiment.tags,
        config=config.model_dump(mode="json"),
    )
