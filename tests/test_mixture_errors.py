"""A mixture that cannot be met is refused with one message that says what is wrong and what would do."""

from __future__ import annotations

import re

import pytest
import yaml
from dataset_files import write_dataset

from shards.errors import UserError
from shards.mixture import MixturePlan, load_mixture

BASE = {
    "name": "balanced",
    "total_tokens": 32_000,
    "sources": [{"name": "web", "path": "web", "weight": 0.7}, {"name": "math", "path": "math", "weight": 0.3}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    write_dataset(folder / "web", 9000)
    write_dataset(folder / "math", 2000, seed=1)
    write_dataset(folder / "tiny", 150, seed=2)
    write_dataset(folder / "foreign", 2000, words=300)
    (folder / "empty").mkdir()
    return folder


def load(folder, **changes):
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return load_mixture(path)


def sources(**changes):
    return {"sources": [BASE["sources"][0], {**BASE["sources"][1], **changes}]}


def phase(start, **weights):
    return {"from": start, "weights": weights or {"math": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (sources(weight=-0.1), "sources.1.weight: Input should be greater than or equal to 0 (given: -0.1)"),
        (sources(weight=float("nan")), "sources.1.weight: Input should be a finite number"),
        (sources(weight="much"), "sources.1.weight: Input should be a valid number"),
        (sources(wieght=1), "sources.1.wieght: unknown key 'wieght'; did you mean 'weight'?"),
        (sources(name="web"), "\n  two sources are called 'web'"),
        (sources(max_epochs=0), "sources.1.max_epochs: Input should be greater than 0"),
        ({"sources": []}, "sources: List should have at least 1 item"),
        ({"sources": [{"name": "web", "path": "web"}]}, "no source has a weight above 0 at the start"),
        ({"sources": [{"name": "web", "path": "web", "weight": 0}]}, "no source has a weight above 0 at the start"),
        ({"total_tokens": 0}, "total_tokens: Input should be greater than 0"),
        ({"phases": [phase(0.5, maths=1)]}, "phases.0.weights: unknown source 'maths'; did you mean 'math'?"),
        ({"phases": [phase(0.5, math=0)]}, "phases.0.weights: all weights are zero"),
        ({"phases": [phase(0.5, math=-1)]}, "the weight of 'math' must be a number >= 0, found -1"),
        ({"phases": [phase(0.5, math=float("nan"))]}, "the weight of 'math' must be a number >= 0, found nan"),
        (
            {"phases": [phase(1.5)]},
            "phases.0.from: must be a fraction of the total between 0 and 1, or a number of",
        ),
        ({"phases": [phase(0)]}, "phases.0.from: must be a fraction"),
        ({"phases": [phase("late")]}, "phases.0.from: must be a fraction"),
        (
            {"phases": [{"form": 0.5, "weights": {"math": 1}}]},
            "phases.0.form: unknown key 'form'; did you mean 'from'?",
        ),
    ],
)
def test_mistakes_in_the_file(folder, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(folder, **changes)
    assert str(caught.value).startswith(str(folder / "mixture.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (sources(path="nowhere"), "nowhere has no dataset.json"),
        (sources(path="empty"), "empty has no dataset.json"),
        (sources(path="${NO_SUCH_VARIABLE_HERE}/x"), "NO_SUCH_VARIABLE_HERE is not set"),
        (sources(path="foreign"), "were made with different tokenizers"),
        (
            sources(path="tiny"),
            r"source 'math' .*tiny\) holds 150 tokens, too few for windows of 100 .* largest seq_len that fits is 75",
        ),
        (sources(weight=1e-12), "sources: the weight of 'math' .* is less than 2\\^-32 of the sum"),
        ({"phases": [phase(0.5), phase(0.4)]}, r"phases.1.from is 0.4, but phases must start one after another"),
        ({"phases": [phase(9000), phase(9000)]}, r"phases.1.from is 9000, but phases must start one after another"),
        (
            {"phases": [phase(0.5)], "total_tokens": None},
            "phases.0.from is 0.5, a fraction of a total that is not known",
        ),
        ({"total_tokens": 99}, r"total_tokens \(99\) is less than one window of 100 tokens"),
    ],
)
def test_mistakes_found_with_the_data(folder, changes, message):
    with pytest.raises(UserError, match=message):
        MixturePlan.build(load(folder, **changes), 100, base=folder)


def test_seq_len_must_be_positive(folder):
    with pytest.raises(UserError, match="seq_len must be at least 1, found 0"):
        MixturePlan.build(load(folder), 0, base=folder)


def test_paths_expand_variables_and_defaults(folder, monkeypatch):
    config = load(folder, **sources(path="${MIXTURE_TEST_DATA:-nowhere}/math"))
    with pytest.raises(UserError, match=r"source 'math': .*nowhere/math has no dataset\.json"):
        MixturePlan.build(config, 100, base=folder)
    monkeypatch.setenv("MIXTURE_TEST_DATA", str(folder))
    plan = MixturePlan.build(config, 100, base=folder)
    assert plan.sources[1].dataset.path == folder / "math"


def test_relative_paths_start_at_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert MixturePlan.build(load(folder), 100).sources[0].dataset.tokens == 9000


def refusal(folder, total=None, **changes) -> str:
    with pytest.raises(UserError, match="max_epochs is exceeded") as caught:
        MixturePlan.build(load(folder, **changes), 100, base=folder, total_samples=total)
    return str(caught.value)


def test_exceeded_max_epochs_says_by_how_much_and_what_fits(folder):
    """320 windows, 30 % from 19 windows of math: 96 draws where 3 epochs allow 57."""
    message = refusal(folder, **sources(max_epochs=3))
    draws = MixturePlan.build(load(folder), 100, base=folder).counts(320)[1]
    assert draws in (95, 96, 97)
    assert f"max_epochs 3 allows 57 windows, the weights draw {draws}: {draws - 57} windows" in message
    assert f"({100 * (draws - 57):,} tokens) too many" in message
    epochs = float(re.search(r"fits with max_epochs: ([\d.]+)", message)[1])
    weight = float(re.search(r"with weight: ([\d.]+) instead of 0.3", message)[1])
    total = int(re.search(r"at most ([\d,]+) tokens in total", message)[1].replace(",", ""))
    for accepted in (sources(max_epochs=epochs), sources(max_epochs=3, weight=weight)):
        MixturePlan.build(load(folder, **accepted), 100, base=folder)
    MixturePlan.build(load(folder, total_tokens=total, **sources(max_epochs=3)), 100, base=folder)
    for refused in (
        {"total_tokens": total + 100, **sources(max_epochs=3)},
        sources(max_epochs=epochs - 0.06),
        sources(max_epochs=3, weight=weight + 0.01),
    ):
        refusal(folder, **refused)


def test_exceeded_max_epochs_with_phases_and_several_sources(folder):
    both = [{**source, "max_epochs": 1} for source in BASE["sources"]]
    message = refusal(folder, sources=both, phases=[phase(0.5)])
    assert "'web': max_epochs 1 allows 89 windows" in message
    assert "'math': max_epochs 1 allows 19 windows" in message
    factor = float(re.search(r"'web': .*with its weights times ([\d.]+)", message)[1])
    assert 0 < factor < 1
    total = int(re.search(r"at most ([\d,]+) tokens in total", message)[1].replace(",", ""))
    MixturePlan.build(load(folder, sources=both, phases=[phase(0.5)], total_tokens=total), 100, base=folder)


def test_the_only_source_is_not_offered_a_smaller_weight(folder):
    message = refusal(folder, sources=[{"name": "web", "path": "web", "weight": 1, "max_epochs": 2}])
    assert "fits with max_epochs: 3.6" in message
    assert "weight:" not in message


def test_length_of_the_run_counts_where_the_mixture_has_no_total(folder):
    changes = {"total_tokens": None, **sources(max_epochs=1)}
    config = load(folder, **changes)
    assert MixturePlan.build(config, 100, base=folder).total_samples is None  # no length, nothing to enforce
    assert MixturePlan.build(config, 100, base=folder, total_samples=40).total_samples == 40
    assert "over 50,000 tokens" in refusal(folder, 500, **changes)
