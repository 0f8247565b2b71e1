"""A mixture of token datasets as a pure function of the sample number.

A mixture file gives sources weights; with a window length it becomes a `MixturePlan`, in which sample g (a window of
seq_len + 1 tokens) is known by arithmetic alone (see `shards.permutation`). Nothing is built, cached or replayed.

The order depends on seed, weights, seq_len and the data: not on world size, batch size, workers or run length. What
lies behind a sample is described by `MixturePlan.past`, which a resumed run compares; what lies ahead may be changed.

    source of T tokens, windows of L:  N = T // L - 1 windows per epoch, at offset(epoch) + L * permutation_epoch(i)
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.errors import UserError, unknown_name
from shards.permutation import locate, window_of_draw
from shards.phases import MixtureConfig, Phase, SourceConfig, exact, resolve_phases
from shards.phases import load_mixture as load_mixture
from shards.reader import TokenDataset
from shards.settings import expand_variables

UNKNOWN_WINDOWS = 2**40  # of a source of unknown size in a plan without data: more than any run draws
ORDER_VERSION = 1  # part of every plan's past: raise it when the arithmetic of the order changes


class ExpectedDataset(TokenDataset):
    """Stands in for a dataset that is not there yet: a size to plan with, nothing to read."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.tokens = path, tokens


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a plan: its dataset, its windows per epoch and its limit of draws (None: no limit)."""

    name: str
    dataset: TokenDataset
    windows: int
    limit: int | None


@dataclasses.dataclass(frozen=True)
class Located:
    """Where samples lie, arrays [n]; the window holds the seq_len + 1 tokens from stream position `start`."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    start: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class MixturePlan:
    """A mixture with a window length: sample(g) for every g, immutable. Made by `MixturePlan.build`."""

    config: MixtureConfig
    seq_len: int
    total_samples: int | None
    sources: tuple[Source, ...]
    phases: tuple[Phase, ...]
    without_data: bool = False

    @classmethod
    def build(
        cls,
        config: MixtureConfig,
        seq_len: int,
        *,
        total_samples: int | None = None,
        split: str | None = None,
        base: Path | None = None,
        without_data: bool = False,
    ) -> MixturePlan:
        """Open the datasets and resolve weights and phases.

        Args:
            config: the mixture.
            seq_len: tokens per window (each window holds one more, the last label).
            total_samples: the run's own length, used where the mixture has no `total_tokens`.
            split: None or "train": the datasets; "val": their `val/` parts with the first weights, where total,
                phases and max_epochs, which belong to training, do not count.
            base: folder that relative paths start from (default: the current one).
            without_data: open nothing and take the sizes from the sources' `tokens`: a plan to look at, which counts as
                any other does but cannot be read. A source without `tokens` never ends, and no `max_epochs` stops it.

        Raises:
            UserError: no usable dataset at a path, different tokenizers, a source shorter than two windows, weights or
                phases that cannot be met, `max_epochs` exceeded, neither a length nor sizes for a plan without data.
        """
        if seq_len < 1:
            raise UserError(f"mixture '{config.name}': seq_len must be at least 1, found {seq_len}")
        if split not in (None, "train", "val"):
            raise UserError(f"mixture '{config.name}': {unknown_name('split', str(split), ['train', 'val'])}")
        if split == "val":
            first = [source.model_copy(update={"max_epochs": None}) for source in config.sources]
            config = config.model_copy(update={"total_tokens": None, "phases": [], "sources": first})
        if config.total_tokens is not None:
            total_samples = config.total_tokens // seq_len
            if total_samples == 0:
                raise UserError(
                    f"mixture '{config.name}': total_tokens ({config.total_tokens:,}) is less than "
                    f"one window of {seq_len:,} tokens"
                )
        phases = resolve_phases(config, seq_len, total_samples)
        if without_data:
            _check_length_is_known(config, total_samples)
        sources = tuple(_open_source(config, source, seq_len, split, base, without_data) for source in config.sources)
        for source in () if without_data else sources[1:]:
            if source.dataset.manifest.tokenizer_hash != sources[0].dataset.manifest.tokenizer_hash:
                raise UserError(
                    f"mixture '{config.name}': '{sources[0].name}' ({sources[0].dataset.path}) and '{source.name}' "
                    f"({source.dataset.path}) were made with different tokenizers; tokenize one of them again"
                )
        plan = cls(config, seq_len, total_samples, sources, phases, without_data)
        if total_samples is not None:
            _check_epochs(plan, total_samples)
        return plan

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the one tokenizer that all sources share."""
        return self.sources[0].dataset.manifest.tokenizer_hash

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return max(source.dataset.vocab_size for source in self.sources)

    @cached_property
    def _arrays(self) -> tuple[Any, ...]:
        """What the kernel needs, in its order."""
        keys = [_key(self.config.seed, "windows", source.name) for source in self.sources]
        return (
            np.array([phase.start for phase in self.phases], np.uint64),
            np.array([phase.block for phase in self.phases], np.uint64),
            np.array([phase.prefixes for phase in self.phases], np.uint64),
            np.array([phase.carried for phase in self.phases], np.uint64),
            np.array([source.windows for source in self.sources], np.uint64),
            np.array(keys, np.uint64),
            np.uint64(_key(self.config.seed, "blocks")),
            np.uint64(self.seq_len),
        )

    def locate(self, samples: np.ndarray) -> Located:
        """Source, epoch, window and stream position of the samples with the given numbers [n], each >= 0."""
        samples = np.array(samples, np.uint64)  # contiguous and writable, as the kernel wants it
        n = len(samples)
        found = Located(np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64))
        locate(samples, *self._arrays, found.source, found.epoch, found.window, found.start)  # type: ignore[call-arg]
        return found

    def counts(self, stop: int) -> list[int]:
        """Draws of each source before sample `stop`, exact."""
        phase = next(phase for phase in reversed(self.phases) if phase.start < stop or phase.start == 0)
        border = stop - (stop - phase.start) % phase.block
        counts = [a + b for a, b in zip(phase.carried, phase.draws(border - phase.start), strict=True)]
        for lo in range(border, stop, 1 << 20):  # the begun block, sample by sample
            part = self.locate(np.arange(lo, min(stop, lo + (1 << 20)), dtype=np.uint64)).source
            counts = [a + int(b) for a, b in zip(counts, np.bincount(part, minlength=len(counts)), strict=True)]
        return counts

    def first_end(self) -> int:
        """Samples until the first source has given all it may: its `max_epochs`, or one epoch where it has none."""
        limits = [source.windows if source.limit is None else source.limit for source in self.sources]
        return _largest(lambda stop: all(a <= b for a, b in zip(self.counts(stop), limits, strict=True)), sum(limits))

    def length(self) -> int:
        """Samples of the mixture: its total, or the first source's end where there is none."""
        return self.first_end() if self.total_samples is None else self.total_samples

    def past(self, stop: int) -> dict[str, Any]:
        """What determines the samples before `stop`, ready for JSON: changes behind `stop` change it, others do not."""
        started = [phase for phase in self.phases if phase.start < stop]
        drawn = [any(phase.weights[index] for phase in started) for index in range(len(self.sources))]
        return {
            "order": ORDER_VERSION,
            "seed": self.config.seed,
            "seq_len": self.seq_len,
            "phases": [
                {
                    "start": phase.start,  # pairs, not a mapping: their order counts, because prefix sums depend on it
                    "weights": [[s.name, w] for s, w in zip(self.sources, phase.weights, strict=True) if w],
                }
                for phase in started
            ],
            "sources": {s.name: s.dataset.fingerprint for s, used in zip(self.sources, drawn, strict=True) if used},
        }

    def fingerprint(self, stop: int) -> str:
        """Hash of `past(stop)`."""
        past = json.dumps(self.past(stop), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(past.encode())

    def position(self, stop: int) -> dict[str, dict[str, int]]:
        """Where each source's cursor stands before sample `stop`: draws, epoch, window of the epoch, shard and offset.

        Shard and offset are those of the window that the cursor points to, the first that no earlier block has drawn.
        """
        return {
            source.name: self._cursor(index, draws)
            for index, (source, draws) in enumerate(zip(self.sources, self.counts(stop), strict=True))
        }

    def _cursor(self, index: int, draws: int) -> dict[str, int]:
        dataset, windows = self.sources[index].dataset, self.sources[index].windows
        key = _key(self.config.seed, "windows", self.sources[index].name)
        start = int(window_of_draw(*(np.uint64(value) for value in (draws, windows, key, self.seq_len)))[2])
        shard, offset = divmod(start, dataset.shard_tokens)
        return {"draws": draws, "epoch": draws // windows, "window": draws % windows, "shard": shard, "offset": offset}


def _key(*parts: object) -> int:
    """64-bit key from names, not positions: another source changes nobody else's key."""
    return xxhash.xxh3_64_intdigest(json.dumps(parts).encode())


def _check_length_is_known(config: MixtureConfig, total_samples: int | None) -> None:
    unknown = [f"'{source.name}'" for source in config.sources if source.tokens is None]
    if total_samples is None and unknown:
        raise UserError(
            f"mixture '{config.name}': a plan without data needs a length, or the size of every source where it ends: "
            f"set total_tokens (or --tokens), or give `tokens` to {', '.join(unknown)}"
        )


def _open_source(
    config: MixtureConfig, source: SourceConfig, seq_len: int, split: str | None, base: Path | None, without_data: bool
) -> Source:
    where = f"mixture '{config.name}': source '{source.name}'"
    path = (base or Path()) / expand_variables(source.path, where)
    dataset: TokenDataset
    try:
        if without_data:
            dataset = ExpectedDataset(path, source.tokens or (UNKNOWN_WINDOWS + 1) * seq_len)
        else:
            dataset = TokenDataset(path / "val" if split == "val" else path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    windows = dataset.tokens // seq_len - 1
    if windows < 1:
        raise UserError(
            f"{where} ({dataset.path}) holds {dataset.tokens:,} tokens, too few for windows of {seq_len:,} "
            f"(at least 2 x seq_len); the largest seq_len that fits is {dataset.tokens // 2:,}"
        )
    limit = None if source.max_epochs is None else math.floor(exact(source.max_epochs) * windows)
    if limit == 0:
        raise UserError(f"{where}: max_epochs {source.max_epochs} of its {windows:,} window(s) is less than one window")
    return Source(source.name, dataset, windows, limit)


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """Largest number in [0, high] that fits, where 0 and all below a fitting one fit."""
    return bisect.bisect_left(range(1, high + 1), True, key=lambda number: not fits(number))


def _check_epochs(plan: MixturePlan, total: int) -> None:
    """Raise a UserError that says what would fit where a source is drawn more often than its `max_epochs` allows."""

    def changed(factor: int, name: str, total: int) -> list[int]:
        """Draws over `total` samples with one source's weights times factor / 1000."""
        config = _scale_weights(plan.config, name, factor)
        return dataclasses.replace(plan, config=config, phases=resolve_phases(config, plan.seq_len, total)).counts(
            total
        )

    def fits(index: int, draws: list[int]) -> bool:
        limit = plan.sources[index].limit
        return limit is None or draws[index] <= limit

    def fits_with_less(index: int, name: str, factor: int) -> bool:
        return fits(index, changed(factor, name, total))

    draws, length = plan.counts(total), plan.seq_len
    lines = []
    for index, (source, given) in enumerate(zip(plan.sources, plan.config.sources, strict=True)):
        if fits(index, draws) or source.limit is None:
            continue
        excess = draws[index] - source.limit
        needed = math.ceil(100 * Fraction(draws[index], source.windows)) / 100
        factor = _largest(partial(fits_with_less, index, source.name), 1000)
        line = (
            f"'{source.name}': max_epochs {given.max_epochs:g} allows {source.limit:,} windows, the weights draw "
            f"{draws[index]:,}: {excess:,} windows ({excess * length:,} tokens) too many; "
            f"it fits with max_epochs: {needed:g}"
        )
        if factor and plan.config.phases:
            line += f", or with its weights times {factor / 1000:g}"
        elif factor and given.weight:
            line += f", or with weight: {float(exact(given.weight) * factor / 1000):.12g} instead of {given.weight:g}"
        lines.append(line)
    if lines:
        everything = range(len(plan.sources))
        most = _largest(lambda n: all(fits(index, changed(1000, "", n)) for index in everything), total - 1)
        if most:
            lines.append(f"everything fits with at most {most * length:,} tokens in total")
        title = f"mixture '{plan.config.name}': max_epochs is exceeded over {total * length:,} tokens"
        raise UserError("\n  ".join([title, *lines]))


def _scale_weights(config: MixtureConfig, name: str, factor: int) -> MixtureConfig:
    def scaled(weight: float | None, of: str) -> float | None:
        return weight * factor / 1000 if weight and of == name else weight

    sources = [source.model_copy(update={"weight": scaled(source.weight, source.name)}) for source in config.sources]
    phases = [
        phase.model_copy(update={"weights": {of: scaled(weight, of) for of, weight in phase.weights.items()}})
        for phase in config.phases
    ]
    return config.model_copy(update={"sources": sources, "phases": phases})
