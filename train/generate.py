"""Generation: an engine that keeps a batch of requests going, for samples, evaluation, serving and roll-outs alike.

A step is one pass of the model. Waiting prompts are prefilled together, padded on the right, equal prompts once; every
other step adds a token to each running request. A request that is finished leaves the batch at once and a waiting one
takes its place. Nothing of a request depends on its company: the random numbers are those of its own seed, padding is
never seen, and log-probabilities agree to rounding (1e-5 in float32) with a pass over the whole text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from shards.errors import UserError
from train.models.cache import KeyValueCache
from train.sampling import Sampler, SamplingParams, row_seed

if TYPE_CHECKING:
    from train.models.transformer import BaseModelForCausalLM

PREFILL_TOKENS = 16_384  # slots of one prefill, padding included: bounds its memory
FinishReason = Literal["stop", "length"]


class NewToken(NamedTuple):
    """What a step adds to a request.

    `logprob` is the log-probability under the model, log softmax(logits)[token]: what evaluation and clients ask for.
    `policy_logprob` is that at the temperature of the request, log softmax(logits / temperature)[token]: the policy of
    which reinforcement learning takes the ratio. They are equal at temperature 1, and at 0. Both are of the whole
    distribution, before repetition penalty, top-k, top-p and min-p.
    """

    request: int
    token_id: int
    logprob: float
    policy_logprob: float
    finish_reason: FinishReason | None


@dataclass
class Completion:
    """The continuation of a prompt, one entry per token in each list.

    Attributes:
        token_ids: new tokens, the stop token included: it is part of what the model said.
        logprobs: of each token under the model; see `NewToken`.
        policy_logprobs: of each token at the temperature it was drawn with; see `NewToken`.
        finish_reason: "stop" if the last token is one of `stop_ids`; "length" after `max_new_tokens` or at the last
            position that the model has.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, new: NewToken) -> None:
        """Append a token of this request."""
        self.token_ids.append(new.token_id)
        self.logprobs.append(new.logprob)
        self.policy_logprobs.append(new.policy_logprob)
        self.finish_reason = new.finish_reason or "length"


@dataclass
class _Request:
    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int  # new tokens that it may have
    uniforms: list[float]
    seen: Tensor | None = None  # bool [vocab], for the repetition penalty
    count: int = 0  # new tokens that it has
    last: int = -1  # the newest, whose states are not in the cache yet

    @property
    def length(self) -> int:
        """Tokens whose states are in the cache."""
        return len(self.prompt) + max(self.count - 1, 0)


class Engine:
    """Requests in, tokens out, one step at a time.

        engine = Engine(model, max_batch=8)
        request = engine.submit(prompt, SamplingParams(max_new_tokens=20))
        while engine.busy:
            for new in engine.step():
                print(new.request, new.token_id)

    Not safe for use by several threads at once.
    """

    def __init__(self, model: BaseModelForCausalLM, *, max_batch: int = 64) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch must be at least 1, not {max_batch}")
        self.model = model
        self.max_batch = max_batch
        self._submitted = 0
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # row i of the cache is that of request i
        self._cache = KeyValueCache(0, 0)
        self._sampler: Sampler | None = None  # of the running requests; None when they have changed

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt and return the number of the request.

        The continuation ends at the model's last position, whatever `max_new_tokens` says.

        Raises:
            UserError: the prompt is empty, leaves no room or holds an id that the model does not know.
        """
        positions, vocab = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if not 0 < len(prompt) < positions:
            raise UserError(
                f"a prompt must have 1 to {positions - 1:,} tokens (max_position_embeddings {positions:,}, one for the "
                f"answer); this one has {len(prompt):,}"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise UserError(f"the prompt holds a token outside 0 … {vocab - 1} (vocab_size); is the tokenizer another?")
        limit = min(params.max_new_tokens, positions - len(prompt))
        uniforms = params.uniforms(limit).tolist() if params.temperature else [0.0] * limit
        self._submitted += 1
        self._waiting.append(_Request(self._submitted, tuple(prompt), params, limit, uniforms))
        return self._submitted

    def cancel(self, request: int) -> None:
        """Drop a request, waiting or running; one that is finished or unknown is no error."""
        self._waiting = deque(r for r in self._waiting if r.number != request)
        self._keep([r.number != request for r in self._running])

    @torch.no_grad()  # not inference_mode: what a model memoizes here must be usable in training
    def step(self) -> list[NewToken]:
        """Prefill waiting prompts if there is room, else add a token to each running request.

        Returns:
            The new tokens, at most one of each request.
        """
        with _evaluation(self.model):
            free = self.max_batch - len(self._running)
            if self._waiting and free:
                return self._prefill(free)
            return self._decode() if self._running else []

    def _prefill(self, free: int) -> list[NewToken]:
        """Start requests, the first come first, as many as have room."""
        started = [self._waiting.popleft()]
        longest = len(started[0].prompt)
        while self._waiting and len(started) < free:
            longest = max(longest, len(self._waiting[0].prompt))
            if longest * (len(started) + 1) > PREFILL_TOKENS:
                break
            started.append(self._waiting.popleft())
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(r.prompt for r in started))}
        longest = max(map(len, prompts))
        cache = KeyValueCache(len(prompts), longest + min(64, max(r.limit for r in started)))
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self._device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        logits = self.model(ids, cache=cache, logits_at=last).logits[:, 0]
        rows = [prompts[r.prompt] for r in started]
        if rows != list(range(len(prompts))):
            cache.select(rows)
            logits = logits[rows]
        if self._running:
            self._cache.join(cache)
        else:
            self._cache = cache
        for request in started:
            if request.params.repetition_penalty != 1:
                request.seen = torch.zeros(logits.shape[1], dtype=torch.bool, device=self._device)
                request.seen[list(request.prompt)] = True
        self._running += started
        sampler = Sampler([r.params for r in started], self._device)
        return self._advance(started, logits, sampler)

    def _decode(self) -> list[NewToken]:
        """One more token for each running request."""
        lengths = [r.length for r in self._running]
        longest = max(lengths)
        if longest == self._cache.capacity:
            self._cache.reserve(min(2 * longest, max(len(r.prompt) + r.limit for r in self._running)))
        self._cache.length = longest  # that of the longest row may have been a request that left
        ids = torch.tensor([[r.last] for r in self._running], device=self._device)
        positions = None
        if min(lengths) < longest:
            positions = torch.tensor(lengths, device=self._device)[:, None]
        logits = self.model(ids, position_ids=positions, cache=self._cache).logits[:, -1]
        if self._sampler is None:
            self._sampler = Sampler([r.params for r in self._running], self._device)
        return self._advance(self._running, logits, self._sampler)

    def _advance(self, requests: list[_Request], logits: Tensor, sampler: Sampler) -> list[NewToken]:
        """Draw a token for each of the requests (the newest of those that run), and let go those that are finished."""
        seen = None
        if sampler.needs_seen:
            nothing = torch.zeros(logits.shape[1], dtype=torch.bool, device=self._device)
            seen = torch.stack([nothing if r.seen is None else r.seen for r in requests])
        drawn = sampler(logits, [r.uniforms[r.count] for r in requests], seen)
        new = []
        for request, token, logprob, policy_logprob in zip(requests, *drawn, strict=True):
            request.last = int(token)
            request.count += 1
            if request.seen is not None:
                request.seen[request.last] = True
            reason: FinishReason | None = "length" if request.count == request.limit else None
            if request.last in request.params.stop_ids:
                reason = "stop"
            new.append(NewToken(request.number, request.last, logprob, policy_logprob, reason))
        unfinished = [True] * (len(self._running) - len(new)) + [token.finish_reason is None for token in new]
        if requests is not self._running:
            self._sampler = None
        self._keep(unfinished)
        return new

    def _keep(self, wanted: list[bool]) -> None:
        """Drop running requests; the last rows move into the gaps, so that few states are copied."""
        if all(wanted):
            return
        kept = [row for row, keep in enumerate(wanted) if keep]
        rows = list(range(len(kept)))
        movers = iter(row for row in kept if row >= len(kept))
        rows = [row if wanted[row] else next(movers) for row in rows]
        self._running = [self._running[row] for row in rows]
        self._sampler = None
        if rows:
            self._cache.select(rows)
        else:
            self._cache = KeyValueCache(0, 0)  # gives the memory back

    @property
    def _device(self) -> torch.device:
        return self.model.embed_tokens.weight.device


def generate(
    model: BaseModelForCausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    max_batch: int = 64,
) -> list[Completion]:
    """Continue prompts and return their continuations in the same order.

    Args:
        model: any model; it is put into evaluation mode for the time.
        prompts: token ids of each.
        params: one for all (equal prompts then get equal answers), or one per prompt.
        max_batch: requests that are computed at the same time; changes nothing but speed and memory.

    Raises:
        UserError: a prompt that cannot be continued (see `Engine.submit`), or not as many parameters as prompts.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UserError(f"{len(each)} sampling parameters for {len(prompts)} prompts; give one for all or one for each")
    engine = Engine(model, max_batch=max_batch)
    numbers = [engine.submit(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
    completions = {number: Completion() for number in numbers}
    with _evaluation(model):
        while engine.busy:
            for new in engine.step():
                completions[new.request].add(new)
    return [completions[number] for number in numbers]


def generate_ids(
    model: BaseModelForCausalLM,
    input_ids: Tensor,
    max_length: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> Tensor:
    """What `BaseModelForCausalLM.generate` does, and describes; row i draws with the seed made from (seed, i)."""
    batch, length = input_ids.shape
    count = min(max_length, model.config.max_position_embeddings) - length
    if count < 1:
        return input_ids
    stop = () if eos_token_id is None else (eos_token_id,)
    params = [
        SamplingParams(count, temperature, top_k, stop_ids=stop, seed=row_seed(seed, row)) for row in range(batch)
    ]
    found = [c.token_ids for c in generate(model, input_ids.tolist(), params, max_batch=batch)]
    longest = max(map(len, found))
    filled = [ids + [eos_token_id or 0] * (longest - len(ids)) for ids in found]  # only eos makes a row shorter
    return torch.cat((input_ids, torch.tensor(filled, device=input_ids.device)), dim=1)


@contextmanager
def _evaluation(model: BaseModelForCausalLM) -> Iterator[None]:
    """Evaluation mode for a while; each module that was in training mode goes back to it.

    Compiled blocks run eager: every step has a new shape, and training would have none of its recompilations left.
    """
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
