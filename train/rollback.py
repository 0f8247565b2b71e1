"""Going back to the last good checkpoint, past the data that made steps go wrong, and the record of it.

`rollbacks.json` in the run folder lists `{"step", "first_sample", "next_sample"}`: behind `step` the samples
[first_sample, next_sample) were skipped. So step s begins with sample (s - 1) * global batch + all that was skipped
behind earlier steps.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from shards.errors import UserError
from train.checkpoint import Checkpoints, Optimizer
from train.distributed import Ranks
from train.models import BaseModelForCausalLM
from train.run_folder import RunFolder
from train.run_state import RunState, step_of

ROLLBACKS = "rollbacks.json"
NONE = -1  # no checkpoint, as the first rank tells the others
LIMIT = 3  # rollbacks to one checkpoint


def roll_back(
    now: RunState,
    bad_steps: list[int],
    checkpoints: Checkpoints,
    ranks: Ranks,
    model: BaseModelForCausalLM,
    optimizer: Optimizer,
    run: RunFolder,
) -> RunState | None:
    """Load the newest checkpoint from before the bad steps, and leave out the data up to `now.next_sample`.

    Where the first of them are older than every checkpoint, one from between them has to do: skipped steps change
    nothing but what data is left out. All ranks call it together, and go back to what the first one finds.

    Returns:
        the state to go on from; None where the disk fails: the run goes on as it is, and tries again.

    Raises:
        UserError: there is no such checkpoint, or going back to it has not helped before.
    """
    checkpoints.wait()
    choice = 0
    if ranks.is_first:
        found = next((found for step in bad_steps if (found := checkpoints.last_before(step))), None)
        choice = NONE if found is None else step_of(found)
    (choice,) = ranks.sum_on_host([choice])
    problem = f"{len(bad_steps)} steps were skipped from step {bad_steps[0]:,} on"
    advice = (
        "look at the data (minigpt-mix explain --run), lower training.learning_rate, or set training.max_skips=null"
    )
    if choice == NONE:
        raise UserError(f"{problem}, and no checkpoint is older: {advice}")
    checkpoint = checkpoints.folder / f"step-{choice:08d}"
    before = RunState.read(checkpoint)
    kept = [rollback for rollback in now.rollbacks if rollback["step"] <= before.step]
    here = [rollback["next_sample"] for rollback in kept if rollback["step"] == before.step]
    if len(here) == LIMIT:
        raise UserError(f"the run went back to {checkpoint} {LIMIT} times and steps are skipped again: {advice}")
    first = max([before.next_sample, *here])
    kept.append({"step": before.step, "first_sample": first, "next_sample": now.next_sample})
    noted = 0
    if ranks.is_first:
        try:
            # In this order: a kill in between repeats the steps, and the rollback.
            checkpoints.set_aside(before.step)
            run.write_json(ROLLBACKS, kept)
            noted = 1
        except OSError as error:
            run.say(f"warning: {problem}; going back to {checkpoint} is put off, as the disk fails ({error})")
    if ranks.sum_on_host([noted]) == [0]:
        return None
    checkpoints.load(checkpoint, model, optimizer)
    run.say(
        f"{problem}: back to {checkpoint}, without the samples {first:,} to {now.next_sample - 1:,} "
        f"(rollback {len(here) + 1} of at most {LIMIT} to this checkpoint)"
    )
    return dataclasses.replace(before, next_sample=now.next_sample, rollbacks=kept)


def with_rollbacks(state: RunState, run: Path) -> RunState:
    """The state of a checkpoint, with what was skipped behind it after it was written."""
    path = run / ROLLBACKS
    kept = [one for one in json.loads(path.read_text()) if one["step"] <= state.step] if path.exists() else []
    if not kept:
        return state
    return dataclasses.replace(state, next_sample=max(state.next_sample, kept[-1]["next_sample"]), rollbacks=kept)
