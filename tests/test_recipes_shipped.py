"""The recipes in configs/data/recipes: they can be read, built and run, and do what their comments say."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prep_data import prose, small_tokenizer, write_rows
from typer.testing import CliRunner

from prep.cli import app
from prep.pipeline import DedupStep, GuardedStep
from prep.recipe import load_recipe, read_recipe
from prep.stages import Step
from shards.errors import UserError
from shards.reader import TokenDataset

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs/data/recipes").glob("*.yaml"))
SOURCES = {"fineweb": "FINEWEB_SOURCE", "code": "CODE_SOURCE", "math": "MATH_SOURCE"}
ITEM = "Natalia sold 48 clips in April, half as many in May; how many did she sell in both months together?"
TASK = 'def mean_gap(numbers): """ The mean of the gaps between neighbouring numbers, for at least two of them. """'
ENGLISH = (
    "The history of the valley is told in many books, and most of them begin with the river. People came to it because "
    "the soil was good and the winters were short, and they stayed because they had built something that was worth "
    "keeping. There is a mill that still stands by the old bridge. Visitors ask about it every summer, and someone has "
    "to tell them that it was never used for grain."
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a tokenizer and evaluation items, and the current folder above it."""
    for name in SOURCES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("DEMO_PROSE", raising=False)
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path / "data"))
    evaluation = tmp_path / "data" / "evaluation"
    evaluation.mkdir(parents=True)
    write_rows(evaluation / "gsm8k-test.jsonl", [{"question": ITEM, "answer": "She sold 24 in May and 72 in all."}])
    (evaluation / "HumanEval.jsonl.gz").write_bytes(gzip.compress(orjson.dumps({"prompt": TASK})))
    (tmp_path / "data" / "tokenizer.json").write_bytes(small_tokenizer())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(path: Path) -> list[str]:
    return [next(iter(stage)) for stage in read_recipe(path).stages]


def documents(folder: Path) -> dict[str, str]:
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["id"]: row["text"] for row in rows}


def run(name: str) -> dict[str, Any]:
    """`minigpt-prep run` on one worker; the report of the whole."""
    done = CliRunner().invoke(
        app, ["run", str(ROOT / f"configs/data/recipes/{name}.yaml"), "--workers", "1"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = orjson.loads(Path("data", name, "report.json").read_bytes())
    return report


def rejected(folder: Path) -> dict[str, str]:
    parts = sorted((folder / "rejected").glob("*.parquet"))
    return {row["id"]: row["rule"] for part in parts for row in pq.read_table(part).to_pylist()}


def test_there_are_four():
    assert [path.stem for path in RECIPES] == ["code", "demo", "fineweb", "math"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_reads_without_its_inputs_and_ends_in_tokens(path, monkeypatch):
    for name in (*SOURCES.values(), "MINIGPT_DATA", "DEMO_PROSE"):
        monkeypatch.delenv(name, raising=False)
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert names(path)[-1] == "tokenize"
    assert "dedup" in names(path)
    assert recipe.output == f"data/{path.stem}"


def test_fineweb_keeps_the_order_of_fineweb():
    order = names(ROOT / "configs/data/recipes/fineweb.yaml")
    assert order == ["language", "filter", "dedup", "decontaminate", "mask", "tokenize"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_evaluation_file_is_an_error(name, data, monkeypatch):
    for file in (data / "data/evaluation").iterdir():
        file.unlink()
    monkeypatch.setenv(SOURCES[name], str(write_rows(data / "a.jsonl", [{"text": "a", "content": "a", "url": "u"}])))
    with pytest.raises(UserError, match=r"evaluation/.*no such file"):
        load_recipe(ROOT / f"configs/data/recipes/{name}.yaml")


def test_fineweb_on_a_crawl(data, monkeypatch):
    noise = " ".join(f"{number} ;;" for number in range(200))
    rows = {
        "page": f"{ENGLISH} Write to mary.jones@site.org, or look at 52.14.2.3.",
        "copy": f"{ENGLISH} Write to mary.jones@site.org, or look at 52.14.2.3.",
        "german": "Das ist eine ganz gewöhnliche Seite, und sie handelt von nichts als dem Wetter in den Bergen. " * 3,
        "noise": f"{ENGLISH} {noise}",
        "exam": f"{ENGLISH} Somebody asked this in class. {ITEM}",
    }
    table = pa.table({"id": list(rows), "text": list(rows.values()), "url": [f"https://a.org/{name}" for name in rows]})
    (data / "crawl").mkdir()
    pq.write_table(table, data / "crawl/0.parquet")
    monkeypatch.setenv("FINEWEB_SOURCE", "crawl/*.parquet")
    report = run("fineweb")
    out = data / "data/fineweb"
    assert documents(out / "documents") == {"page": f"{ENGLISH} Write to email@example.com, or look at 192.0.2.1."}
    gone = rejected(out / "before-dedup") | rejected(out / "documents")
    assert gone["german"] == "language.other"
    assert gone["noise"].startswith("gopher_")
    assert gone["exam"] == "decontaminate.gsm8k-test"
    assert gone["copy"] in ("exact", "minhash")
    assert report["tokens"][0]["documents"] == 1
    assert TokenDataset(out / "web").manifest.tokens == report["tokens"][0]["tokens"]


def test_code_on_a_folder_of_sources(data, monkeypatch):
    body = "\n".join(f"def step_{n}(value):\n    return value * {n} + offset_{n}" for n in range(30)) + "\n"
    source = data / "src"
    source.mkdir()
    (source / "kept.py").write_text(f"# Copyright 2020 Somebody. All rights reserved.\n\n{body}")
    (source / "vendored.py").write_text(f"# Copyright 2024 Somebody else, MIT license\n\n{body}")
    (source / "made.py").write_text(f"# Automatically generated by a tool\n{body}")
    (source / "secret.py").write_text(body.replace("step", "other") + 'KEY = "AKIAZ7QWERTYUIOPLKJH"\n')
    (source / "task.py").write_text(body.replace("value", "thing") + TASK + "\n")
    (source / "empty.py").write_text("x = 1\n")
    monkeypatch.setenv("CODE_SOURCE", "src")
    run("code")
    out = data / "data/code"
    kept = documents(out / "documents")
    assert set(kept) == {"src/kept.py", "src/secret.py"}
    assert kept["src/kept.py"] == body
    assert "AKIA" not in kept["src/secret.py"]
    gone = rejected(out / "before-dedup") | rejected(out / "documents")
    assert gone["src/made.py"] == "code.generated"
    assert gone["src/empty.py"] == "length.characters"
    assert gone["src/vendored.py"] in ("exact", "minhash")
    assert gone["src/task.py"] == "decontaminate.HumanEval"


def test_math_keeps_what_the_rules_for_prose_would_remove(data, monkeypatch):
    solution = (
        "We solve the equation x^2 - 5x + 6 = 0. Since 2 + 3 = 5 and 2 * 3 = 6, we can write x^2 - 5x + 6 as "
        "(x - 2)(x - 3). A product is zero when one of its factors is, so x - 2 = 0 or x - 3 = 0, and that gives x = 2 "
        "or x = 3. To check the first: 2^2 - 5 * 2 + 6 = 4 - 10 + 6 = 0, as it should be, and likewise with the other."
    )
    rows = [
        {"id": "solution", "text": solution},
        {"id": "exam", "text": f"{solution} {ITEM}"},
        {"id": "table", "text": "\n".join(f"{n} | {n * n} | {n**3} |" for n in range(100))},
    ]
    monkeypatch.setenv("MATH_SOURCE", str(write_rows(data / "math.jsonl", rows)))
    run("math")
    out = data / "data/math"
    assert documents(out / "documents") == {"solution": solution}
    gone = rejected(out / "before-dedup") | rejected(out / "documents")
    assert gone["exam"] == "decontaminate.gsm8k-test"
    assert gone["table"].startswith("gopher_")


def test_demo_takes_another_corpus(data, monkeypatch):
    """What the README says: DEMO_PROSE is a folder of save_to_disk."""
    from datasets import Dataset

    Dataset.from_dict({"text": [f"{ENGLISH} {prose(seed, 60)}" for seed in range(40)]}).save_to_disk(data / "stories")
    raw = data / "data/demo/raw"
    raw.mkdir(parents=True)
    (data / "data/demo/tokenizer.json").write_bytes(small_tokenizer())
    rows = [{"id": f"{n}.py", "text": f"def f{n}(a):\n    return [a, {n}]\n" * 5} for n in range(40)]
    write_rows(data / "code.jsonl", rows)
    (raw / "code.jsonl.zst").write_bytes(zstandard.compress((data / "code.jsonl").read_bytes()))
    monkeypatch.setenv("DEMO_PROSE", "stories")
    recipe = load_recipe(ROOT / "configs/data/recipes/demo.yaml")
    kinds = [type(step.step.stage if isinstance(step, GuardedStep) else step) for step in recipe.work.steps]
    assert kinds.count(DedupStep) == 1
    assert {step.sources for step in recipe.work.steps if isinstance(step, Step)} == {("code",), ("prose",), None}
    report = run("demo")
    assert [entry["name"] for entry in report["tokens"]] == ["code", "prose"]
    assert TokenDataset(data / "data/demo/prose").manifest.documents > 30


@pytest.mark.parametrize("page", ["README.md", "docs/DATASET_MIXING_GUIDE.md"])
def test_recipes_in_the_documentation_can_be_built(page, data):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    recipes = [block for block in blocks if "stages:" in block]
    assert recipes
    for folder in ("crawl", "raw"):
        (data / folder).mkdir()
    table = pa.table({"text": ["a"], "url": ["https://a.org"]})
    pq.write_table(table, data / "crawl/0.parquet")
    shutil.copy(write_rows(data / "raw/web.jsonl", [{"text": "a"}]), data / "raw/books.jsonl")
    (data / "raw/books.jsonl.zst").write_bytes(zstandard.compress((data / "raw/books.jsonl").read_bytes()))
    for file in (data / "data/evaluation").iterdir():
        shutil.copy(file, data)
    for number, block in enumerate(recipes):
        path = data / f"{number}.yaml"
        path.write_text(block)
        assert load_recipe(path).tokenize is not None
