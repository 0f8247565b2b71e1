"""Folders of stages as output and as input: when a part is done, when a folder is, and what may be read from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prep_data import write_rows
from prep_runs import english, make_small

from prep.documents import Columns
from prep.executors import LocalExecutor
from prep.parts import PARTS_WANTED, FileBlocks, cut_parts
from prep.pipeline import Result, Work, read_report, run
from prep.recipe import build_steps, open_files
from prep.sources import find_inputs
from prep.stage_folder import Limits
from prep.storage import Folder
from shards.errors import UserError

RULE = {"rules": {"length.words": {"low": 40}}}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch, tmp_path):
    make_small(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)


def rows(number: int, start: int = 0) -> list[dict[str, str]]:
    """Documents, every third of which is short."""
    return [
        {"id": f"d{index}", "text": english(index, 1 if index % 3 == 0 else 8)}
        for index in range(start, start + number)
    ]


def work_through(
    inputs: list[str], out: str, kind: str = "filter", settings: dict | None = None, source: str | None = None, **limits
) -> Result:
    """One stage over some files; `said` of the result would be lost, so notices are dropped."""
    files = open_files(inputs, Columns(), source)
    steps = tuple(build_steps(kind, RULE if settings is None else settings, "test"))
    folder = Folder(out)
    work = Work("test", (files,), steps, folder, folder.child("scratch"), "parquet", Limits(**limits))
    return run(work, LocalExecutor(1), lambda line: None)


def documents(folder: str) -> list[dict]:
    """What lies in a stage's folder."""
    return [row for path in sorted(Path(folder).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_another_source_is_another_part():
    write_rows(Path("a.jsonl"), rows(60))
    work_through(["a.jsonl"], "out", source="one")
    work_through(["a.jsonl"], "out", source="two")
    assert {row["source"] for row in documents("out")} == {"two"}
    manifest = json.loads(Path("out/manifest.json").read_bytes())
    assert {part["source"] for part in manifest["parts"]} == {"two"}


def test_a_folder_that_is_not_finished_is_no_input():
    write_rows(Path("a.jsonl"), rows(60))
    work_through(["a.jsonl"], "out")
    Path("out/manifest.json").unlink()
    for argument in ("out", str(Path("out").resolve())):
        with pytest.raises(UserError, match="not finished; run its command again"):
            find_inputs([argument])


def test_a_folder_above_stages_gives_none_of_their_files_and_says_so():
    Path("data").mkdir()
    write_rows(Path("data/a.jsonl"), rows(60))
    work_through(["data/a.jsonl"], "data/clean")
    found = find_inputs(["data"])
    assert [item.name for item in found.inputs] == ["data/a.jsonl"]
    assert "1 × folder of a stage (clean)" in str(found.left_out[0])
    assert "give its folder by name" in str(found.left_out[0])


def test_a_recipes_folder_gives_its_documents():
    write_rows(Path("a.jsonl"), rows(60))
    work_through(["a.jsonl"], "out/documents")
    assert {item.name.split("/")[1][:5] for item in find_inputs(["out"]).inputs} == {"part-"}


def test_parts_whose_files_are_gone_or_cut_are_made_again():
    write_rows(Path("a.jsonl"), rows(400))
    work_through(["a.jsonl"], "out")
    before = {path.name: path.read_bytes() for path in Path("out").glob("part-*.parquet")}
    assert len(before) > 3
    Path("out/part-00001.parquet").unlink()
    Path("out/part-00002.parquet").write_bytes(before["part-00002.parquet"][:-5])
    kept = Path("out/part-00000.parquet").stat().st_mtime_ns
    work_through(["a.jsonl"], "out")
    assert {path.name: path.read_bytes() for path in Path("out").glob("part-*.parquet")} == before
    assert Path("out/part-00000.parquet").stat().st_mtime_ns == kept


def test_what_was_broken_is_tried_again(monkeypatch):
    write_rows(Path("a.jsonl"), rows(60))
    work_through(["a.jsonl"], "first")
    shutil.copy2("first/part-00000.parquet", "good.parquet")
    whole = Path("good.parquet").read_bytes()
    stat = Path("good.parquet").stat()
    damaged = bytearray(whole)
    damaged[200:400] = bytes(200)
    Path("good.parquet").write_bytes(damaged)
    os.utime("good.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="cannot be read"):
        work_through(["good.parquet"], "out")
    Path("good.parquet").write_bytes(whole)
    os.utime("good.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    work_through(["good.parquet"], "out")
    assert len(documents("out")) == len(documents("first"))


def test_an_accepted_folder_stays_whole_when_a_lower_limit_refuses_it():
    item = "the quick brown fox of the north jumped over thirteen sleeping dogs by the old grey mill at noon"
    texts = [{"id": f"d{n}", "text": f"{english(n)} {item if n % 4 else ''}"} for n in range(1200)]
    write_rows(Path("a.jsonl"), texts)
    write_rows(Path("test.jsonl"), [{"question": item}])
    settings = {"against": ["test.jsonl"]}
    with pytest.raises(UserError, match=r"--max-removed 0\.75"):
        work_through(["a.jsonl"], "out", "decontaminate", settings)
    assert not Path("out/manifest.json").exists()
    work_through(["a.jsonl"], "out", "decontaminate", {**settings, "max_removed": 0.8})
    assert len(documents("out")) == 300
    with pytest.raises(UserError, match=r"--max-removed 0\.75"):
        work_through(["a.jsonl"], "out", "decontaminate", settings)
    assert len(find_inputs(["out"]).inputs) == len(list(Path("out").glob("part-*.parquet")))


def test_the_report_of_other_options_is_not_given_for_these():
    write_rows(Path("a.jsonl"), rows(60))
    work_through(["a.jsonl"], "out", settings={"rules": {"length.words": {"low": 1}}})
    stale = Path("out/report.json").read_bytes()
    work_through(["a.jsonl"], "out")
    Path("out/report.json").write_bytes(stale)  # as if killed between manifest and report
    report = work_through(["a.jsonl"], "out").report
    assert report["stages"][0]["documents_out"] == len(documents("out")) == 40
    assert read_report(Folder("out")) == json.loads(json.dumps(report))


def test_many_files_of_rows_are_a_part_each_read_where_it_is_worked_on():
    Path("in").mkdir()
    for number in range(PARTS_WANTED):
        write_rows(Path(f"in/{number:03d}.jsonl"), rows(3, 3 * number))
    parts = list(cut_parts([open_files(["in"], Columns())]))
    assert len(parts) == PARTS_WANTED
    assert all(isinstance(part.blocks, FileBlocks) for part in parts)
    found = [text for part in parts for block in part.blocks for text in block.load().batch.column("text").to_pylist()]
    assert found == [row["text"] for row in rows(3 * PARTS_WANTED)]
    assert parts[-1].consumed == sum(path.stat().st_size for path in Path("in").iterdir())
