"""The samples of a training run's steps, from its run folder alone.

Step s, counted from 1, of a run with a global batch of G windows drew G samples from (s - 1) G on, moved on by the
ranges that rollbacks skipped before it. `rollbacks.json` lists them: behind step `step` the samples
[first_sample, next_sample) were left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.mixture import MixturePlan
from shards.phases import MixtureConfig
from shards.settings import load_yaml, validate


@dataclass(frozen=True)
class Run:
    """What a run folder says about its data."""

    path: Path
    plan: MixturePlan
    global_batch: int
    steps: int  # of the whole run
    recorded: dict[str, Any]  # the plan's past when the run was started, see `MixturePlan.past`
    rollbacks: list[dict[str, int]]

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read a run folder and open its datasets; relative paths start at the current folder, as in the run.

        Raises:
            UserError: it is no run folder, a file of it cannot be read, or a dataset is missing.
        """
        if not (path / "manifest.json").exists() or not (path / "config.yaml").exists():
            raise UserError(f"--run {path}: no run folder (manifest.json and config.yaml are not both there)")
        manifest, config = _read_json(path / "manifest.json"), load_yaml(path / "config.yaml")
        mixture = validate(MixtureConfig, config["data"]["config"], f"{path / 'config.yaml'}, data.config")
        batch, max_steps = manifest["global_batch"], config["training"].get("max_steps")
        plan = MixturePlan.build(mixture, manifest["seq_len"], total_samples=max_steps and max_steps * batch)
        steps = plan.length() // batch
        skipped = path / "rollbacks.json"
        rollbacks = _read_json(skipped) if skipped.exists() else []
        return cls(path, plan, batch, min(steps, max_steps or steps), manifest["data"]["plan"], rollbacks)

    def step(self, step: int) -> range:
        """The samples of a step, after checking that the data and the log agree with them.

        Raises:
            UserError: the run has no such step, or what is there now is not what the run was trained on.
        """
        samples = self._samples(step)
        if not 1 <= step <= self.steps:
            raise UserError(f"--step {step:,}: {self.path} has the steps 1 to {self.steps:,}")
        self.check(samples.stop)
        self._check_log(step)
        return samples

    def check(self, stop: int) -> None:
        """Refuse data that are not those that the run was started with, as far as samples before `stop` need them."""
        now = self.plan.past(stop)
        then = {
            **self.recorded,
            "phases": [phase for phase in self.recorded["phases"] if phase["start"] < stop],
            "sources": {name: self.recorded["sources"].get(name) for name in now["sources"]},
        }
        changed = [f"source '{name}'" for name in now["sources"] if now["sources"][name] != then["sources"][name]]
        changed += [key for key in now if key != "sources" and now[key] != then[key]]
        if changed:
            raise UserError(
                f"{self.path}: the data are not those that the run was trained on, its samples cannot be named: "
                f"{', '.join(changed)} changed since (fingerprints in manifest.json)"
            )

    def _samples(self, step: int) -> range:
        skipped = sum(r["next_sample"] - r["first_sample"] for r in self.rollbacks if r["step"] < step)
        first = (step - 1) * self.global_batch + skipped
        return range(first, first + self.global_batch)

    def _check_log(self, step: int) -> None:
        """Compare with the newest row of the metrics up to a step."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
        rows = [row for row in rows if row["step"] <= step and "next_sample" in row]
        if rows and (found := rows[-1]["next_sample"]) != (expected := self._samples(rows[-1]["step"]).stop):
            raise UserError(
                f"{path}: after step {rows[-1]['step']:,} the run stood before sample {found:,}, not before "
                f"{expected:,}: it left samples out that {self.path / 'rollbacks.json'} does not name; use --sample"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
