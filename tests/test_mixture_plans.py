"""Plans without data: the same numbers as with data, and every mixture that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_files import write_dataset

from shards.describe import page, summarize, tables
from shards.errors import UserError
from shards.mixture import MixturePlan, load_mixture
from shards.phases import WEIGHT_SUM, MixtureConfig
from shards.settings import validate

DATA = Path(__file__).parent.parent / "configs" / "data"
NAMES = [f"pretrain/{name}" for name in ("phase1/mixture1", "phase1/mixture2", "phase1/mixture3", "phase2/mixture1")]
NAMES += [f"midtrain/{name}" for name in ("phase1/mixture1", "phase1/mixture2", "phase2/mixture1")]
SHIPPED = [DATA / f"{name}.yaml" for name in NAMES]
LENGTH = 4096
PLAN_ONLY = ("tokens", "documents", "windows", "epochs")


def mixture(sources, **settings) -> MixtureConfig:
    return validate(MixtureConfig, {"name": "m", "sources": sources, **settings}, "here")


def web(**settings):
    return {"name": "web", "path": "nowhere/web", "weight": 1, **settings}


def plan_of(config, seq_len=64, **settings) -> MixturePlan:
    return MixturePlan.build(config, seq_len, without_data=True, **settings)


def test_all_of_them_are_tested():
    found = {path for part in ("pretrain", "midtrain") for path in (DATA / part).rglob("*.yaml")}
    assert found == set(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_mixtures_plan(path):
    config = load_mixture(path)
    plan = plan_of(config, LENGTH)
    assert plan.total_samples == config.total_tokens // LENGTH
    weights = [{source.name: source.weight or 0 for source in config.sources}]
    weights += [phase.weights for phase in config.phases]
    assert len(plan.phases) == len(weights)
    borders = [phase.start for phase in plan.phases[1:]] + [plan.total_samples]
    for phase, asked, border in zip(plan.phases, weights, borders, strict=True):
        assert sum(asked.values()) == pytest.approx(1, abs=1e-9)
        k = (border - phase.start) // phase.block * phase.block
        counts = plan.counts(phase.start + k)
        for index, source in enumerate(plan.sources):
            drawn = counts[index] - phase.carried[index]
            assert abs(drawn - k * phase.weights[index] / WEIGHT_SUM) <= 1
            assert phase.weights[index] / WEIGHT_SUM == pytest.approx(asked.get(source.name, 0), abs=1e-9)
    summary = summarize(plan)
    assert sum(source["realised"] for source in summary["sources"]) == pytest.approx(1)
    assert not [line for line in summary["warnings"] if not line.startswith("of unknown size")]
    for source, given in zip(summary["sources"], config.sources, strict=True):
        assert source["realised"] == pytest.approx(source["share"], abs=1e-6)
        assert (source["epochs"] is None) == (given.tokens is None)
        assert given.path.startswith("${MINIGPT_DATA:-data}/")
        assert source["samples"]


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_mixtures_name_one_source_the_same(path):
    """A folder has one name and one size, in whichever mixture it stands."""
    everywhere = {source.path: source for other in SHIPPED for source in load_mixture(other).sources}
    for source in load_mixture(path).sources:
        assert (source.name, source.tokens) == (everywhere[source.path].name, everywhere[source.path].tokens)


def test_the_balanced_mixture():
    config = load_mixture(SHIPPED[0])
    assert config.total_tokens == 2_000_000_000_000
    shares = {source["name"]: source["realised"] for source in summarize(plan_of(config, LENGTH))["sources"]}
    assert shares["starcoder"] == pytest.approx(0.1066, abs=1e-6)


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match=r"sources.0.token: unknown key 'token'; did you mean 'tokens'\?"):
        mixture([web(token=5)])
    for wrong in (0, -3, 1.5, "many"):
        with pytest.raises(UserError, match=r"sources\.0\.tokens: "):
            mixture([web(tokens=wrong)])


def test_the_same_numbers_as_with_the_data(tmp_path):
    sizes = {"web": 30_000, "maths": 1_000, "late": 9_000}
    for name, tokens in sizes.items():
        write_dataset(tmp_path / name, tokens)
    weights = {"web": 0.8, "maths": 0.2, "late": None}
    lines = [{"name": name, "path": name, "weight": weight} for name, weight in weights.items()]
    phases = [{"from": 0.5, "weights": {"web": 1, "late": 1}}]
    plain = mixture(lines, phases=phases, total_tokens=64_000)
    sized = mixture([{**line, "tokens": sizes[line["name"]]} for line in lines], phases=phases, total_tokens=64_000)
    real = MixturePlan.build(plain, 64, base=tmp_path)
    expected = summarize(real)
    found = summarize(plan_of(sized, base=tmp_path))
    assert (expected["plan_only"], found["plan_only"]) == (False, True)
    for summary in (expected, found):
        for key in ("plan_only", "vocab_size", "tokenizer_hash"):
            del summary[key]
        for source in summary["sources"]:
            del source["documents"]
    assert found == expected
    endless = mixture([{**line, "tokens": sizes[line["name"]]} for line in lines])
    with_data = MixturePlan.build(endless, 64, base=tmp_path)
    assert plan_of(endless).length() == with_data.length()


def test_expected_tokens_change_nothing_where_the_data_is(tmp_path):
    write_dataset(tmp_path / "web", 5_000)
    line = {"name": "web", "path": "web", "weight": 1}
    plans = [
        MixturePlan.build(mixture([{**line, **more}], total_tokens=9_000), 64, base=tmp_path)
        for more in ({}, {"tokens": 5_000}, {"tokens": 1})
    ]
    assert len({plan.fingerprint(100) for plan in plans}) == 1
    assert plans[0].past(100) == plans[2].past(100)
    assert summarize(plans[0]) == summarize(plans[2])


def test_sizes_that_are_not_known_are_left_open():
    config = mixture([web(tokens=10_000), {"name": "new", "path": "new", "weight": 3}], total_tokens=1024 * 64)
    summary = summarize(plan_of(config))
    known, new = summary["sources"]
    assert known["epochs"] == pytest.approx(256 / 155)
    assert [new[key] for key in PLAN_ONLY] == [None] * len(PLAN_ONLY)
    assert new["samples"] == 768
    assert [source["epochs"] for source in summary["phases"][0]["sources"]] == [known["epochs"], None]
    assert summary["warnings"] == ["of unknown size: 'new'; give `tokens` to count their epochs and check max_epochs"]
    assert json.loads(json.dumps(summary)) == summary
    assert "of unknown size" in page(summary)
    assert "plan without data" in str(tables(summary)[1])
    with pytest.raises(UserError, match="give `tokens` to 'new'"):
        plan_of(config.model_copy(update={"total_tokens": None}))


def test_max_epochs_is_checked_against_the_expected_size():
    sources = [web(tokens=10_000, max_epochs=2), {"name": "new", "path": "new", "weight": 1, "max_epochs": 1}]
    assert plan_of(mixture(sources, total_tokens=39_000)).total_samples == 609
    with pytest.raises(UserError, match=r"'web': max_epochs 2 allows 310 windows, the weights draw 498"):
        plan_of(mixture(sources, total_tokens=64_000))
    with pytest.raises(UserError, match="holds 100 tokens, too few for windows of 64"):
        plan_of(mixture([web(tokens=100)], total_tokens=64_000))
