"""The generation engine against naive loops without a cache, its filters against the processors of `transformers`."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, POSITIONS, VOCAB, make_model, tokens
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shards.errors import UserError
from train.generate import Completion, Engine, generate
from train.models import BaseModelForCausalLM
from train.sampling import Sampler, SamplingParams

CPU = torch.device("cpu")

# Filters and draws


def by_transformers(logits: torch.Tensor, params: SamplingParams, ids: list[int]) -> torch.Tensor:
    """One row [vocab] of logits through the processors of `transformers`, in the order of its `generate`."""
    processors: list[Any] = []
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([ids]), scores)
    return scores[0]


some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(some_params, min_size=1, max_size=5), seed=st.integers(0, 1000), coarse=st.booleans())
def test_filters_equal_those_of_transformers(rows, seed, coarse):
    """Rows with parameters of their own in one batch; coarse logits, as of bfloat16, have ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 60, generator=generator) * 3
    logits = logits.round() if coarse else logits
    ids = torch.randint(0, 60, (len(rows), 9), generator=generator)
    seen = torch.zeros(len(rows), 60, dtype=torch.bool).scatter(1, ids, True)
    found = Sampler(rows, CPU).filtered(logits, seen)
    for row, params in enumerate(rows):
        expected = by_transformers(logits[row], params, ids[row].tolist())
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(some_params, min_size=1, max_size=5), u=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_a_token_is_where_the_distribution_function_passes_u(rows, u, seed):
    logits = torch.randn(len(rows), 30, generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(len(rows), 30, dtype=torch.bool)
    sampler = Sampler(rows, CPU)
    drawn, logprobs, scaled = sampler(logits, [u] * len(rows), seen)
    probabilities = sampler.filtered(logits, seen).double().softmax(-1)
    for row, token in enumerate(map(int, drawn)):
        assert probabilities[row, token] > 0
        below, upto = probabilities[row, :token].sum(), probabilities[row, : token + 1].sum()
        assert below - 1e-6 <= u <= upto + 1e-6
        assert logprobs[row] == pytest.approx(logits[row].log_softmax(-1)[token].item(), abs=1e-5)
        at_temperature = (logits[row] / rows[row].temperature).log_softmax(-1)[token].item()
        assert scaled[row] == pytest.approx(at_temperature, abs=1e-5)


def test_random_numbers_are_even_and_those_of_the_seed():
    first = SamplingParams(seed=3).uniforms(1000)
    assert (SamplingParams(seed=3).uniforms(10) == first[:10]).all()
    assert (SamplingParams(seed=4).uniforms(1000) != first).all()
    counts, _ = torch.histogram(torch.from_numpy(SamplingParams(seed=5).uniforms(20_000)), bins=10, range=(0.0, 1.0))
    assert (counts - 2000).abs().max() < 200


def test_tokens_follow_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    uniforms = SamplingParams(seed=1).uniforms(20_000).tolist()
    for temperature, top_k in ((1.0, None), (2.0, None), (1.0, 2)):
        sampler = Sampler([SamplingParams(temperature=temperature, top_k=top_k)] * 20_000, CPU)
        drawn = torch.tensor(sampler(logits, uniforms)[0]).long().bincount(minlength=4) / 20_000
        expected = (logits[0, :top_k] / temperature).softmax(0)
        assert (drawn[: len(expected)] - expected).abs().max() < 0.02
        assert drawn[len(expected) :].sum() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_parameters_out_of_range(field, value):
    with pytest.raises(UserError, match=f"{field} must be .*, not {value}"):
        SamplingParams(**{field: value})


# The engine


def naive(model: BaseModelForCausalLM, prompt: list[int], params: SamplingParams) -> Completion:
    """The same request by whole passes over one row, with the processors of `transformers`."""
    ids, completion = list(prompt), Completion()
    for u in params.uniforms(params.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        filtered = by_transformers(logits, params, ids)
        cumulative = filtered.double().softmax(-1).cumsum(-1)
        token = int(filtered.argmax() if params.temperature == 0 else (cumulative <= u * cumulative[-1]).sum())
        ids.append(token)
        completion.token_ids.append(token)
        completion.logprobs.append(logits.log_softmax(-1)[token].item())
        completion.policy_logprobs.append((logits / (params.temperature or 1)).log_softmax(-1)[token].item())
        if token in params.stop_ids:
            completion.finish_reason = "stop"
            break
        if len(ids) == model.config.max_position_embeddings:
            break
    return completion


def check(found: Completion, expected: Completion) -> None:
    assert found.token_ids == expected.token_ids
    assert found.finish_reason == expected.finish_reason
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert found.policy_logprobs == pytest.approx(expected.policy_logprobs, abs=1e-5)


def requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of many lengths and parameters of all kinds, stops and repeated prompts among them."""
    draw = random.Random(0)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"top_p": 0.8, "stop_ids": tuple(range(0, VOCAB, 9))},
        {"temperature": 1.3, "min_p": 0.1, "repetition_penalty": 1.2},
        {"temperature": 0.0, "stop_ids": tuple(range(0, VOCAB, 5))},
    ]
    prompts = [tokens(1, draw.randint(1, 12), seed).tolist()[0] for seed in range(count)]
    prompts[3:5] = [prompts[2]] * len(prompts[3:5])
    params = [SamplingParams(max_new_tokens=draw.randint(1, 14), seed=n, **kinds[n % len(kinds)]) for n in range(count)]
    return prompts, params


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_a_naive_loop_does(family):
    model, (prompts, params) = make_model(family), requests(6)
    for found, prompt, each in zip(generate(model, prompts, params, max_batch=4), prompts, params, strict=True):
        check(found, naive(model, prompt, each))


@pytest.mark.parametrize("max_batch", [1, 2, 5, 64])
def test_the_company_changes_nothing(max_batch):
    """Fewer places than requests, so that rows leave and join, in another order each time."""
    model, (prompts, params) = make_model("qwen3"), requests(12)
    alone = [naive(model, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    assert {completion.finish_reason for completion in alone} == {"stop", "length"}
    order = random.Random(max_batch).sample(range(12), 12)
    found = generate(model, [prompts[n] for n in order], [params[n] for n in order], max_batch=max_batch)
    for n, completion in zip(order, found, strict=True):
        check(completion, alone[n])


def test_requests_that_come_late_and_leave_early(monkeypatch):
    """The engine by hand: requests between steps, one cancelled, prefills of bounded size."""
    monkeypatch.setattr("train.generate.PREFILL_TOKENS", 20)
    model, (prompts, params) = make_model(), requests(8)
    engine, found, numbers = Engine(model, max_batch=3), {}, {}
    assert not engine.busy
    assert engine.step() == []
    waiting = list(range(8))
    while waiting or engine.busy:
        if waiting:
            n = waiting.pop(0)
            numbers[engine.submit(prompts[n], params[n])] = n
        new = engine.step()
        assert len({token.request for token in new}) == len(new) <= 3
        for token in new:
            found.setdefault(numbers[token.request], Completion()).add(token)
        if len(waiting) == 3:
            engine.cancel(next(number for number, n in numbers.items() if n == 1))
            engine.cancel(10_000)  # unknown: nothing happens
    for n, completion in found.items():
        expected = naive(model, prompts[n], params[n])
        if n == 1:
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        else:
            check(completion, expected)
    assert set(found) >= set(range(8)) - {1}


def test_a_cancelled_request_gives_no_more_tokens():
    engine = Engine(make_model(), max_batch=1)
    running, waiting = (engine.submit([1, 2], SamplingParams(max_new_tokens=20)) for _ in range(2))
    assert [token.request for token in engine.step()] == [running]
    engine.cancel(running)
    engine.cancel(waiting)
    assert not engine.busy
    assert engine.step() == []


def test_equal_prompts_are_prefilled_once(monkeypatch):
    model, shapes = make_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **more: shapes.append(tuple(ids.shape)) or forward(ids, **more))
    prompt = [5, 6, 7]
    params = [SamplingParams(max_new_tokens=4, seed=seed) for seed in range(6)]
    found = generate(model, [prompt] * 6, params)
    assert shapes == [(1, 3), (6, 1), (6, 1), (6, 1)]
    assert len({tuple(completion.token_ids) for completion in found}) > 1
    for completion, each in zip(found, params, strict=True):
        check(completion, naive(model, prompt, each))


def test_the_stop_token_ends_the_text_and_is_part_of_it():
    model, prompt = make_model(), [3, 1, 4]
    free = generate(model, [prompt], SamplingParams(max_new_tokens=12, temperature=0))[0]
    stop = free.token_ids[5]
    found = generate(model, [prompt], SamplingParams(max_new_tokens=12, temperature=0, stop_ids=(stop, VOCAB + 5)))[0]
    assert found.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert found.finish_reason == "stop"


def test_the_last_position_ends_the_text():
    model, prompt = make_model(), tokens(1, POSITIONS - 3).tolist()[0]
    for temperature in (0.0, 1.0):
        found = generate(model, [prompt], SamplingParams(max_new_tokens=100, temperature=temperature))[0]
        assert len(found.token_ids) == 3
        assert found.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], f"a prompt must have 1 to {POSITIONS - 1} tokens .* has 0"),
        ([1] * POSITIONS, f"has {POSITIONS}"),
        ([1, VOCAB], f"outside 0 … {VOCAB - 1}"),
        ([-1], "outside 0"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt, message):
    with pytest.raises(UserError, match=message):
        generate(make_model(), [prompt], SamplingParams())


def test_other_mistakes():
    with pytest.raises(UserError, match="1 sampling parameters for 2 prompts"):
        generate(make_model(), [[1], [2]], [SamplingParams()])
    with pytest.raises(UserError, match="max_batch must be at least 1, not 0"):
        Engine(make_model(), max_batch=0)
    assert generate(make_model(), [], SamplingParams()) == []


def test_training_goes_on_as_if_nothing_had_been_generated():
    """Modes come back module by module, and nothing that generation left behind keeps gradients from flowing."""
    model = make_model("qwen3_moe").train()
    model.layers[0].eval()
    generate(model, [[1, 2, 3]], SamplingParams(max_new_tokens=3))
    assert model.training
    assert model.layers[1].training
    assert not any(module.training for module in model.layers[0].modules())
    ids = tokens(2, 9)
    model(ids[:, :-1], labels=ids[:, 1:]).objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("family", "layers"), [("llama", 10), ("deepseek_v3", 2)])
def test_compiled_models_generate_and_train_on(family, layers):
    """Every step of generation is a new shape: none is compiled, and training keeps the recompilations it may have."""
    torch._dynamo.reset()
    compiled, plain = (make_model(family, num_hidden_layers=layers).train() for _ in range(2))
    passes = []

    def backend(graph, inputs):
        passes.append("compiled")
        return graph

    for part in [*compiled.layers, compiled.norm]:
        part.compile(fullgraph=True, backend=backend)

    def step(length: int) -> None:
        ids = tokens(2, length + 1)
        found, expected = (model(ids[:, :-1], labels=ids[:, 1:]).objective for model in (compiled, plain))
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
        found.backward()

    step(8)
    before = len(passes)
    assert before
    prompts, params = requests(5)
    for found, expected in zip(*(generate(model, prompts, params) for model in (compiled, plain)), strict=True):
        check(found, expected)
    engine = Engine(compiled)
    engine.submit(prompts[0], params[0])
    while engine.busy:
        engine.step()
    assert len(passes) == before
    step(8)
    assert len(passes) == before  # what was compiled is used
    step(9)
    assert len(passes) > before  # and more is compiled where needed


# generate() of the models


def test_generated_ids_of_a_batch():
    model, ids = make_model(), tokens(3, 5)
    expected = ids
    with torch.no_grad():
        for _ in range(POSITIONS - 5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert (model.generate(ids, max_length=20, temperature=0) == expected[:, :20]).all()
    assert (model.generate(ids, max_length=1000, temperature=0) == expected).all()  # no further than the positions go
    assert (model.generate(ids, max_length=5) == ids).all()

    end = int(expected[1, 9])
    found = model.generate(ids, max_length=20, temperature=0, eos_token_id=end)
    for row, whole in zip(found, expected, strict=True):
        stop = next((t for t in range(5, 20) if whole[t] == end), 19) + 1
        assert (row[:stop] == whole[:stop]).all()
        assert (row[stop:] == end).all()
    assert model.generate(ids[1:2], max_length=20, temperature=0, eos_token_id=end).shape[1] <= 10


def test_rows_and_seeds_differ():
    model, ids = make_model(), tokens(1, 4).repeat(2, 1)
    first = model.generate(ids, max_length=20, seed=3)
    assert (model.generate(ids, max_length=20, seed=3) == first).all()
    assert (model.generate(ids, max_length=20, seed=4) != first).any()
    assert (first[0] != first[1]).any()
    assert (model.generate(ids[:1], max_length=20, seed=3) == first[:1]).all()
