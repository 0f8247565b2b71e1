"""Deduplication between its passes: that both saw the same, what is left of an earlier run, references, recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from prep_data import write_rows
from prep_runs import kept, write_recipe
from test_dedup_passes import SCHEMA, Row, cut, dedup, first_pass, make_rows, options

import prep.progress
from prep.arrays import load_array, open_array, save_array
from prep.dedup import paragraphs, removal, repeats
from prep.dedup.decide import PartArrays
from prep.dedup.passes import UnitHashes
from prep.dedup.settings import DedupSettings
from prep.executors import LocalExecutor
from prep.parts import Job, Part, run_part
from prep.recipe import load_recipe
from prep.run_recipe import run_recipe
from prep.storage import Folder
from shards.errors import UserError
from shards.settings import validate

LINES = [f"This is line {number} of a text, and it is long enough to be cut." for number in range(40)]


def with_lines(*numbers: Sequence[int], name: str = "web") -> list[Row]:
    return [
        {"id": f"{name}-{place}", "text": "\n".join(LINES[number] for number in chosen), "source": name, "score": 0}
        for place, chosen in enumerate(numbers)
    ]


@pytest.mark.parametrize("method", ["exact", "minhash", "line"])
def test_passes_that_see_other_documents_stop_the_run(tmp_path: Path, method: str) -> None:
    rows = make_rows(100)
    new = {"id": "new", "text": "one more document that is long enough to be looked at", "source": "web", "score": 0}
    settings = options(method)
    for name, later in {
        "more in the last part": [*rows, new],
        "fewer in the last part": rows[:-1],
        "fewer, and the others move": rows[1:],
        "a part less": rows[:80],
        "a part more": [*rows, *make_rows(30)],
    }.items():
        with pytest.raises(
            UserError, match=r"the input changed while the run went on \(.*run it again|missing; run it"
        ):
            dedup(tmp_path / name, rows, settings, later=later)


def test_a_document_goes_under_its_id_alone(tmp_path: Path) -> None:
    rows = make_rows(100)
    with pytest.raises(UserError, match="part 0 holds other documents than before"):
        dedup(tmp_path, rows, DedupSettings(), later=[rows[1], rows[0], *rows[3:50], rows[2], *rows[50:]])


def test_candidates_that_are_other_documents_stop_the_run(tmp_path: Path) -> None:
    rows = make_rows(100)
    for name, later, message in (
        ("fewer", rows[:95], "part 2 has 15 documents, before 20"),
        ("more", [*rows, *rows[:2]], "part 2 has 22 documents or more, before 20"),
        ("none", rows[:80], "part 2 is not there any more"),
    ):
        out = Folder(tmp_path / name)
        with LocalExecutor(1) as executor:
            first = first_pass(out.child("first"), rows, DedupSettings(), 40, 100, executor)
            parts = partial(cut, later, 40, 100)
            changed = removal.FirstPass(first.arrays, first.states, lambda parts=parts: iter(parts()), SCHEMA)
            with pytest.raises(UserError, match=message):
                removal.find_removal(changed, DedupSettings(), out.child("scratch"), out, executor)


@pytest.mark.parametrize(("method", "folder"), [("minhash", "decisions"), ("line", "cuts")])
def test_each_part_has_decisions_and_a_missing_one_is_no_empty_one(tmp_path: Path, method: str, folder: str) -> None:
    rows = [*make_rows(60), *make_rows(40, "other", seed=9)[:1]]
    run = dedup(tmp_path, rows, options(method))
    lies = tmp_path / "scratch" / folder
    names = sorted(path.name for path in lies.iterdir())
    assert [name.partition(".")[0] for name in names] == ["part-00000", "part-00001", "part-00002"]
    content = {name: (lies / name).read_bytes() for name in names}
    (lies / names[1]).unlink()
    again = dedup(tmp_path, rows, options(method))  # what is missing is made again
    assert (again.kept, again.rejected) == (run.kept, run.rejected)
    assert {name: (lies / name).read_bytes() for name in names} == content
    with LocalExecutor(1) as executor:
        first = first_pass(Folder(tmp_path / "first"), rows, options(method), 40, 16, executor)
        out = Folder(tmp_path)
        found = removal.find_removal(first, options(method), out.child("scratch"), out, executor)
        (lies / names[1]).unlink()
        with pytest.raises(UserError, match=f"{names[1]}: missing; .*un it again"):
            run_part(Job(out, SCHEMA, (), removal=found.stage), "x", cut(rows, 40, 16)[1])


def test_decisions_are_on_the_disk_before_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    write, sync = Folder.write, Folder.sync

    def written(folder: Folder, name: str, *arguments: Any, **more: Any) -> None:
        done.append(name)
        write(folder, name, *arguments, **more)

    def synced(folder: Folder, names: Any) -> None:
        names = list(names)
        done.extend(f"sync {Path(folder.uri).name}/{name}" for name in names)
        sync(folder, names)

    monkeypatch.setattr(Folder, "write", written)
    monkeypatch.setattr(Folder, "sync", synced)
    for method, name in (("exact", "decisions/part-00002.parquet"), ("line", "cuts/part-00002.npy")):
        done.clear()
        dedup(tmp_path / method, make_rows(100), options(method))
        assert done.index(f"sync {name}") < done.index("done.json")


@pytest.mark.parametrize("partition", [1 << 24, 2])
def test_units_of_the_reference_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: int) -> None:
    monkeypatch.setattr(repeats, "PARTITION_UNITS", partition)
    rows = with_lines([0, 1, 2], [3, 4], [1, 5], [6, 7, 8])
    reference = with_lines([0, 9], [9, 6], [9], name="known")
    run = dedup(tmp_path, rows, options("line"), reference=reference, per_part=2)
    assert [(row["id"], row["text"].splitlines()) for row in run.kept] == [
        ("web-0", [LINES[1], LINES[2]]),
        ("web-1", [LINES[3], LINES[4]]),
        ("web-2", [LINES[5]]),
        ("web-3", [LINES[7], LINES[8]]),
    ]
    assert run.report["repeated_units"] == 3  # those of the reference are not counted
    assert run.report["documents"] == 4


def test_arrays_of_an_earlier_run_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    """Part 1 has no block any more: it makes no array, and the one that lies there is of before."""
    out, settings = Folder(tmp_path), options("line")
    rows = with_lines([0], [1], [1], [2])
    with LocalExecutor(1) as executor:
        first_pass(out.child("first"), rows, settings, 1, 1, executor)
        parts = cut(rows, 1, 1)
        parts[1] = Part(1, "web", [], 1, "empty", 0)
        job = Job(out.child("first"), SCHEMA, (), UnitHashes(settings), writes=False)
        states = [run_part(job, job.digest(), part) for part in parts]
        assert (tmp_path / "first/units/part-00001.hashes.npy").exists()
        first = removal.FirstPass(job.folder.child("units"), states, lambda: iter(parts), SCHEMA)
        found = removal.find_removal(first, settings, out.child("scratch"), out, executor)
        assert found.report["repeated_units"] == 0
        last = Job(out, SCHEMA, (), removal=found.stage)
        assert [run_part(last, found.digest, part)["kept_documents"] for part in parts] == [1, 0, 1, 1]


def test_partitions_of_units_read_each_array_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = with_lines(*(rng.integers(0, 40, rng.integers(1, 9)).tolist() for _ in range(60)))
    rows[28:28] = [{"id": "short", "text": "short", "source": "web", "score": 0} for _ in range(7)]
    whole = dedup(tmp_path / "whole", rows, options("line"), per_part=7)
    reads: list[tuple[str, str]] = []
    plain = PartArrays.load
    monkeypatch.setattr(PartArrays, "load", lambda part, key: reads.append((part.name(key), key)) or plain(part, key))
    monkeypatch.setattr(repeats, "PARTITION_UNITS", 20)
    many = dedup(tmp_path / "many", rows, options("line"), per_part=7)
    assert len(list((tmp_path / "many/scratch/repeats").iterdir())) == 16
    assert len(reads) == len(set(reads)) == 9  # of ten parts one has no unit
    assert (many.kept, many.rejected, many.report) == (whole.kept, whole.rejected, whole.report)


def test_the_pass_that_cuts_splits_each_batch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = paragraphs._split
    monkeypatch.setattr(paragraphs, "_split", lambda *arguments: calls.append(1) or plain(*arguments))
    dedup(tmp_path, make_rows(80), options("line"), per_part=40, per_block=20)
    assert len(calls) == 2 * 4  # four batches, once in each pass


def test_long_work_between_the_passes_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prep.progress, "LINE_SECONDS", 0.0)
    dedup(tmp_path / "near", make_rows(100), DedupSettings())
    said = capsys.readouterr().err
    assert re.search(r"^dedup: bands: 50%, about \d+ s left$", said, re.M)
    assert re.search(r"^dedup: candidates: 100%, \d+ MB/s of text, about 0 s left$", said, re.M)
    monkeypatch.setattr(repeats, "PARTITION_UNITS", 50)
    dedup(tmp_path / "line", make_rows(100), options("line"))
    said = capsys.readouterr().err
    assert "dedup: grouping: 100%" in said
    assert "dedup: repeats: 50%" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "line", "threshold": 0.8}, "method line does not look at threshold, which is for minhash"),
        ({"method": "paragraph", "keep": "first"}, "does not look at keep, which is for exact and minhash"),
        ({"method": "exact", "rows": 7}, "method exact does not look at rows, which is for minhash"),
        ({"max_cut": 0.5}, "method minhash does not look at max_cut, which is for paragraph and line"),
        ({"method": "exact", "min_characters": 3}, "does not look at min_characters"),
    ],
)
def test_options_that_a_method_does_not_look_at_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(DedupSettings, settings, "recipe.yaml")


def test_a_range_of_an_array_is_read_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    save_array(folder, "x.npy", np.arange(10, dtype=np.uint64))
    with open_array(folder, "x.npy") as read:
        assert (read(3, 5).tolist(), read(0, 1).tolist(), read(9, 10).tolist(), read(4, 4).tolist()) == (
            [3, 4],
            [0],
            [9],
            [],
        )
    assert load_array(folder, "x.npy").tolist() == list(range(10))


def run_stages(folder: Path, *stages: Any, columns: Sequence[str] = ()) -> dict[str, Any]:
    data = {
        "name": "small",
        "output": str(folder / "out"),
        "sources": [{"name": "web", "path": str(folder / "web.jsonl"), "columns": list(columns)}],
        "stages": list(stages),
    }
    recipe = load_recipe(write_recipe(folder / "recipe.yaml", data))
    return run_recipe(recipe, LocalExecutor(1), workers=1, say=lambda line: None)


def test_a_reference_needs_no_column_that_ranks(tmp_path: Path) -> None:
    rows = [{**row, "score": int(row["id"][4:])} for row in make_rows(60)]
    write_rows(tmp_path / "web.jsonl", rows)
    write_rows(tmp_path / "known.jsonl", [{"id": "k", "text": rows[0]["text"]}])
    settings = {"keep": "highest:score", "reference": [str(tmp_path / "known.jsonl")]}
    run_stages(tmp_path, {"dedup": settings}, columns=["score"])
    table = {row["id"]: row for row in pq.read_table(tmp_path / "out/documents/duplicates.parquet").to_pylist()}
    assert table["web-0"]["keeper"] == "k"
    assert any(row["keeper"] != "k" and int(row["keeper"][4:]) > int(name[4:]) for name, row in table.items())


def test_a_recipe_with_several_deduplications_reports_each(tmp_path: Path) -> None:
    rows = make_rows(120)
    write_rows(tmp_path / "web.jsonl", [{"id": row["id"], "text": row["text"]} for row in rows])
    out = tmp_path / "out" / "documents"
    report = run_stages(tmp_path, {"dedup": {"method": "exact"}}, {"dedup": {}}, {"dedup": {"method": "line"}})
    exact, near, line = report["dedup"]
    assert [entry["method"] for entry in report["dedup"]] == ["exact", "minhash", "line"]
    assert [entry["audit"] for entry in report["dedup"]] == ["duplicates.parquet", "duplicates-2.parquet", None]
    assert exact["documents"] == 120
    assert near["documents"] == 120 - exact["removed"]
    assert line["documents"] == near["documents"] - near["removed"]
    for entry, name in ((exact, "duplicates.parquet"), (near, "duplicates-2.parquet")):
        assert pq.read_metadata(out / name).num_rows == entry["removed"] > 0
    assert len(kept(out)) == line["documents"] - line["removed"]
    assert orjson.loads((tmp_path / "out/report.json").read_bytes())["dedup"] == report["dedup"]
    alone = run_stages(tmp_path, {"dedup": {}})
    assert [entry["method"] for entry in alone["dedup"]] == ["minhash"]
    assert [path.name for path in out.glob("duplicates*")] == ["duplicates.parquet"]
    assert run_stages(tmp_path, {"mask": {"email": True}})["dedup"] is None
    assert not list(out.glob("duplicates*"))
