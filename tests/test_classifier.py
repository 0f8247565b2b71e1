"""A fastText classifier as a rule, and its training: the same file each time, figures that are right."""

from __future__ import annotations

import json
import pickle
import random

import fasttext_pybind
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prep_data import prose, write_rows

from prep.filters.classifier import ClassifierStage, build
from prep.filters.language import shipped_model
from prep.stages import Tally
from prep.train_classifier import NEGATIVE, POSITIVE, area_under_curve, threshold_rows, train_classifier
from shards.errors import UserError

SMALL = {
    "dimension": 8,
    "buckets": 10_000,
    "min_count": 1,
    "epochs": 10,
    "learning_rate": 0.5,
    "say": lambda _: None,
}
GOOD_WORDS = ["theorem", "proof", "lemma", "therefore", "integral"]
POOR_WORDS = ["buy", "cheap", "click", "offer", "now"]


def documents(words, number, seed):
    """Prose with some words of one kind in it; a few documents have both kinds."""
    rng = random.Random(seed)
    texts = []
    for index in range(number):
        own = words if rng.random() < 0.95 else GOOD_WORDS + POOR_WORDS
        text = prose(seed * 10_000 + index, 20).split(" ") + [rng.choice(own) for _ in range(8)]
        rng.shuffle(text)
        texts.append({"text": " ".join(text)})
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    good = write_rows(folder / "good.jsonl", documents(GOOD_WORDS, 400, 1))
    poor = write_rows(folder / "poor.jsonl", documents(POOR_WORDS, 600, 2))
    return good, poor, train_classifier([str(good)], [str(poor)], folder / "model.bin", **SMALL)


def batch(texts):
    names = [f"d{number}" for number in range(len(texts))]
    columns = [pa.array(values, pa.string()) for values in (names, texts, ["s"] * len(texts))]
    return pa.RecordBatch.from_arrays(columns, names=["id", "text", "source"])


def test_training_separates_and_reports(trained):
    _, _, training = trained
    assert training.auc > 0.95
    assert 320 < training.positive < 380
    assert training.positive + training.positive_held_out == 400
    assert training.negative + training.negative_held_out == 600
    assert training.size == training.model.stat().st_size
    thresholds = [row.threshold for row in training.rows]
    assert thresholds == sorted(thresholds)
    assert 0.5 in thresholds
    assert min(row.positive_kept for row in training.rows) < 0.52
    assert training.table().count("\n") == len(training.rows)
    written = json.loads((training.model.parent / "model.bin.json").read_text())
    assert written["figures"]["auc"] == training.auc
    assert written["settings"]["dimension"] == 8
    assert (
        written["figures"]["model_xxh3"]
        == build({"model": str(training.model), "label": "hq", "low": 0.5}, "x").model.digest
    )
    assert not list(training.model.parent.glob("train-classifier-*"))


@pytest.mark.parametrize("name", ["again.bin", pytest.param("again.ftz", marks=pytest.mark.slow)])
def test_same_documents_same_file(trained, tmp_path, name):
    good, poor, _ = trained
    rows = documents(GOOD_WORDS, 400, 1)
    shuffled = write_rows(tmp_path / "shuffled.jsonl", random.Random(3).sample(rows, len(rows)))
    contents = []
    for path in (good, shuffled):
        train_classifier([str(path)], [str(poor)], tmp_path / name, **SMALL)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    if name.endswith(".ftz"):
        assert len(contents[0]) < trained[2].size


@pytest.mark.parametrize("options", [{}, {"word_ngrams": 1}])
def test_what_the_process_left_in_memory_is_not_in_the_model(trained, tmp_path, options):
    good, poor, _ = trained
    contents = []
    for left in (1.0, np.nan):
        blocks = [np.full(size, left) for size in range(1_000, 100_000, 1_000)]
        del blocks
        train_classifier([str(good)], [str(poor)], tmp_path / "model.bin", **{**SMALL, **options})
        contents.append((tmp_path / "model.bin").read_bytes())
    assert contents[0] == contents[1]


def test_words_that_look_like_labels_are_words(tmp_path):
    good = [{"text": f"__label__cc __label__new {row['text']}"} for row in documents(GOOD_WORDS, 200, 1)]
    files = [write_rows(tmp_path / "a.jsonl", good), write_rows(tmp_path / "b.jsonl", documents(POOR_WORDS, 200, 2))]
    training = train_classifier([str(files[0])], [str(files[1])], tmp_path / "model.bin", **SMALL)
    stage = build({"model": str(training.model), "label": "hq", "low": 0.5}, "x")
    assert sorted(stage.model.labels) == [NEGATIVE, POSITIVE]
    assert training.auc > 0.95


def test_rule_keeps_by_score(trained):
    texts = [prose(7, 10) + " theorem proof lemma", prose(8, 10) + " buy cheap\nclick offer", "theorem", "click"]
    section = {"model": str(trained[2].model), "label": "hq", "low": 0.5, "column": "quality"}
    stage, tally = build(section, "recipe"), Tally("classifier")
    out = stage(batch(texts), tally)
    assert out.column("id").to_pylist() == ["d0", "d2"]
    assert out.schema == pa.schema([*batch([]).schema, *stage.adds])
    assert tally.rules["classifier.low"][0] == 2
    removed = tally.rejected[0].to_pylist()
    assert [row["id"] for row in removed] == ["d1", "d3"]
    assert all(row["threshold"] == 0.5 and row["value"] == pytest.approx(row["quality"]) for row in removed)
    assert all(row["value"] < 0.5 for row in removed)
    assert tally.histograms["classifier_score"].low == 0.5
    other, upper = build({**section, "label": "__label__cc", "low": None, "high": 0.5}, "recipe"), Tally("classifier")
    assert other(batch(texts), upper).column("id").to_pylist() == ["d0", "d2"]
    assert list(upper.rules) == ["classifier.high"]
    assert stage(batch([]), Tally("classifier")).num_rows == 0


def test_scores_are_fasttext_s_own(trained):
    model = fasttext_pybind.fasttext()
    model.loadModel(str(trained[2].model))
    texts = [prose(9, 30), "theorem\nproof", " ", "unknown-word-0815", "buy " * 500]
    for characters in (0, 12):
        stage = build({"model": str(trained[2].model), "label": "hq", "low": 0.1, "characters": characters}, "x")
        for text, score in zip(texts, stage.scores(pa.array(texts)), strict=True):
            line = (text[:characters] if characters else text).replace("\n", " ") + "\n"
            expected = {label: value for value, label in model.predict(line, 2, 0.0, "strict")}
            assert score == np.float32(min(expected[POSITIVE], 1))


def test_any_supervised_model_will_do():
    """The language model is one of 176 labels."""
    stage = build({"model": str(shipped_model("x")), "label": "en", "low": 0.5}, "recipe")
    assert stage.label == "__label__en"
    assert stage.scores(
        pa.array(["A plain English sentence about the river.", "Ein deutscher Satz."])
    ).round().tolist() == [1, 0]


def test_wrong_settings(trained, tmp_path):
    model = str(trained[2].model)
    vectors = tmp_path / "vectors.bin"
    vectors.write_bytes(trained[2].model.read_bytes())
    content = bytearray(vectors.read_bytes())
    content[8 + 7 * 4] = 2  # the kind of model in the header: word vectors by skip-gram
    vectors.write_bytes(content)
    for section, message in [
        ({"model": model, "label": "hqq", "low": 0.5}, "unknown label 'hqq'; did you mean 'hq'.*model.bin has "),
        ({"model": model, "label": "hq"}, "give `low` or `high`"),
        ({"model": model, "label": "hq", "low": 0.9, "high": 0.1}, "no document would stay"),
        ({"model": model, "label": "hq", "low": 2.0}, "low"),
        ({"model": model, "low": 0.5}, "label: required"),
        ({"model": model, "label": "hq", "treshold": 0.5}, "unknown key 'treshold'"),
        ({"model": "gone.bin", "label": "hq", "low": 0.5}, "gone.bin: no such file"),
        ({"model": str(vectors), "label": "hq", "low": 0.5}, "word vectors, not a classifier"),
    ]:
        with pytest.raises(UserError, match=message):
            build(section, "recipe.yaml: classifier")


def test_description_and_pickle(trained):
    section = {"model": str(trained[2].model), "label": "hq", "low": 0.018112}
    stage = build(section, "x")
    assert isinstance(stage, ClassifierStage)
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert json.dumps(stage.describe())
    assert stage.describe() != build({**section, "low": 0.02}, "x").describe()


def test_a_model_that_is_trained_again_is_loaded_again(trained, tmp_path):
    good, poor, _ = trained
    section = {"model": str(tmp_path / "model.bin"), "label": "hq", "low": 0.5}
    scores, digests = [], set()
    for sources in ((good, poor), (poor, good)):
        train_classifier([str(sources[0])], [str(sources[1])], tmp_path / "model.bin", **SMALL)
        stage = build(section, "x")
        digests.add(stage.model.digest)
        scores.append(stage.scores(pa.array(["theorem proof lemma"]))[0])
    assert scores[0] > 0.5 > scores[1]
    assert len(digests) == 2


def test_training_refuses(trained, tmp_path):
    good, poor, _ = trained
    few = write_rows(tmp_path / "few.jsonl", documents(GOOD_WORDS, 20, 1))
    bad = write_rows(tmp_path / "bad.jsonl", [*documents(GOOD_WORDS, 1_200, 1), *([b"{"] * 20)])
    for positive, out, options, message in [
        (few, "m.bin", {}, "--positive .*few.jsonl: 20 documents; give at least 100"),
        (good, "m.model", {}, "end the name in .bin"),
        (good, "m.bin", {"held_out": 0.9}, "--held-out 0.9"),
        (good, "m.bin", {"epochs": 0}, "--epochs 0"),
        (good, "m.bin", {"learning_rate": 1e6}, "--learning-rate"),
        (bad, "m.bin", {}, "20 of 1,220 rows are bad"),
        (good, "m.bin", {"text_column": "body"}, "body"),
    ]:
        with pytest.raises(UserError, match=message):
            train_classifier([str(positive)], [str(poor)], tmp_path / out, **{**SMALL, **options})
    assert not (tmp_path / "m.bin").exists()


scores = st.lists(st.integers(0, 8), min_size=1, max_size=30).map(lambda values: np.array(values, np.float32) / 8)


@given(scores, scores)
def test_figures_are_what_they_say(positive, negative):
    pairs = [(a > b) + (a == b) / 2 for a in positive for b in negative]
    assert area_under_curve(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    rows = threshold_rows(positive, negative)
    for row in rows:
        kept, wrong = (positive >= row.threshold).sum(), (negative >= row.threshold).sum()
        assert row.positive_kept == kept / len(positive)
        assert row.negative_kept == wrong / len(negative)
        assert row.precision == (kept / (kept + wrong) if kept + wrong else 1)
    for share in (0.99, 0.9, 0.5):
        assert any(row.positive_kept >= share for row in rows)
