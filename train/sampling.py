"""How a token is drawn from logits: parameters of a request, the filters, and one random number per token.

The filters work in the order that `transformers` has: repetition penalty, temperature, top-k, top-p, min-p. Each row of
a batch has its own parameters, and a value that means "no limit" leaves its row alone.

The token is found by inverting the distribution function: with u in [0, 1) the first token, in the order of the
vocabulary, at which the cumulative probability exceeds u. The numbers u of a request are the stream of its seed, one
per new token, so a request gives the same tokens in whatever company it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for.

    Attributes:
        max_new_tokens: tokens to add at most; never more than the positions of the model allow.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: draw among the k likeliest tokens (and those as likely as the k-th).
        top_p: draw among the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020,
            arXiv 1904.09751).
        min_p: drop tokens less likely than this share of the likeliest one (Nguyen et al. 2024, arXiv 2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the prompt or the
            continuation (CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1); 1 changes nothing.
        stop_ids: tokens that end the continuation.
        seed: of the request's random numbers.

    Raises:
        UserError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none for no limit"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number (1: none)"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UserError(f"{name} must be {range_}, not {getattr(self, name)}")

    def uniforms(self, count: int) -> np.ndarray:
        """The first `count` random numbers of the request, float64 in [0, 1); those of a shorter one begin alike."""
        # The largest double below 1 could, times a total of the probabilities, round up to that total.
        return np.minimum(np.random.default_rng(self.seed).random(count), 1 - 2.0**-50)


def row_seed(seed: int, row: int) -> int:
    """A seed for each row of a batch that was given one."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0])


class Sampler:
    """Draws one token for each row of a batch, by the parameters of that row."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._greedy = [p.temperature == 0 for p in params]
        self._is_greedy = torch.tensor(self._greedy, device=device)
        self._temperature = self._penalty = self._top_k = self._top_p = self._min_p = None
        if any(p.temperature not in (0, 1) for p in params):
            self._temperature = column([p.temperature or 1.0 for p in params])
        if any(p.repetition_penalty != 1 for p in params):
            self._penalty = column([p.repetition_penalty for p in params])
        # A greedy row is not filtered: no filter removes the likeliest token.
        if any(p.top_k and p.temperature for p in params):
            self._top_k = [p.top_k if p.temperature else None for p in params]
        if any(p.top_p < 1 and p.temperature for p in params):
            self._top_p = column([p.top_p for p in params])
        if any(p.min_p > 0 and p.temperature for p in params):
            self._min_p = column([p.min_p for p in params])

    @property
    def needs_seen(self) -> bool:
        """Whether `__call__` must be told which tokens each row holds."""
        return self._penalty is not None

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits that the tokens are drawn from: float32 [batch, vocab], minus infinity where a token is excluded.

        Args:
            logits: float32 [batch, vocab].
            seen: bool [batch, vocab], tokens of the prompt and the continuation; only with a repetition penalty.
        """
        if self._penalty is not None:
            assert seen is not None
            repeated = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
            logits = torch.where(seen, repeated, logits)
        if self._temperature is not None:
            logits = logits / self._temperature
        if self._top_k is not None:
            logits = logits.masked_fill(logits < self._kth_largest(logits, self._top_k), -math.inf)
        if self._top_p is not None:
            ascending, order = logits.sort(dim=-1)
            tail = ascending.softmax(-1).cumsum(-1) <= 1 - self._top_p
            tail[:, -1] = False
            tail &= self._top_p < 1  # a tail of probability 0 is no reason to touch a row without limit
            logits = logits.masked_fill(tail.scatter(1, order, tail), -math.inf)
        if self._min_p is not None:
            probabilities = logits.softmax(-1)
            rare = probabilities < self._min_p * probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(rare, -math.inf)
        return logits

    def __call__(self, logits: Tensor, uniforms: list[float], seen: Tensor | None = None) -> list[list[float]]:
        """Draw a token per row.

        Args:
            logits: float32 [batch, vocab].
            uniforms: one random number in [0, 1) per row; greedy rows ignore theirs.
            seen: as in `filtered`.

        Returns:
            Three lists of [batch]: token; its log-probability under the softmax of the logits; and under that of the
            logits divided by the row's temperature (1 where it is greedy). Neither knows of the penalty or the filters.
        """
        if all(self._greedy):
            tokens = (logits if self._penalty is None else self.filtered(logits, seen)).argmax(-1)
        else:
            filtered = self.filtered(logits, seen)
            cumulative = filtered.softmax(-1).double().cumsum(-1)
            u = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
            if any(self._greedy):
                tokens = torch.where(self._is_greedy, filtered.argmax(-1), tokens)
        logprobs = scaled = _logprobs(logits, tokens)
        if self._temperature is not None:
            scaled = _logprobs(logits / self._temperature, tokens)
        # One transfer from the device; a double holds any token id.
        return torch.stack((tokens.double(), logprobs.double(), scaled.double())).tolist()

    @staticmethod
    def _kth_largest(logits: Tensor, top_k: list[int | None]) -> Tensor:
        """Float32 [batch, 1]: the k-th largest logit of each row, minus infinity where there is no limit."""
        ks = [min(k, logits.shape[-1]) if k else 0 for k in top_k]
        largest = logits.topk(max(ks), dim=-1).values
        index = torch.tensor(ks, device=logits.device)[:, None]
        return largest.gather(1, (index - 1).clamp(min=0)).masked_fill(index == 0, -math.inf)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
