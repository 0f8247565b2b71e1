"""Checkpoints: the model, the optimiser and where the run stands, complete or absent.

    checkpoints/step-00001000/     a torch.distributed.checkpoint of whole tensors, whatever layout wrote or reads them
                      state.json   step, next sample, the plan behind it, what a resumed run must not change, and sizes
                                   and hashes of the other files, as they were read back

Training waits only while the tensors are copied to the host's memory, what several ranks hold by one of them; a thread
writes them beside the checkpoint's name, reads them back, renames, and removes what is beyond the limit. Learning rate
and data order are pure functions of step and sample number and nothing draws random numbers while training, so there is
no other state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shards.errors import UserError
from shards.files import sync_directory, write_atomic
from train.checkpoint_files import (
    WEIGHTS,
    HostMemory,
    Key,
    all_finite,
    choose_writers,
    find_damage,
    in_background,
    own_pieces,
    piece_sizes,
    read_tensors,
    reason,
    stored_shapes,
    together,
    write_tensors,
)
from train.config import CheckpointingSection
from train.layout import Layout
from train.models.transformer import BaseModelForCausalLM
from train.pieces import StoredTensor
from train.run_state import RunState, complete_checkpoints, expired_checkpoints, step_of
from train.stored_weights import StoredWeights

# Saving from a single process without a process group is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Optimizer(Protocol):
    """What a checkpoint keeps of an optimiser."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors by kind and name.

        One with a parameter's name and the shape of what this rank has of it is laid out like the parameter; any other
        is equal on all ranks.
        """
        ...


class Checkpoints:
    """The `checkpoints/` folder of a run. All ranks make one and call the same methods in the same order.

    Args:
        run: the run folder.
        section: how often what is saved, and how many are kept.
        layout: of the ranks.
        say: takes what there is to tell; it prints on the first rank only. An attribute too: a run's log opens later.
    """

    def __init__(self, run: Path, section: CheckpointingSection, layout: Layout, say: Callable[[str], None]) -> None:
        self.folder = run / "checkpoints"
        self._section, self._ranks, self.say = section, layout.ranks, say
        # Of its own: the thread that writes talks while the training thread does.
        self._group = layout.ranks.background_group()
        self._memory = HostMemory(layout.ranks.device)
        self._writes: dict[Key, bool] | None = None  # whether it is this rank that writes a piece which it holds
        self._verified: Path | None = None  # the checkpoint whose files were last found to be as they were written
        self._writing: Future[Any] | None = None

    def all(self) -> list[Path]:
        """Complete checkpoints of this run, oldest first, with those that hold weights only."""
        return complete_checkpoints(self.folder)

    def find(self, resume_from: str | None) -> Path | None:
        """The checkpoint to start from: None or "auto": the newest; "never": none; else a path.

        Those that hold weights only are not considered, and one with a file that is not as it was written, or whose
        weights are not finite, is passed over, which is said. Each rank reads its share of the files. A run that was
        started from a path and is started so again goes on from its own newest checkpoint.

        Raises:
            UserError: the path holds no checkpoint that a run can go on from, or all checkpoints here are damaged, or
                the ranks see different ones.
        """
        if resume_from == "never":
            return None
        own = self._resumable()
        if len(set(together(lambda: tuple(path.name for path in own), self._group))) > 1:
            raise UserError(f"{self.folder}: the ranks see different checkpoints; do they all share this file system?")
        if resume_from in (None, "auto") or (own and RunState.read(own[0]).origin == resume_from):
            return self._newest_good(own)
        path = Path(resume_from or "")
        state = RunState.read(path)
        if not state.resumable:
            raise UserError(
                f"{path}: this checkpoint holds weights only, without the optimiser's state: a run cannot go on from "
                "it; take one whose step is a multiple of its checkpointing.save_optimizer_every, or start a new run "
                f"from these weights with model.from_pretrained={path}"
            )
        if fault := self._fault(path):
            raise UserError(f"{path}: a run cannot go on from this checkpoint ({fault}); take another one")
        return path

    def last_before(self, step: int) -> Path | None:
        """The newest checkpoint of this run behind which `step` was still to come, if a run can go on from one."""
        self.wait()
        earlier = (path for path in self._resumable() if step_of(path) < step)
        return next((path for path in earlier if not RunState.read(path).fault(path)), None)

    def _resumable(self) -> list[Path]:
        """Checkpoints that hold the optimiser's state too, newest first."""
        return [path for path in reversed(self.all()) if RunState.read(path).resumable]

    def _newest_good(self, checkpoints: list[Path]) -> Path | None:
        faults = []
        for path in checkpoints:
            fault = self._fault(path)
            if fault is None:
                return path
            self.say(f"note: {path} is passed over: {fault}")
            faults.append(f"{path.name}: {fault}")
        if faults:
            raise UserError(
                f"{self.folder}: no checkpoint here can be gone on from ({faults[0]}); restore its files, or start "
                "anew with checkpointing.resume_from_checkpoint=never"
            )
        return None

    def _fault(self, checkpoint: Path) -> str | None:
        """Why no run can go on from a checkpoint, as any of the ranks finds."""
        state = RunState.read(checkpoint)
        found = together(lambda: state.fault(checkpoint), self._group)
        fault = next(filter(None, found), None) or find_damage(checkpoint, state.files, self._group)
        if fault is None:
            self._verified = checkpoint
        return fault

    def set_aside(self, step: int) -> Path | None:
        """Move checkpoints of later steps, and a copy of the metrics, out of the way of a run that goes on from `step`.

        What an interrupted write left is removed. Only the first rank calls it, while nothing is being written.

        Returns:
            the folder that holds them now, if there were any.
        """
        self._remove_unfinished()
        later = [path for path in self.all() if step_of(path) > step]
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

    def reserve(self, model: BaseModelForCausalLM, optimizer: Optimizer) -> None:
        """Get the host's memory for the copies in the background, so that the first save does not have to."""
        self.wait()
        tensors = stored_tensors(model, optimizer)
        self._writing = in_background(lambda: self._memory.reserve(self._own(tensors)))

    def save(self, state: RunState, model: BaseModelForCausalLM, optimizer: Optimizer, *, wait: bool = False) -> float:
        """Copy the model and the optimiser, and write a checkpoint of them in the background.

        An earlier write is waited for. A checkpoint whose step is no multiple of `save_optimizer_every` holds weights
        only, unless `wait` is set. The metrics up to `state.step` must be durable already.

        Args:
            wait: until it is written, as at the end of a run.

        Returns:
            seconds that the caller was kept.

        Raises:
            UserError: with `wait`: it could not be written, the disk being full for example. Without, that is said
                when it is known; the earlier checkpoints stay and the next save tries again.
        """
        start = time.perf_counter()
        self.wait()
        every = self._section.save_optimizer_every
        state = dataclasses.replace(state, resumable=wait or every is None or state.step % every == 0)
        own = self._own(stored_tensors(model, optimizer))
        if not state.resumable:
            own = {name: tensor for name, tensor in own.items() if name.startswith(WEIGHTS)}
        writing = in_background(self._write, state, self._memory.copy(own))
        if wait:
            try:
                self.say(writing.result())
            except UserError as error:
                raise UserError(f"{error}: make room, then the same command goes on from the newest") from error
            return time.perf_counter() - start
        self._writing = writing
        if not self._section.async_save:
            self.wait()
        return time.perf_counter() - start

    def poll(self) -> None:
        """Say so, if a write has ended or failed since the last call; costs nothing."""
        if self._writing is None or not self._writing.done():
            return
        writing, self._writing = self._writing, None
        try:
            if message := writing.result():
                self.say(message)
        except UserError as error:
            self.say(f"warning: {error}; the next save tries again")

    def wait(self) -> None:
        """Wait until nothing is being written, and say how it ended."""
        if self._writing is not None:
            wait_for([self._writing])
            self.poll()

    def load(self, checkpoint: Path, model: BaseModelForCausalLM, optimizer: Optimizer) -> None:
        """Read a checkpoint into a model and its optimiser, whatever layout and world size wrote it.

        Raises:
            UserError: a file of it is missing or damaged, or it is of another model.
        """
        self.wait()
        _read(checkpoint, stored_tensors(model, optimizer), model, self._group, verified=checkpoint == self._verified)

    def _own(self, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Those pieces that this rank has to write; the first time all ranks share what they hold, which stays so."""
        if self._writes is None:
            tables = together(lambda: piece_sizes(tensors), self._group)
            writers = choose_writers(tables)
            self._writes = {key: writers[key] == self._ranks.rank for key in tables[self._ranks.rank]}
        return own_pieces(tensors, self._writes)

    def _write(self, state: RunState, tensors: dict[str, StoredTensor]) -> str:
        """Write, read back and publish a checkpoint with all ranks, then remove the oldest; what there is to say."""
        start = time.perf_counter()
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            together(lambda: self._begin(temporary), self._group)
            files = write_tensors(temporary, tensors, self._group)
            finite = all(together(lambda: all_finite(tensors), self._group))
            state = dataclasses.replace(state, finite=finite, files=files)
            together(lambda: self._publish(state, temporary, final), self._group)
            warning = together(self._rotate, self._group)[0]  # all ranks see the same checkpoints afterwards
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            if self._ranks.is_first:
                self._remove_unfinished()
            raise UserError(
                f"{final}: the checkpoint could not be written ({reason(error)}); the earlier ones are unharmed"
            ) from error
        size = sum(entry["bytes"] for entry in files.values())
        kind = "" if state.resumable else ", weights only"
        warning += "" if finite else "; some weights are not finite, so no run goes on from it"
        return f"checkpoint {final.name}: {size / 1e9:.3g} GB in {time.perf_counter() - start:.1f} s{kind}{warning}"

    def _begin(self, temporary: Path) -> None:
        if self._ranks.is_first:
            self._remove_unfinished()
            temporary.mkdir(parents=True)

    def _publish(self, state: RunState, temporary: Path, final: Path) -> None:
        if not self._ranks.is_first:
            return
        write_atomic(temporary / "state.json", json.dumps(dataclasses.asdict(state), indent=1))
        os.replace(temporary, final)  # fails where there is one: a run that goes back sets later ones aside first
        sync_directory(self.folder)

    def _rotate(self) -> str:
        """Remove what is beyond the limit; returns what stood in the way, which does not spoil the new checkpoint."""
        if not self._ranks.is_first:
            return ""
        try:
            limit = self._section.save_total_limit
            for old in [] if limit is None else expired_checkpoints(self.folder, limit):
                os.replace(old, self.folder / f".{old.name}.old.tmp")  # half a checkpoint is never seen
        except (OSError, UserError) as error:
            return f"; older ones could not be removed ({reason(error)})"
        self._remove_unfinished()
        return ""

    def _remove_unfinished(self) -> None:
        for temporary in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(temporary, ignore_errors=True)


def stored_tensors(model: BaseModelForCausalLM, optimizer: Optimizer | None) -> dict[str, StoredTensor]:
    """What this rank has of a model and its optimiser, as the tensors rest, by name; shares their memory."""
    if isinstance(model, FSDPModule):
        model.reshard()  # validation leaves the weights outside of the blocks gathered, in the compute dtype
    parameters = dict(model.named_parameters())
    tensors = {
        f"{WEIGHTS}{name}": StoredTensor.of(tensor, model.cuts.get(name))
        for name, tensor in (*parameters.items(), *model.named_buffers())
    }
    for kind, entries in ({} if optimizer is None else optimizer.state_dict()).items():
        for name, tensor in entries.items():
            parameter = parameters.get(name)
            alike = parameter is not None and _local_shape(tensor) == _local_shape(parameter)
            tensors[f"optimizer.{kind}.{name}"] = (
                StoredTensor.of(tensor, model.cuts.get(name), parameter) if alike else StoredTensor.of(tensor)
            )
    return tensors


def _local_shape(tensor: Tensor) -> torch.Size:
    return tensor.to_local().shape if isinstance(tensor, DTensor) else tensor.shape


def load_weights(checkpoint: Path, model: BaseModelForCausalLM, group: dist.ProcessGroup | None = None) -> None:
    """Read only the weights of a checkpoint into what this rank has of a model.

    Args:
        group: all ranks of it call this together, and each checks its share of the files; None: this one is alone.

    Raises:
        UserError: a file of it is missing or damaged, or it is of another model.
    """
    _read(checkpoint, stored_tensors(model, None), model, group)


def _read(
    checkpoint: Path,
    tensors: dict[str, StoredTensor],
    model: BaseModelForCausalLM,
    group: dist.ProcessGroup | None,
    *,
    verified: bool = False,
) -> None:
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint")
    state = RunState.read(checkpoint)
    try:
        # Read here first: dcp would log a traceback of its own where this fails.
        stored = stored_shapes(checkpoint)
        _check_model(model, stored, checkpoint)
        if not verified and (damage := find_damage(checkpoint, state.files, group)):
            raise OSError(damage)
        # What watches the gradients' norm begins anew where a checkpoint is older than that.
        wanted = {n: t for n, t in tensors.items() if n in stored or not n.startswith("optimizer.guard.")}
        read_tensors(checkpoint, wanted, group)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # whatever unpickling and reading raise
        raise UserError(
            f"{checkpoint}: the checkpoint cannot be read ({reason(error)}); if it is damaged, remove it, and the run "
            "goes on from the one before"
        ) from error


def _check_model(model: BaseModelForCausalLM, stored: dict[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Refuse a checkpoint of another model: dcp would ignore what the model does not ask for."""
    found = {name: shape for name, shape in stored.items() if name.startswith(WEIGHTS)}
    wanted = {f"{WEIGHTS}{name}": shape for name, shape in model.whole_shapes.items()}
    if wrong := [name for name in [*wanted, *found] if found.get(name) != wanted.get(name)]:
        raise UserError(
            f"{checkpoint}: this is a checkpoint of another model: {wrong[0]} is {found.get(wrong[0], 'missing')} "
            f"there, {wanted.get(wrong[0], 'unknown')} in the model"
        )


def weights_sha256(checkpoint: Path) -> str:
    """Hash over all weights of a checkpoint by name, one tensor in memory at a time; equal for all layouts.

    Raises:
        UserError: there is no checkpoint here, or it is damaged.
    """
    weights, digest = StoredWeights(checkpoint), hashlib.sha256()
    for name in sorted(weights.shapes):
        tensor = weights.read(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
