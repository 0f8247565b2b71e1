"""Recipe files: what they say, what they may not say, and the messages for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from prep_data import small_tokenizer, write_rows
from prep_runs import HAS_LANGUAGE_MODEL, documents, kept, write_recipe

from prep.executors import LocalExecutor
from prep.recipe import load_recipe
from prep.run_recipe import dry_run_recipe, run_recipe
from shards.errors import UserError
from shards.reader import TokenDataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_rows(tmp_path / "crawl.jsonl", documents(1, 30))
    write_rows(tmp_path / "books.jsonl", [{"content": row["text"], "name": row["id"]} for row in documents(2, 20)])
    write_rows(tmp_path / "exam.jsonl", [{"question": "a question of more than five words"}])
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*stages: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "output": "out",
        "sources": [
            {"name": "crawl", "path": "crawl.jsonl"},
            {"name": "books", "path": ["books.jsonl"], "text_column": "content", "id_column": "name"},
        ],
        "stages": copy.deepcopy(list(stages)),
        **more,
    }


def load(folder: Path, data: Any) -> Any:
    return load_recipe(write_recipe(folder / "recipe.yaml", data))


def run(folder: Path, data: Any) -> dict[str, Any]:
    return run_recipe(load(folder, data), LocalExecutor(1), workers=1, say=lambda line: None)


MASK = {"mask": {"email": True}}
TOKENIZE = {"tokenize": {"tokenizer": "tokenizer.json"}}


def test_each_source_becomes_a_dataset(folder):
    report = run(folder, recipe(MASK, "dedup", TOKENIZE))
    assert [row["name"] for row in report["tokens"]] == ["crawl", "books"]
    for row in report["tokens"]:
        dataset = TokenDataset(folder / "out" / row["name"])
        assert dataset.tokens == row["tokens"]
        assert row["documents"] == len([d for d in kept(folder / "out" / "documents") if d["source"] == row["name"]])
    assert orjson.loads((folder / "out" / "report.json").read_bytes())["tokens"] == report["tokens"]
    assert "small" in (folder / "out" / "report.html").read_text()
    assert {row["id"] for row in kept(folder / "out" / "documents") if row["source"] == "books"} <= {
        row["id"] for row in documents(2, 20)
    }


def test_a_recipe_without_tokens_ends_in_documents(folder):
    report = run(folder, recipe(MASK))
    assert report["tokens"] is None
    assert len(kept(folder / "out" / "documents")) == 50


def test_tokens_of_other_documents_are_replaced(folder):
    datasets = {"datasets": {"all": ["crawl", "books"]}}
    before = run(folder, recipe(MASK, {"tokenize": {"tokenizer": "tokenizer.json", **datasets}}))
    after = run(folder, recipe(MASK, "dedup", {"tokenize": {"tokenizer": "tokenizer.json", **datasets}}))
    assert after["tokens"][0]["documents"] < before["tokens"][0]["documents"]


def test_variables_are_replaced(folder, monkeypatch):
    monkeypatch.setenv("WHERE", str(folder))
    data = recipe(MASK, {"tokenize": {"tokenizer": "${WHERE}/tokenizer.json"}}, output="${OTHER:-fallback}")
    data["sources"][0]["path"] = "${WHERE}/crawl.jsonl"
    run(folder, data)
    assert (folder / "fallback" / "documents" / "manifest.json").exists()
    data["output"] = "${MISSING}"
    with pytest.raises(UserError, match="MISSING"):
        load(folder, data)


def test_a_dry_run_writes_nothing(folder):
    before = list(folder.rglob("*"))
    data = recipe({"filter": {"preset": "gopher"}}, "dedup", TOKENIZE)
    parts = dry_run_recipe(load(folder, data), 10)
    assert "Deduplication is left out" in str(parts[-1])
    assert {*folder.rglob("*")} == {*before, folder / "recipe.yaml"}


def broken(change: Any) -> dict[str, Any]:
    data = recipe({"filter": {"preset": "gopher"}}, MASK, "dedup", TOKENIZE)
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(outptu="x"), "unknown key 'outptu'; did you mean 'output'?"),
        (lambda r: r.pop("output"), "output"),
        (lambda r: r.update(sources=[]), "sources"),
        (lambda r: r.update(stages=[]), "stages"),
        (lambda r: r.update(stages="filter"), "stages"),
        (lambda r: r.update(format="parket"), "format"),
        (lambda r: r.update(max_bad_rows=2), "max_bad_rows"),
        (lambda r: r.update(max_bad_rows="few"), "max_bad_rows"),
        (lambda r: r["sources"][0].update(pth="x"), "unknown key 'pth'; did you mean 'path'?"),
        (lambda r: r["sources"][1].update(name="crawl"), "names come twice"),
        (lambda r: r["sources"][0].update(name="a/b"), "name"),
        (lambda r: r["sources"][0].update(path="missing.jsonl"), "missing.jsonl: no such file"),
        (lambda r: r["sources"][0].update(path="*.parquet"), "no file matches"),
        (lambda r: r["sources"][1].pop("text_column"), "no column 'text'; columns found: content, name"),
        (
            lambda r: r["sources"][0].update(columns=["score"]),
            "no file has a column 'score' to keep; columns found: id, text, url",
        ),
        (
            lambda r: r["stages"].insert(0, {"filtre": {}}),
            "stages.1: filtre: unknown stage 'filtre'; did you mean 'filter'?",
        ),
        (lambda r: r["stages"].insert(0, {"filter": {}, "mask": {}}), "each stage is one"),
        (lambda r: r["stages"].insert(0, {"mask": 5}), "stages.1: mask: expected settings"),
        (lambda r: r["stages"].append(MASK), "tokenize is the last stage"),
        (lambda r: r["stages"][0]["filter"].update(preset="gofer"), "unknown preset 'gofer'; did you mean 'gopher'?"),
        (lambda r: r["stages"][0]["filter"].update(presets="gopher"), "unknown key 'presets'; did you mean 'preset'?"),
        (
            lambda r: r["stages"][0]["filter"].update(rules={"gopher_quality.word_cuont": False}),
            "unknown rule 'gopher_quality.word_cuont'; did you mean 'gopher_quality.word_count'?",
        ),
        (
            lambda r: r["stages"][0]["filter"].update(rules={"gopher_quality.word_count": {"low": "many"}}),
            "gopher_quality.word_count",
        ),
        (
            lambda r: r["stages"][0]["filter"].update(rules={"gopher_quality.word_count": {"low": 10, "high": 5}}),
            "low 10.0 is above high 5.0",
        ),
        (lambda r: r["stages"][0]["filter"].update(sources=["crwal"]), "unknown source 'crwal'; did you mean 'crawl'?"),
        (lambda r: r["stages"][0]["filter"].update(sources="crawl"), "is not a list of names"),
        (lambda r: r["stages"][0]["filter"].update(sources=[]), "is not a list of names"),
        (
            lambda r: r["stages"].insert(2, {"dedup": {"treshold": 0.8}}),
            "unknown key 'treshold'; did you mean 'threshold'?",
        ),
        (lambda r: r["stages"].insert(2, {"dedup": {"threshold": "high"}}), "threshold"),
        (lambda r: r["stages"].insert(2, {"dedup": {"threshold": 1.5}}), "threshold"),
        (lambda r: r["stages"].insert(2, {"dedup": {"method": "minhsh"}}), "did you mean 'minhash'?"),
        (lambda r: r["stages"].insert(2, {"dedup": {"reference": ["gone/"]}}), "gone/: no such file"),
        (
            lambda r: r["stages"].insert(2, {"decontaminate": {"against": ["exam.jsonl"], "max_removed": "half"}}),
            "max_removed: 'half' is not a share",
        ),
        (lambda r: r["stages"].insert(2, {"decontaminate": {"against": ["nothing.jsonl"]}}), "nothing.jsonl"),
        (lambda r: r["stages"][-1]["tokenize"].update(datasets={"a": ["book"]}), "did you mean 'books'?"),
        (lambda r: r["stages"][-1]["tokenize"].update(datasets={"documents": ["books"]}), "'documents' cannot be"),
        (lambda r: r["stages"][-1]["tokenize"].update(datasets={"a/b": ["books"]}), "'a/b' cannot be"),
        (lambda r: r["stages"][-1]["tokenize"].update(datasets={"a": []}), "has at least one source"),
        (lambda r: r["stages"][-1]["tokenize"].update(tokeniser="x"), "did you mean 'tokenizer'?"),
    ],
)
def test_mistakes_are_named_with_their_place(folder, change, message):
    data = yaml.safe_load(yaml.safe_dump(broken(change)))
    with pytest.raises(UserError) as stopped:
        load(folder, data)
    assert message in str(stopped.value)
    assert not (folder / "out").exists()


def test_a_missing_tokenizer_is_told_before_the_work(folder):
    data = recipe(MASK, {"tokenize": {"tokenizer": "gone.json"}})
    with pytest.raises(UserError, match=r"gone\.json"):
        run(folder, data)
    assert not (folder / "out").exists()


def test_a_source_of_which_nothing_is_left(folder):
    """Its dataset cannot be made; the message says which, and what was done is kept."""
    write_rows(folder / "crawl.jsonl", [{"id": "a", "text": "too short"}])
    data = recipe({"filter": {"preset": "gopher", "sources": ["crawl"]}}, TOKENIZE)
    with pytest.raises(UserError) as stopped:
        run(folder, data)
    assert "crawl: no document of crawl is left" in str(stopped.value)
    assert len(kept(folder / "out" / "documents")) == 20


@pytest.mark.skipif(not HAS_LANGUAGE_MODEL, reason="no language model here")
def test_languages_that_yaml_misreads(folder):
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe(MASK)).replace("- mask", "- language: {languages: [no]}\n- mask")
    )
    with pytest.raises(UserError, match="reads a bare no as false"):
        load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("text", ["", "- a list", "name: [", "just text"])
def test_files_that_are_no_recipes(folder, text):
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(folder / "recipe.yaml")
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_recipe(folder / "nowhere.yaml")


def test_columns_of_two_types_are_refused(folder):
    write_rows(folder / "books.jsonl", [{"content": "some text", "name": "a", "score": "high"}])
    write_rows(folder / "crawl.jsonl", [{"text": "some text", "score": 1}])
    data = recipe(MASK)
    for source in data["sources"]:
        source["columns"] = ["score"]
    with pytest.raises(UserError, match="column 'score' holds int64 in one source and string in another"):
        run(folder, data)
