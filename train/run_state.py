"""Where a run stands: the `state.json` of a checkpoint, and what a run that goes on must share with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.mixture import MixturePlan

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
        rollbacks: `{"step", "first_sample", "next_sample"}` each: behind `step` the samples [first, next) were skipped.
        resumable: whether the optimiser's state is there too, not only the weights.
        finite: whether all weights are finite.
        files: `{"bytes", "xxh3"}` of every file, read back after it was written; empty in checkpoints of old.
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
    rollbacks: list[dict[str, int]] = dataclasses.field(default_factory=list)
    resumable: bool = True
    finite: bool = True
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

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

    def fault(self, checkpoint: Path) -> str | None:
        """Why no run can go on from a checkpoint with this state, as far as the sizes of its files tell."""
        for name, expected in self.files.items():
            path = checkpoint / name
            if not path.exists():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        return None if self.finite else "its weights are not finite"

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
    return sorted(found, key=step_of)


def expired_checkpoints(folder: Path, limit: int) -> list[Path]:
    """The checkpoints in a folder that are beyond a limit, oldest first.

    Of those that can be resumed from as many as the limit says are kept, and those that hold weights only in the places
    that are left. The newest of all stays in any case, and so does the newest that a run can go on from.
    """
    states = {path: RunState.read(path) for path in complete_checkpoints(folder)}
    resumable = [path for path, state in states.items() if state.resumable]
    weights_only = [path for path, state in states.items() if not state.resumable]
    expired = resumable[:-limit]
    excess = len(states) - len(expired) - limit
    expired += weights_only[: max(0, excess)]
    good = [path for path in resumable if not states[path].fault(path)]
    return [path for path in expired if path not in (*good[-1:], *list(states)[-1:])]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name[5:])
