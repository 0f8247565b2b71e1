"""The guarantees of a mixture plan, each as a property, against a plain-Python oracle."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_order import ReferenceOrder, integer_weights

from shards import phases as phases_module
from shards.mixture import MixturePlan, Source, _check_epochs
from shards.phases import MixtureConfig, resolve_phases

NAMES = ["web", "code", "math", "wiki", "books", "law"]


def make_plan(config: dict, tokens: dict[str, int], seq_len: int, total: int | None = None) -> MixturePlan:
    """A plan over datasets that exist only as numbers."""
    parsed = MixtureConfig.model_validate(config)
    sources = []
    for source in parsed.sources:
        dataset = SimpleNamespace(fingerprint=f"data of {source.name}", shard_tokens=50, tokens=tokens[source.name])
        windows = tokens[source.name] // seq_len - 1
        limit = None if source.max_epochs is None else int(source.max_epochs * windows)
        sources.append(Source(source.name, dataset, windows, limit))  # type: ignore[arg-type]
    return MixturePlan(parsed, seq_len, total, tuple(sources), resolve_phases(parsed, seq_len, total))


@dataclasses.dataclass
class Case:
    """A random mixture: config, tokens per source, window length."""

    config: dict
    tokens: dict[str, int]
    seq_len: int

    def plan(self, **changes) -> MixturePlan:
        return make_plan({**self.config, **changes}, self.tokens, self.seq_len)


WEIGHT = st.one_of(st.integers(1, 20), st.floats(0.02, 1).map(lambda weight: round(weight, 3)))


@st.composite
def cases(draw, max_phases: int = 3) -> Case:
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    seq_len = draw(st.integers(1, 24))
    tokens = {name: draw(st.integers(2 * seq_len, 60 * seq_len)) for name in names}

    def weights() -> dict[str, float]:
        drawn = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))  # the others enter later, or never
        return {name: draw(WEIGHT) for name in drawn}

    first = weights()
    starts = sorted(draw(st.lists(st.integers(1, 1500), max_size=max_phases, unique=True)))
    config = {
        "seed": draw(st.integers(0, 2**32)),
        "sources": [{"name": name, "path": name, "weight": first.get(name)} for name in names],
        "phases": [{"from": start * seq_len, "weights": weights()} for start in starts],
    }
    return Case(config, tokens, seq_len)


def reference(case: Case) -> ReferenceOrder:
    names = [source["name"] for source in case.config["sources"]]
    phases = [(0, [source["weight"] or 0 for source in case.config["sources"]])]
    for phase in case.config["phases"]:
        phases.append((phase["from"] // case.seq_len, [phase["weights"].get(name, 0) for name in names]))
    windows = [(name, case.tokens[name] // case.seq_len - 1) for name in names]
    return ReferenceOrder(case.config["seed"], case.seq_len, windows, phases)


def located(plan: MixturePlan, stop: int, first: int = 0) -> list[tuple[int, int, int, int]]:
    found = plan.locate(np.arange(first, stop))
    return list(
        zip(found.source.tolist(), found.epoch.tolist(), found.window.tolist(), found.start.tolist(), strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_order_equals_the_reference(case):
    assert located(case.plan(), 1800) == reference(case).samples(1800)


@settings(max_examples=30)
@given(st.data(), cases(max_phases=0))
def test_order_equals_the_reference_far_out(data, case):
    """Beyond 2^32 samples, where k P_s no longer fits 64 bits."""
    plan = case.plan()
    block = plan.phases[0].block
    lo = data.draw(st.integers(2**32 // block, 2**50 // block)) * block
    weights, order = plan.phases[0].weights, reference(case)
    before = [sum(weights[:index]) for index in range(len(weights) + 1)]
    shares = {k: [k * prefix // 2**32 for prefix in before] for k in (lo, lo + block)}
    counts = {k: [b - a for a, b in itertools.pairwise(values)] for k, values in shares.items()}
    expected = [
        order.place(source, draw)
        for source in range(len(weights))
        for draw in range(counts[lo][source], counts[lo + block][source])
    ]
    assert sorted(located(plan, lo + block, lo)) == sorted(expected)
    assert plan.counts(lo + block) == counts[lo + block]


@given(st.lists(st.one_of(st.just(0), WEIGHT, st.floats(1e-8, 1e8)), min_size=1, max_size=30).filter(any))
def test_integer_weights_are_the_largest_remainder(weights):
    result = phases_module.integer_weights(weights)
    assert result == integer_weights(weights)
    assert sum(result) == 2**32
    total = sum(Fraction(str(weight)) for weight in weights)
    for weight, integer in zip(weights, result, strict=True):
        assert abs(integer - Fraction(str(weight)) / total * 2**32) < 1
        assert weight or not integer


@settings(max_examples=60)
@given(cases())
def test_shares_are_within_one_sample_at_every_block_end(case):
    plan = case.plan()
    sources = plan.locate(np.arange(6000)).source
    for number, phase in enumerate(plan.phases):
        end = plan.phases[number + 1].start if number + 1 < len(plan.phases) else 6000
        assert (end - phase.start) % phase.block == 0 or end == 6000  # phases start on block borders
        for border in range(phase.start, end + 1, phase.block):
            counts = np.bincount(sources[phase.start : border], minlength=len(plan.sources))
            for count, weight in zip(counts.tolist(), phase.weights, strict=True):
                assert abs(count - Fraction((border - phase.start) * weight, 2**32)) < 1
                assert weight or not count


@settings(max_examples=40)
@given(cases(), st.integers(0, 3000))
def test_counts_are_those_of_the_samples_drawn(case, stop):
    plan = case.plan()
    assert plan.counts(stop) == np.bincount(plan.locate(np.arange(stop)).source, minlength=len(plan.sources)).tolist()


@settings(max_examples=60)
@given(cases())
def test_no_window_twice_and_none_missed_in_an_epoch(case):
    """Through changes of phase and late entries too: the draws of a source are a gapless run over its epochs."""
    plan = case.plan()
    stop = plan.phases[-1].start + 20 * plan.phases[-1].block
    epochs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for source, epoch, window, _ in located(plan, stop):
        epochs[source, epoch].append(window)
    for index, draws in enumerate(plan.counts(stop)):  # at a block border
        windows = plan.sources[index].windows
        for epoch in range(draws // windows):
            assert sorted(epochs.pop((index, epoch))) == list(range(windows))
        rest = epochs.pop((index, draws // windows), [])
        assert len(rest) == len(set(rest)) == draws % windows
        assert all(0 <= window < windows for window in rest)
    assert not epochs


@settings(max_examples=60)
@given(cases(), st.integers(1, 4000))
def test_no_window_twice_before_any_sample(case, stop):
    found = located(case.plan(), stop)
    assert len({(source, epoch, window) for source, epoch, window, _ in found}) == stop


@settings(max_examples=60)
@given(cases())
def test_windows_tile_the_source_and_borders_move(case):
    plan, length = case.plan(), case.seq_len
    offsets: dict[int, dict[int, int]] = defaultdict(dict)
    for source, epoch, window, start in located(plan, 3000):
        offset = start - window * length
        assert 0 <= offset < length
        assert start + length + 1 <= plan.sources[source].dataset.tokens  # the last label lies inside
        assert offsets[source].setdefault(epoch, offset) == offset  # one offset for all windows of an epoch
    for by_epoch in offsets.values():
        for epoch, offset in by_epoch.items():
            if epoch + 1 in by_epoch and length > 1:
                assert by_epoch[epoch + 1] != offset


def test_windows_of_an_epoch_cover_all_but_the_edges():
    plan = make_plan({"sources": [{"name": "web", "path": "web", "weight": 1}]}, {"web": 1037}, 10)
    assert plan.sources[0].windows == 102
    covered = np.zeros((5, 1037), int)
    for _, epoch, _, start in located(plan, 6 * 102 + 64):  # a block may reach over the border of two epochs
        if epoch < 5:
            covered[epoch, start : start + 10] += 1
    assert covered.max() == 1
    assert (covered.sum(axis=1) == 1020).all()
    assert all(row[10:1020].all() for row in covered)


@settings(max_examples=40)
@given(cases(), st.integers(0, 3000), st.integers(1, 300))
def test_any_sample_is_known_without_those_before(case, first, length):
    assert located(case.plan(), first + length, first) == located(case.plan(), first + length)[first:]


@settings(max_examples=40)
@given(cases(), st.integers(1, 10**6))
def test_order_does_not_depend_on_the_length_of_the_run(case, total):
    longer = make_plan(case.config, case.tokens, case.seq_len, total)
    assert located(longer, 1500) == located(case.plan(), 1500)


@settings(max_examples=40)
@given(cases(), WEIGHT, st.integers(0, 5))
def test_another_source_does_not_reshuffle_the_rest(case, weight, place):
    """Each source gives the same windows in its first n draws, whatever stands beside it."""
    added = {"name": "added", "path": "added", "weight": weight}
    sources = list(case.config["sources"])
    sources.insert(min(place, len(sources)), added)
    config = {**case.config, "sources": sources, "phases": []}
    before = make_plan({**case.config, "phases": []}, case.tokens, case.seq_len)
    after = make_plan(config, {**case.tokens, "added": 3 * case.seq_len}, case.seq_len)
    for name in case.tokens:
        prefixes = []
        for plan in (before, after):
            index = [source.name for source in plan.sources].index(name)
            stop = 12 * plan.phases[0].block
            prefixes.append({sample[1:] for sample in located(plan, stop) if sample[0] == index})
        small, large = sorted(prefixes, key=len)
        assert small <= large


def test_late_sources_begin_at_their_first_epoch():
    config = {
        "sources": [{"name": "web", "path": "w", "weight": 3}, {"name": "math", "path": "m"}],
        "phases": [{"from": 1000, "weights": {"web": 1, "math": 1}}, {"from": 20_000, "weights": {"math": 1}}],
    }
    plan = make_plan(config, {"web": 5000, "math": 3000}, 10)
    first, second = (phase.start for phase in plan.phases[1:])
    assert (first, second) == (128, 2048)  # 100 and 2000, on the borders of blocks of 64
    found = plan.locate(np.arange(3000))
    assert not (found.source[:first] == 1).any()
    assert (found.source[second:] == 1).all()
    math = found.epoch[found.source == 1]
    assert math[:64].max() == 0
    assert math.max() == plan.counts(3000)[1] // plan.sources[1].windows


@settings(max_examples=60)
@given(cases(), st.integers(1, 3000))
def test_position_names_epoch_shard_and_offset(case, stop):
    plan = case.plan()
    order = reference(case)
    for index, (source, draws) in enumerate(zip(plan.sources, plan.counts(stop), strict=True)):
        position = plan.position(stop)[source.name]
        _, epoch, _, start = order.place(index, draws)
        assert position == {
            "draws": draws,
            "epoch": epoch,
            "window": draws % source.windows,
            "shard": start // 50,
            "offset": start % 50,
        }


@settings(max_examples=60)
@given(st.data(), cases())
def test_the_past_does_not_know_the_future(data, case):
    plan = case.plan()
    stop = data.draw(st.integers(1, 3000))
    names = [source["name"] for source in case.config["sources"]]
    kept = [phase for phase in case.config["phases"] if phase["from"] < stop * case.seq_len]
    asked = max([stop, *(phase["from"] // case.seq_len + 1 for phase in kept)]) + plan.phases[-1].block
    new_phase = {"from": asked * case.seq_len, "weights": {"new": 1, names[0]: 2}}
    sources = [{"name": "new", "path": "new"}, *case.config["sources"]]  # without a weight so far, in first place
    tokens = {**case.tokens, "new": 100 * case.seq_len}
    config = {**case.config, "sources": sources, "phases": [*kept, new_phase]}
    other = make_plan(config, tokens, case.seq_len, total=asked + 5000)
    behind = [resolved for resolved in plan.phases if resolved.start < stop]
    assert [resolved.start for resolved in other.phases if resolved.start < stop] == [p.start for p in behind]
    assert other.past(stop) == plan.past(stop)
    assert other.fingerprint(stop) == plan.fingerprint(stop)
    names_of = [[source.name for source in p.sources] for p in (plan, other)]
    samples = [
        [(names[sample[0]], *sample[1:]) for sample in located(p, stop)]
        for p, names in zip((plan, other), names_of, strict=True)
    ]
    assert samples[0] == samples[1]


@settings(max_examples=60)
@given(st.data(), cases(max_phases=2))
def test_the_past_notices_what_changed_it(data, case):
    plan = case.plan()
    stop = plan.phases[-1].start + 1 + data.draw(st.integers(0, 500))  # all phases have begun
    changed = [case.plan(seed=case.config["seed"] + 1)]
    changed.append(make_plan(case.config, {n: t + 2 * case.seq_len for n, t in case.tokens.items()}, case.seq_len + 1))
    drawn = next(source for source in case.config["sources"] if source["weight"])
    others = [source for source in case.config["sources"] if source is not drawn]
    if any(source["weight"] for source in others):
        heavier = {**drawn, "weight": drawn["weight"] * 1.5}
        changed.append(case.plan(sources=[heavier if s is drawn else s for s in case.config["sources"]]))
    if len(plan.phases) > 1:
        changed.append(case.plan(phases=case.config["phases"][:-1]))
    sources = tuple(
        dataclasses.replace(s, dataset=SimpleNamespace(fingerprint="other data")) if s.name == drawn["name"] else s
        for s in plan.sources
    )
    changed.append(dataclasses.replace(plan, sources=sources))
    if len(plan.phases) == len(case.config["phases"]) + 1:
        assert all(other.fingerprint(stop) != plan.fingerprint(stop) for other in changed)
    assert plan.fingerprint(stop) == case.plan().fingerprint(stop)


def test_paths_and_unused_sources_are_not_part_of_the_past():
    sources = [{"name": "web", "path": "here", "weight": 1}, {"name": "spare", "path": "x"}]
    plan = make_plan({"sources": sources}, {"web": 100, "spare": 100}, 10)
    moved = [{"name": "web", "path": "there", "weight": 1}, {"name": "spare", "path": "y"}]
    other = make_plan({"sources": moved}, {"web": 100, "spare": 55}, 10)
    assert plan.fingerprint(500) == other.fingerprint(500)
    assert plan.past(500)["sources"] == {"web": "data of web"}


def test_the_past_is_json_and_the_state_is_small():
    """100 sources: next sample and fingerprint stay under 1 KB; the order of the sources is part of the past."""
    sources = [{"name": f"source {number}", "path": "x", "weight": 1 + number} for number in range(100)]
    tokens = {source["name"]: 10**10 for source in sources}
    plan = make_plan({"sources": sources}, tokens, 4096)
    assert json.loads(json.dumps(plan.past(10**8))) == plan.past(10**8)
    assert len(json.dumps({"next_sample": 10**8, "plan": plan.fingerprint(10**8)})) < 1024
    turned = make_plan({"sources": sources[::-1]}, tokens, 4096)
    assert turned.past(10**8) != plan.past(10**8)
    assert turned.fingerprint(10**8) != plan.fingerprint(10**8)


@settings(max_examples=60)
@given(cases(), st.data())
def test_first_end_is_the_last_length_that_repeats_nothing(case, data):
    limits = [data.draw(st.one_of(st.none(), st.integers(1, 3))) for _ in case.config["sources"]]
    sources = [{**s, "max_epochs": limit} for s, limit in zip(case.config["sources"], limits, strict=True)]
    plan = case.plan(sources=sources)
    allowed = [(limit or 1) * s.windows for s, limit in zip(plan.sources, limits, strict=True)]
    end = plan.first_end()
    assert all(count <= limit for count, limit in zip(plan.counts(end), allowed, strict=True))
    assert any(count > limit for count, limit in zip(plan.counts(end + 1), allowed, strict=True))


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(100, 4000), st.data())
def test_max_epochs_holds_exactly_where_the_length_is_known(case, total, data):
    plan = case.plan()
    index = data.draw(st.integers(0, len(plan.sources) - 1))
    draws, windows = plan.counts(total)[index], plan.sources[index].windows
    for limit, accepted in ((draws, True), (draws - 1, False)):
        if limit < 1:
            continue
        sources = [dict(source) for source in case.config["sources"]]
        sources[index]["max_epochs"] = limit / windows + 1e-9  # the float may lie below the fraction
        limited = make_plan({**case.config, "sources": sources}, case.tokens, case.seq_len, total)
        assert limited.sources[index].limit == limit
        if accepted:
            _check_epochs(limited, total)
        else:
            with pytest.raises(Exception, match=f"'{plan.sources[index].name}': max_epochs .* 1 windows"):
                _check_epochs(limited, total)
