"""The mixture file: sources, weights and phases, and the integers that they become.

A phase's weights turn into integers that sum to 2^32. Phase 0 starts at sample 0; a phase that asks to start at sample
g starts at the first block border of the phase before it that is not below g, where every share is exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from shards.errors import UserError, unknown_name
from shards.settings import Settings, load_yaml, validate

WEIGHT_SUM = 2**32
MIN_BLOCK = 64  # samples; the quotas of much shorter blocks would show as a rhythm


class SourceConfig(Settings):
    """One line of `sources`: a dataset directory and how much of it to draw.

    Attributes:
        name: unique; the source's order depends on it.
        path: the dataset's folder, may hold `${VAR:-default}`.
        weight: relative share of the samples; none: the source enters with a phase.
        max_epochs: the plan is refused where it reads the source more often.
        tokens: how many tokens the dataset is expected to hold. Only a plan without data (`minigpt-mix inspect
            --plan-only`) uses it, to count epochs; where the data is there, its own size counts and this is not read.
    """

    name: str = Field(min_length=1)
    path: str
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens: int | None = Field(default=None, gt=0)


class PhaseConfig(Settings):
    """Other weights from a point on: they are complete, a source that is not named is not drawn."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: int | float = Field(alias="from")
    weights: dict[str, float]

    @field_validator("start", mode="before")
    @classmethod
    def _fraction_or_tokens(cls, value: Any) -> int | float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and 0 < value < 1:
            return float(value)
        if not number or value < 1 or value != int(value) or (isinstance(value, float) and value == 1):
            raise ValueError(f"must be a fraction of the total between 0 and 1, or a number of tokens; found {value!r}")
        return int(value)

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"the weight of '{name}' must be a number >= 0, found {weight}")
        if not any(weights.values()):
            raise ValueError("all weights are zero; at least one source needs a weight above 0")
        return weights


class MixtureConfig(Settings):
    """A mixture file. Weights are relative; paths may hold `${VAR:-default}`."""

    name: str = "mixture"
    seed: int = 42
    total_tokens: int | None = Field(default=None, gt=0)
    sources: list[SourceConfig] = Field(min_length=1)
    phases: list[PhaseConfig] = Field(default=[])

    @model_validator(mode="after")
    def _names_and_weights(self) -> MixtureConfig:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called '{name}'; a name must be unique")
        if not any(source.weight for source in self.sources):
            raise ValueError("no source has a weight above 0 at the start; give at least one a weight")
        for number, phase in enumerate(self.phases):
            for name in phase.weights:
                if name not in names:
                    raise ValueError(f"phases.{number}.weights: {unknown_name('source', name, names)}")
        return self


def load_mixture(path: str | Path) -> MixtureConfig:
    """Read a mixture file; every mistake in it becomes one message.

    Raises:
        UserError: with the file, the field and what is wrong.
    """
    return validate(MixtureConfig, load_yaml(path), str(path))


def exact(number: float) -> Fraction:
    """The decimal number that the user wrote: 0.1 means 1/10, not the nearest float."""
    return Fraction(str(number))


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of `weights` that sum to 2^32, by largest remainder (ties: the first).

    >>> integer_weights([3, 1, 0])
    [3221225472, 1073741824, 0]
    """
    numbers = [exact(weight) for weight in weights]
    quotas = [number * WEIGHT_SUM / sum(numbers) for number in numbers]
    floors = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: floors[index] - quotas[index])
    for index in by_remainder[: WEIGHT_SUM - sum(floors)]:
        floors[index] += 1
    return floors


@dataclasses.dataclass(frozen=True)
class Phase:
    """Weights that hold from sample `start` on: integers that sum to 2^32, and the draws of all phases before."""

    start: int
    block: int
    weights: tuple[int, ...]
    carried: tuple[int, ...]

    @property
    def prefixes(self) -> list[int]:
        """P_0 = 0, P_1, ..., P_S = 2^32."""
        return [sum(self.weights[:index]) for index in range(len(self.weights) + 1)]

    def draws(self, k: int) -> list[int]:
        """Draws of each source in this phase's first k samples, k on a block border: C_s(k) = E_s(k) - E_{s-1}(k)."""
        shares = [(k * prefix) >> 32 for prefix in self.prefixes]
        return [upper - lower for lower, upper in itertools.pairwise(shares)]


def resolve_phases(config: MixtureConfig, seq_len: int, total_samples: int | None) -> tuple[Phase, ...]:
    """The phases of a mixture in samples and integer weights.

    Args:
        config: the mixture.
        seq_len: tokens per window.
        total_samples: what fractions in `from` refer to.

    Raises:
        UserError: a fraction without a total, starts that do not increase, a weight too small to be met.
    """
    names = [source.name for source in config.sources]
    phases = [_phase(config, "sources", 0, [source.weight or 0.0 for source in config.sources], (0,) * len(names))]
    asked_before = 0
    for number, phase in enumerate(config.phases):
        where = f"phases.{number}"
        if isinstance(phase.start, int):
            asked = -(-phase.start // seq_len)
        elif total_samples is None:
            raise UserError(
                f"mixture '{config.name}': {where}.from is {phase.start}, a fraction of a total that is not known; "
                "set total_tokens, or give `from` as a number of tokens"
            )
        else:
            asked = math.ceil(exact(phase.start) * total_samples)
        if asked < asked_before or (
            number and asked == asked_before and phase.start == config.phases[number - 1].start
        ):
            raise UserError(
                f"mixture '{config.name}': {where}.from is {phase.start}, but phases must start one after another"
            )
        asked_before = asked
        last = phases[-1]
        length = max(0, -(-(asked - last.start) // last.block)) * last.block
        carried = tuple(before + drawn for before, drawn in zip(last.carried, last.draws(length), strict=True))
        weights = [phase.weights.get(name, 0.0) for name in names]
        if length == 0:  # starts where the phase before starts, which therefore has no samples
            phases.pop()
        phases.append(_phase(config, where, last.start + length, weights, carried))
    return tuple(phases)


def _phase(config: MixtureConfig, where: str, start: int, weights: list[float], carried: tuple[int, ...]) -> Phase:
    integers = integer_weights(weights)
    for source, weight, integer in zip(config.sources, weights, integers, strict=True):
        if weight and not integer:
            raise UserError(
                f"mixture '{config.name}': {where}: the weight of '{source.name}' ({weight}) "
                "is less than 2^-32 of the sum; raise it or leave it out"
            )
    smallest = min(integer for integer in integers if integer)
    return Phase(start, max(MIN_BLOCK, -(-WEIGHT_SUM // smallest)), tuple(integers), carried)
