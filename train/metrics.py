"""What a run says of itself: `metrics.jsonl` (the truth) and its mirrors TensorBoard and W&B."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson
import torch

from shards.errors import UserError
from shards.files import write_atomic
from train.append import AppendOnly
from train.config import ExperimentConfig


@dataclass(frozen=True)
class Mirror:
    """Somewhere else that the numbers of each row go to."""

    name: str
    log: Callable[[dict[str, float], int], None]  # values by name, step
    close: Callable[[], None]


class MetricsLog:
    """Appends rows to `metrics.jsonl` in the run folder and mirrors their numbers. Used by the first rank only.

    Once open it never ends a run: rows wait in memory while the disk is full, and a mirror that fails is given up.
    """

    def __init__(self, run: Path, config: ExperimentConfig, resume_step: int, say: Callable[[str], None]) -> None:
        """Open the log, cut back to the checkpoint's step; without a checkpoint (step 0) it starts empty.

        To cut takes no room: a log that is there can be opened again while the disk is full.

        Raises:
            OSError: it is not there and cannot be made, or not be changed.
        """
        path = run / "metrics.jsonl"
        with path.open("a+b") as file:
            file.truncate(_end_of_step(file, resume_step))
        self._rows = AppendOnly(path, say)
        self._say = say
        self._mirrors: list[Mirror] = []
        openers = {
            "TensorBoard": _open_tensorboard if config.logging.use_tensorboard else None,
            "W&B": _open_wandb if config.logging.use_wandb else None,
        }
        for name, opener in openers.items():
            if opener is not None:
                with self._no_error_of(name):
                    self._mirrors.append(opener(run, config, resume_step))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which has a `step`."""
        self._rows.write(orjson.dumps(row) + b"\n")  # NaN, which JSON does not have, becomes null
        values = {key: value for key, value in flatten(row).items() if key != "step"}
        for mirror in list(self._mirrors):
            with self._no_error_of(mirror.name):
                mirror.log(values, row["step"])

    def sync(self) -> None:
        """Make all rows durable; a checkpoint does this before it is published."""
        self._rows.sync()

    def close(self) -> None:
        """Close the log and its mirrors."""
        self._rows.close()
        for mirror in list(self._mirrors):
            with self._no_error_of(mirror.name):
                mirror.close()

    @contextlib.contextmanager
    def _no_error_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the library raises: a mirror is not worth a run
            self._mirrors = [mirror for mirror in self._mirrors if mirror.name != name]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"{name} is off from here on, metrics.jsonl has everything ({reason})")


def check_mirrors(config: ExperimentConfig) -> None:
    """Find out before a run starts whether its mirrors can be opened at all.

    Raises:
        UserError: W&B is asked for and not installed.
    """
    if config.logging.use_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logging.use_wandb is true, but wandb is not installed: pip install wandb, or logging.use_wandb=false"
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _end_of_step(file: IO[bytes], step: int) -> int:
    """Where the rows up to a step end in a `metrics.jsonl`, in bytes; rows are in the order of their steps."""
    end = 0
    if step:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n") or orjson.loads(line)["step"] > step:
                break
            end += len(line)
    return end


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
    """The same nested values with every tensor [] fetched from its device, all in one transfer."""
    tensors = list(_tensors(values))
    fetched = iter(torch.stack([tensor.detach().double() for tensor in tensors]).tolist() if tensors else [])

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        number = next(fetched)
        return number if value.is_floating_point() else int(number)

    return filled(values)


def _tensors(values: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in values.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _open_tensorboard(run: Path, config: ExperimentConfig, resume_step: int) -> Mirror:
    from torch.utils.tensorboard import SummaryWriter

    directory = Path(config.logging.tensorboard_dir or run / "tensorboard")
    writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Mirror("TensorBoard", log, writer.close)


def _open_wandb(run: Path, config: ExperimentConfig, resume_step: int) -> Mirror:
    import wandb

    id_file = run / "wandb_id"  # a run that goes on is the same run there; one that starts anew is another
    if not (resume_step and id_file.exists()):
        write_atomic(id_file, uuid.uuid4().hex[:12])
    wandb_run = wandb.init(
        mode=config.logging.wandb_mode,
        project=config.logging.wandb_project,
        entity=config.logging.wandb_entity,
        name=config.logging.wandb_run_name or config.experiment.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(run),
        tags=config.experiment.tags,
        config=config.model_dump(mode="json"),
    )
    # W&B's own step only grows, and it drops what comes with a lower one: rows of a run that went back.
    wandb_run.define_metric("train_step")
    wandb_run.define_metric("*", step_metric="train_step")
    return Mirror("W&B", lambda values, step: wandb_run.log({"train_step": step, **values}), wandb_run.finish)
