"""Checkpoints: the model, the optimiser and where the run stands, complete or absent.

    checkpoints/step-00001000/     a torch.distributed.checkpoint of {model, optimizer}, any layout, any world size
                      state.json   step, next sample, the plan behind it, and what a resumed run must not change

A checkpoint is written beside its name, synced and renamed. Learning rate and data order are pure functions of step and
sample number and nothing draws random numbers while training, so there is no other state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shards.errors import UserError
from shards.files import sync_directory, write_atomic
from shards.mixture import MixturePlan
from train.distributed import Ranks
from train.optim import Optimizer

# Saving from a single process without a process group is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_NAME = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run stands after `step` updates.

    Attributes:
        next_sample: first sample of the next step; with `plan`, all the state of the data.
        plan: fingerprint of the mixture behind `next_sample`.
        past: what that fingerprint is made of, to say what differs.
        position: epoch, window, shard and offset of each source, for people and for a second check.
        identity: seed, model, optimiser and global batch, which a resumed run must share.
        world_size: ranks that the global batch is meant for.
        skipped_steps: updates left out because a gradient was not finite.
        origin: the checkpoint that the run was told to start from, if it was.
    """

    step: int
    next_sample: int
    plan: str
    past: dict[str, Any]
    position: dict[str, dict[str, int]]
    identity: dict[str, Any]
    world_size: int
    skipped_steps: int = 0
    origin: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        """Read `state.json` of a checkpoint.

        Raises:
            UserError: there is no checkpoint at this path, or it is not one of this program.
        """
        path = checkpoint / "state.json"
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{checkpoint}: no checkpoint here (state.json is missing)") from None
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path}: not readable as a checkpoint's state: {error}") from None

    def check_resumable(self, plan: MixturePlan, identity: dict[str, Any], checkpoint: Path) -> None:
        """Refuse to go on with something else than what made the checkpoint.

        Raises:
            UserError: naming every field that differs, with both values.
        """
        changed = differences(self.identity, identity)
        if plan.fingerprint(self.next_sample) != self.plan:
            changed += differences(self.past, plan.past(self.next_sample), "data.")
        else:  # sources that enter later belong to the future
            position = plan.position(self.next_sample)
            changed += [
                line
                for name in self.past["sources"]
                for line in differences(self.position[name], position[name], f"position.{name}.")
            ]
        if changed:
            raise UserError(
                "\n  ".join(
                    [
                        f"{checkpoint}: this checkpoint belongs to a different run; it had",
                        *changed,
                        "restore these, or start a new run: another checkpointing.output_dir, or "
                        "checkpointing.resume_from_checkpoint=never",
                    ]
                )
            )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `dotted.path: old, now new` for all that differs between two JSON-like values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}{key}.")]
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(item, dict) for item in old + new):
        pairs = enumerate(itertools.zip_longest(old, new))
        return [line for index, (a, b) in pairs for line in differences(a, b, f"{path}{index}.")]
    return [] if old == new else [f"{path.rstrip('.')}: {old}, now {new}"]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path.parent for path in folder.glob("step-*/state.json") if _NAME.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, run: Path, limit: int | None, ranks: Ranks) -> None:
        self.folder = run / "checkpoints"
        self._limit, self._ranks = limit, ranks

    def all(self) -> list[Path]:
        """Complete checkpoints of this run, oldest first."""
        return complete_checkpoints(self.folder)

    def find(self, resume_from: str | None) -> Path | None:
        """The checkpoint to start from: None or "auto": the newest; "never": none; else a path.

        A run that was started from a path and is started so again goes on from its own newest checkpoint.

        Raises:
            UserError: the path holds no checkpoint.
        """
        newest = next(iter(reversed(self.all())), None)
        if resume_from == "never":
            return None
        if resume_from in (None, "auto") or (newest and RunState.read(newest).origin == resume_from):
            return newest
        path = Path(resume_from or "")
        RunState.read(path)
        return path

    def set_aside(self, step: int) -> Path | None:
        """Move checkpoints of later steps, and a copy of the metrics, out of the way of a run that goes on from `step`.

        Returns:
            the folder that holds them now, if there were any.
        """
        later = [path for path in self.all() if int(path.name[5:]) > step]
        if not later:
            return None
        target = next(p for n in range(1, 10_000) if not (p := self.folder / f"superseded-{n}").exists())
        target.mkdir()
        metrics = self.folder.parent / "metrics.jsonl"
        if metrics.exists():
            shutil.copy2(metrics, target)
        for path in later:
            os.replace(path, target / path.name)
        return target

    def _remove_unfinished(self) -> None:
        for temporary in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(temporary, ignore_errors=True)

    def save(self, state: RunState, model: nn.Module, optimizer: Optimizer) -> None:
        """Write a checkpoint from all ranks, publish it, then remove the oldest beyond the limit.

        Raises:
            UserError: it cannot be written, the disk being full for example; the earlier checkpoints stay as they are.
        """
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self._ranks.is_first:
            self._remove_unfinished()
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        try:
            dcp.save(
                _tensors(model, optimizer),
                storage_writer=FileSystemWriter(temporary, overwrite=False),
                no_dist=self._ranks.world_size == 1,
                process_group=self._ranks.host_group,
            )
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            if self._ranks.is_first:
                self._remove_unfinished()
            raise UserError(
                f"{final}: the checkpoint could not be written ({_reason(error)}); the earlier ones are unharmed: "
                "make room, then the same command goes on from the newest"
            ) from error
        self._ranks.barrier()
        if self._ranks.is_first:
            write_atomic(temporary / "state.json", json.dumps(dataclasses.asdict(state), indent=1))
            os.replace(temporary, final)
            sync_directory(self.folder)
            for old in self.all()[: -self._limit] if self._limit else []:
                os.replace(old, self.folder / f".{old.name}.tmp")  # removed whole: half of one is never seen
            self._remove_unfinished()
        self._ranks.barrier()

    def load(self, checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Read a checkpoint into a model and its optimiser, whatever layout and world size wrote it.

        Raises:
            UserError: a file of it is missing or damaged.
        """
        _read(checkpoint, _tensors(model, optimizer), self._ranks)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Read only the weights of a checkpoint into a model of this process.

    Raises:
        UserError: a file of it is missing or damaged, or it is of another model.
    """
    _read(checkpoint, {"model": _weights(model)}, None)


def _read(checkpoint: Path, tensors: dict[str, Any], ranks: Ranks | None) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    reader = FileSystemReader(checkpoint)
    try:
        # Read here first: dcp would log a traceback of its own where this fails.
        _check_model(tensors["model"], reader.read_metadata().state_dict_metadata, checkpoint)
        dcp.load(
            tensors,
            storage_reader=reader,
            no_dist=ranks is None or ranks.world_size == 1,
            process_group=ranks and ranks.host_group,
        )
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # whatever unpickling and reading raise
        raise UserError(
            f"{checkpoint}: the checkpoint cannot be read ({_reason(error)}); if it is damaged, remove it, and the run "
            "goes on from the one before"
        ) from error


def _check_model(weights: dict[str, Tensor], stored: dict[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint of another model: dcp would ignore what the model does not ask for."""
    found = {name: tuple(entry.size) for name, entry in stored.items() if name.startswith("model.")}
    wanted = {f"model.{name}": tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := [name for name in [*wanted, *found] if found.get(name) != wanted.get(name)]:
        raise UserError(
            f"{checkpoint}: this is a checkpoint of another model: {wrong[0]} is {found.get(wrong[0], 'missing')} "
            f"there, {wanted.get(wrong[0], 'unknown')} in the model"
        )


def _reason(error: BaseException) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the routers' correction biases, by name, as they rest: sharded, float32."""
    if isinstance(model, FSDPModule):
        model.reshard()  # validation leaves the weights outside of the blocks gathered, in the compute dtype
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": _weights(model), "optimizer": optimizer.state_dict()}


def weights_sha256(model: nn.Module) -> str:
    """Hash over all weights by name, independent of the layout; every rank must call it."""
    digest = hashlib.sha256()
    for name, parameter in sorted(_weights(model).items()):
        tensor = parameter.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
