"""Whole preparations in one process: what is done again after which change, and that cuts and format decide nothing."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prep_data import write_rows
from prep_runs import Inputs, documents, english, kept, make_inputs, make_small, recipe_data, rejected, snapshot, times
from prep_runs import write_recipe as write

import prep.parts
import prep.stage_folder
from prep.documents import Columns
from prep.executors import LocalExecutor, open_executor
from prep.part_writer import read_part
from prep.pipeline import Work, run
from prep.recipe import build_steps, load_recipe, open_files
from prep.run_recipe import run_recipe
from prep.stage_folder import Limits
from prep.storage import Folder
from shards.errors import UserError


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    make_small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs, a recipe without its slow stages, and the folder that it ends in."""
    folder = tmp_path_factory.mktemp("made")
    make_inputs(folder / "in", 60)
    data = recipe_data(Inputs(Path("in"), 5), "out")  # relative, so that the folder can be copied
    data["stages"] = [stage for stage in data["stages"] if "language" not in stage]
    recipe = write(folder / "recipe.yaml", data)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        patch.chdir(folder)
        run_recipe(load_recipe(recipe), LocalExecutor(1), workers=1, say=lambda line: None)
    return folder, data


@pytest.fixture
def done(made, tmp_path, monkeypatch):
    """The same in a folder of its own, where it can be changed."""
    folder, data = made
    shutil.copytree(folder, tmp_path / "copy")  # keeps times of change
    monkeypatch.chdir(tmp_path / "copy")
    return Case(tmp_path / "copy", copy.deepcopy(data))


class Case:
    """A recipe that has run."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data
        self.first, self.out = folder / "out" / "before-dedup", folder / "out" / "documents"
        self.said: list[str] = []

    def stage(self, name: str) -> dict[str, Any]:
        return next(stage[name] for stage in self.data["stages"] if name in stage)

    def run(self, output: str = "out") -> dict[str, Any]:
        self.said.clear()
        data = {**self.data, "output": output}
        recipe = write(self.folder / "recipe.yaml", data)
        return run_recipe(load_recipe(recipe), LocalExecutor(1), workers=1, say=self.said.append)

    def changed(self, before: dict[str, tuple[int, int]], folder: Path, pattern: str = "part-*") -> set[str]:
        """Which files of a folder are other ones than before."""
        now = times(self.folder)
        return {
            path.name
            for path in folder.glob(pattern)
            if path.is_file() and before.get(key := path.relative_to(self.folder).as_posix()) != now[key]
        }

    def check_equal_to_a_fresh_run(self) -> None:
        self.run("fresh")
        a, b = snapshot(self.folder / "out"), snapshot(self.folder / "fresh")
        assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == set()


def test_nothing_changed_writes_nothing(done):
    before = times(done.folder / "out")
    report = done.run()
    assert times(done.folder / "out") == before
    assert [line for line in done.said if "up to date" in line] == done.said
    assert len(done.said) == 4  # both passes and both token datasets
    assert report["sources"][0]["name"] == "crawl"
    assert {row["name"] for row in report["tokens"]} == {"web", "rest"}


def test_every_document_is_kept_or_rejected_once(done):
    """What was read is in the output or, with a reason, among the rejects of one of the passes."""
    staying = [row["id"] for row in kept(done.out)]
    gone = [row for folder in (done.first, done.out) for row in rejected(folder)]
    good = [row["id"] for row in gone if row["stage"] != "read"]
    assert len(staying) > 50
    assert len(good) > 30
    ids = [row["id"] for seed in (1, 2, 4) for row in documents(seed, 60)]
    ids += [f"notes/{row['id']}.txt" for row in documents(3, 15)]
    assert sorted(staying + good) == sorted(ids)
    malformed = [row for row in gone if row["stage"] == "read"]
    assert len(malformed) == 5
    assert {row["rule"] for row in malformed} == {"malformed"}
    lines = sorted(row["detail"].partition("row ")[2] for row in malformed if "crawl" in row["id"])
    assert [line.partition(":")[0] for line in lines] == ["11", "12", "13", "14"]
    assert "column 'text' holds a number, not text" in lines[1]
    assert "is null" in lines[2]
    assert "is missing" in lines[3]
    assert all(row["stage"] and row["rule"] for row in gone)


def test_sources_of_a_stage_are_the_only_ones_that_go_through_it(done):
    """The filter is for three of the four sources: short notes stay."""
    gone = [row for row in rejected(done.first) if row["stage"] not in ("read", "mask")]
    assert {row["source"] for row in gone} == {"crawl", "shop", "table"}
    assert any(row["source"] == "notes" and len(row["text"]) < 100 for row in kept(done.first))
    assert not any(row["source"] != "notes" and len(row["text"]) < 100 for row in kept(done.first))


def test_the_removed_have_a_keeper_in_the_output_or_behind_it(done):
    audit = pq.read_table(done.out / "duplicates.parquet").to_pylist()
    removed = {row["id"]: row for row in rejected(done.out) if row["stage"] == "dedup"}
    assert {row["id"] for row in audit} == removed.keys()
    leaked = {row["id"] for row in rejected(done.out) if row["stage"] == "decontaminate"}
    staying = {row["id"] for row in kept(done.out)}
    assert {row["keeper"] for row in audit} <= staying | leaked
    assert all(row["keeper"] == removed[row["id"]]["keeper"] for row in audit)


def test_a_changed_rule_makes_the_filter_anew_and_what_follows(done):
    before = times(done.folder)
    done.stage("filter")["rules"] = {"gopher_quality.word_count": {"high": 217}}
    report = done.run()
    parts = {path.name for path in done.first.glob("part-*")}
    assert done.changed(before, done.first) == parts
    assert done.changed(before, done.out) == {path.name for path in done.out.glob("part-*")}
    assert any(rule["name"] == "gopher_quality.word_count" for stage in report["stages"] for rule in stage["rules"])
    done.check_equal_to_a_fresh_run()


def test_a_changed_threshold_leaves_the_filter_alone(done):
    before = times(done.folder)
    done.stage("dedup")["threshold"] = 0.95
    done.run()
    assert done.changed(before, done.first) == set()
    assert done.changed(before, done.first / "state") == set()
    assert done.changed(before, done.first / "signatures") == set()
    assert done.changed(before, done.out / "state") == {path.name for path in (done.out / "state").glob("part-*")}
    assert done.said[0].endswith("up to date (209 documents)") or "up to date" in done.said[0]
    done.check_equal_to_a_fresh_run()


def test_changed_items_leave_the_deduplication_alone(done):
    before = times(done.folder)
    write_rows(done.folder / "in" / "exam.jsonl", [{"question": "another question of six words"}])
    done.run()
    assert done.changed(before, done.first) == set()
    assert done.changed(before, done.first / "scratch", "*") == set()
    assert done.changed(before, done.out / "state", "part-*")
    done.check_equal_to_a_fresh_run()


def test_an_input_that_grew_makes_its_own_parts_anew(done):
    before = times(done.folder)
    notes = done.folder / "in" / "notes"
    for row in documents(9, 15):
        (notes / f"z-{row['id']}.txt").write_text(row["text"])
    done.run()
    states = {path.name: path.read_bytes() for path in (done.first / "state").glob("part-*")}
    anew = done.changed(before, done.first / "state")
    assert anew
    assert len(anew) < len(states)
    assert all(b'"source":"crawl"' not in states[name] and b'"source":"shop"' not in states[name] for name in anew)
    assert any(b'"source":"notes"' in states[name] for name in anew)
    assert any("were done before" in line for line in done.said)
    done.check_equal_to_a_fresh_run()


def test_fewer_inputs_leave_nothing_behind(done):
    done.data["sources"] = done.data["sources"][:2]
    done.stage("filter")["sources"] = ["crawl", "shop"]
    done.stage("tokenize")["datasets"] = {"web": ["crawl", "shop"], "rest": ["shop"]}
    done.run()
    numbers = len(list((done.first / "state").glob("part-*")))
    assert all(
        int(path.name[5:10]) < numbers for path in (done.folder / "out").rglob("part-*") if "scratch" not in str(path)
    )
    done.run("fresh")
    for name in ("documents", "web", "rest"):
        assert snapshot(done.folder / "out" / name) == snapshot(done.folder / "fresh" / name)


def test_stopped_amid_a_change_and_changed_back(done, monkeypatch):
    """The parts that were made with the other option do not pass for those of the first."""
    expected = snapshot(done.out)
    real, calls = prep.parts.run_part, []

    def stops(job, digest, part):
        calls.append(part.number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        if len(calls) == 3:  # behind the documents, before the state: as a kill may fall
            monkeypatch.setattr(Folder, "write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        return real(job, digest, part)

    original = Folder.write
    done.stage("filter")["rules"] = {"gopher_quality.word_count": {"high": 217}}
    monkeypatch.setattr(prep.stage_folder, "run_part", stops)
    with pytest.raises(KeyboardInterrupt):
        done.run()
    monkeypatch.setattr(Folder, "write", original)
    monkeypatch.setattr(prep.stage_folder, "run_part", real)
    del done.stage("filter")["rules"]
    done.run()
    assert snapshot(done.out) == expected


def test_the_first_part_without_a_state_is_gone_on_with(tmp_path, monkeypatch):
    """A run that is killed between its first part and that part's state left a folder that is its own."""
    write_rows(tmp_path / "a.jsonl", documents(1, 40))

    def killed(folder: Folder, name: str, content: bytes, *, durable: bool = True) -> None:
        if name.startswith("part-"):
            raise KeyboardInterrupt
        original(folder, name, content, durable=durable)

    original = Folder.write
    monkeypatch.setattr(Folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        apply(tmp_path, "filter", {"preset": "gopher"})
    assert list((tmp_path / "out").glob("part-*"))
    monkeypatch.setattr(Folder, "write", original)
    apply(tmp_path, "filter", {"preset": "gopher"})
    assert kept(tmp_path / "out")


def apply(folder: Path, kind: str, options: dict[str, Any], out: str = "out", **more: Any) -> dict[str, Any]:
    """One stage over the JSON Lines of a folder."""
    files = open_files([str(path) for path in sorted(folder.glob("*.jsonl"))], Columns())
    where = Folder(folder / out)
    work = Work(
        "test",
        (files,),
        tuple(build_steps(kind, options, kind)),
        where,
        where.child("scratch"),
        **{
            "format": "parquet",
            "limits": Limits(),
            **more,
        },
    )
    with open_executor("local", 1) as executor:
        return run(work, executor, lambda line: None).report


@pytest.mark.parametrize("kind", ["exact", "decontaminate", "paragraph"])
def test_too_much_removed_stops_with_a_table_and_goes_on_when_allowed(tmp_path, kind):
    rows = [{"id": f"a{n}", "text": english(n % 300 if kind == "exact" else n, 4)} for n in range(1_000)]
    if kind == "decontaminate":
        rows = [{**row, "text": f"{row['text']} {english(5_000, 2)}"} for row in rows]
    if kind == "paragraph":
        shared = english(5_000, 20).replace("\n", " ")
        rows = [{**row, "text": f"{shared}\n\n{row['id']}"} for row in rows]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [{"id": f"b{n}", "text": english(9_000 + n, 4)} for n in range(50)])
    options: dict[str, Any] = {"method": kind}
    if kind == "decontaminate":
        (tmp_path / "items").mkdir()
        options = {"against": [str(write_rows(tmp_path / "items" / "exam.jsonl", [{"question": english(5_000, 2)}]))]}
    stage = "decontaminate" if kind == "decontaminate" else "dedup"
    with pytest.raises(UserError, match=r"removes more than 50% of the documents of a:") as stopped:
        apply(tmp_path, stage, options)
    message = str(stopped.value)
    assert "a " in message
    assert "b  " in message  # the other source, for comparison
    assert "<-" in message
    allowed = float(message.partition("--max-removed ")[2].split()[0])
    assert 0.69 < allowed <= 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    before = times(tmp_path / "out")
    with pytest.raises(UserError, match="removes more than"):
        apply(tmp_path, stage, options)
    report = apply(tmp_path, stage, {**options, "max_removed": allowed})
    now = times(tmp_path / "out")
    assert {name: now[name] for name in before if "state/part-" in name or "signatures" in name} == {
        name: value for name, value in before.items() if "state/part-" in name or "signatures" in name
    }
    assert report["stages"][0]["documents_out"] == len(kept(tmp_path / "out"))
    assert report["stages"][0]["documents_out"] < 400


def test_deduplication_against_a_reference(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"id": f"a{n}", "text": english(n)} for n in range(100)])
    (tmp_path / "old").mkdir()
    write_rows(
        tmp_path / "old" / "b.jsonl", [{"id": f"b{n}", "text": english(n) + " The end."} for n in range(0, 100, 4)]
    )
    apply(tmp_path, "dedup", {"reference": [str(tmp_path / "old")]})
    assert {row["id"] for row in kept(tmp_path / "out")} == {f"a{n}" for n in range(100) if n % 4}
    assert {row["keeper"] for row in rejected(tmp_path / "out")} == {f"b{n}" for n in range(0, 100, 4)}


def test_two_deduplications_in_one_recipe(tmp_path):
    """A line level behind the document level: each has a pass of its own."""
    rows = [{"id": f"a{n}", "text": english(n) + "\n" + english(5_000, 6).replace("\n", " ")} for n in range(60)]
    write_rows(tmp_path / "a.jsonl", [*rows, *({**row, "id": f"copy-{row['id']}"} for row in rows[:20])])
    files = open_files([str(tmp_path / "a.jsonl")], Columns())
    steps = [*build_steps("dedup", {"method": "exact"}, "x"), *build_steps("dedup", {"method": "line"}, "x")]
    out = Folder(tmp_path / "out")
    work = Work("two", (files,), tuple(steps), out, out.child("scratch"), "parquet", Limits())
    with open_executor("local", 1) as executor:
        report = run(work, executor, lambda line: None).report
        assert run(work, executor, lambda line: None).up_to_date
    assert [stage["documents_out"] for stage in report["stages"]] == [60, 60]
    texts = [row["text"] for row in kept(tmp_path / "out")]
    assert sum(english(5_000, 6).replace("\n", " ") in text for text in texts) == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_rows(folder / "a.jsonl", documents(11, 70))
    write_rows(folder / "b.jsonl", documents(12, 50))
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        chain(folder, "plain")
    return folder


def chain(folder: Path, out: str, format: str = "parquet") -> None:
    files = open_files([str(folder / "a.jsonl"), str(folder / "b.jsonl")], Columns(keep=("url",)))
    steps = [
        *build_steps("filter", {"preset": "gopher"}, "x"),
        *build_steps("mask", {"email": True}, "x"),
        *build_steps("dedup", {"threshold": 0.7}, "x"),
    ]
    where = Folder(folder / out)
    work = Work("chain", (files,), tuple(steps), where, where.child("scratch"), format, Limits())
    with open_executor("local", 1) as executor:
        run(work, executor, lambda line: None)


@settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # an example takes a second: looking for a smaller one would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(part=st.integers(8_000, 200_000), block=st.integers(2_000, 200_000), piece=st.integers(1_000, 200_000))
def test_the_cuts_decide_nothing(plain, part, block, piece):
    """Whatever the sizes of parts and blocks, the same documents stay in the same order, and the same ones go."""
    import prep.jsonl

    shutil.rmtree(plain / "other", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep.parts, "MIN_PART_BYTES", part)
        patch.setattr(prep.jsonl, "BLOCK_BYTES", block)
        patch.setattr(prep.jsonl, "PIECE_BYTES", piece)
        chain(plain, "other")
    assert kept(plain / "other") == kept(plain / "plain")
    for below in ("", "scratch"):  # of those that a block loses, all of one rule come together
        other, expected = (
            sorted(rejected(plain / name / below), key=lambda row: str(row["id"])) for name in ("other", "plain")
        )
        assert other == expected
    audits = [pq.read_table(plain / name / "duplicates.parquet") for name in ("other", "plain")]
    assert audits[0].equals(audits[1])


def test_lines_hold_the_same_documents_as_parquet(plain):
    chain(plain, "lines", "jsonl.zst")
    folder = Folder(plain / "lines")
    names = [name.removesuffix(".jsonl.zst") for name in folder.names("part-*")]
    assert [row for name in names for batch in read_part(folder, name) for row in batch.to_pylist()] == kept(
        plain / "plain"
    )
    chain(plain, "lines", "parquet")  # the other format takes its place
    assert Folder(plain / "lines").names("*.zst") == []
    assert kept(plain / "lines") == kept(plain / "plain")


def test_only_one_run_writes_a_folder(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents(1, 10))
    with Folder(tmp_path / "out").lock(), pytest.raises(UserError, match="another process is writing here"):
        apply(tmp_path, "filter", {"preset": "gopher"})


def test_what_others_have_made_is_not_written_over(tmp_path):
    write_rows(tmp_path / "a.jsonl", documents(1, 10))
    for name in ("part-00000.parquet", "manifest.json", "report.html"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(UserError, match="no stage of minigpt-prep has made"):
            apply(tmp_path, "filter", {"preset": "gopher"}, name)
        assert (tmp_path / name / name).read_text() == "mine"
        assert os.listdir(tmp_path / name) == [name]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        apply(tmp_path, "filter", {"preset": "gopher"}, "file")


def test_a_run_does_not_read_what_it_writes(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents(1, 60))
    monkeypatch.chdir(tmp_path)
    apply(tmp_path, "filter", {"rules": {"length.characters": {"low": 1}}})
    apply(tmp_path, "dedup", {}, "unique")
    before = times(tmp_path)
    for read, out in (
        ("out", "out"),
        ("out/part-00000.parquet", "out"),
        ("../" + tmp_path.name + "/out", "out/"),
        ("out", "unique/../out"),
        ("unique/rejected", "unique"),
    ):
        where = Folder(out)
        work = Work("x", (open_files([read], Columns()),), (), where, where.child("scratch"), "parquet", Limits())
        with pytest.raises(UserError, match="lies where the result goes"):
            run(work, LocalExecutor(1))
        options = {"reference": [read]}
        files = open_files(["a.jsonl"], Columns())
        steps = tuple(build_steps("dedup", options, "dedup"))
        work = Work("x", (files,), steps, where, where.child("scratch"), "parquet", Limits())
        with pytest.raises(UserError, match="lies where the result goes"):
            run(work, LocalExecutor(1))
    assert times(tmp_path) == before


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text(), max_size=2))
LINES = st.one_of(
    st.binary(max_size=60).map(lambda raw: raw.replace(b"\n", b"")),
    st.fixed_dictionaries({}, optional={"text": VALUES, "id": VALUES, "other": VALUES}).map(
        lambda row: json.dumps(row).encode()
    ),
    st.text(st.characters(codec="utf-8"), max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
).map(lambda line: line if isinstance(line, bytes) else line.encode())


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(lines=st.lists(LINES, max_size=30))
def test_every_line_is_a_document_or_empty_or_rejected(lines):
    """Whatever stands in a file of lines, the run ends, no row is lost, and what can be read comes through as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "a.jsonl", [{"id": "a", "text": "first"}, *lines, {"text": "last"}])
        report = apply(folder, "filter", {"rules": {"length.characters": {"low": 1}}}, limits=Limits(max_bad_rows=1))
        texts = [row["text"] for row in kept(folder / "out")]
        assert texts[0] == "first"
        assert texts[-1] == "last"
        expected = [read for line in lines if (read := plain_text(line))]
        assert texts[1:-1] == expected
        source = report["sources"][0]
        assert source["documents"] == source["kept_documents"] == len(texts)
        assert source["malformed"] == len(rejected(folder / "out"))
        rows = sum(bool(line.strip()) for line in lines) + 2
        assert source["rows"] == rows
        assert source["documents"] + source["empty"] + source["malformed"] == rows


def plain_text(line: bytes) -> str | None:
    """The text of a line, by the standard library."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None
    good_id = row.get("id") is None or isinstance(row["id"], str) or type(row["id"]) is int
    return row["text"] if good_id else None


def test_many_files(tmp_path, monkeypatch):
    """Each is read by the worker that has its part; a changed one is done again, the others are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(80):
        write_rows(tmp_path / "in" / f"{number:02}.jsonl", [*documents(number, 3), *([b"{bad"] if number == 7 else [])])
    (tmp_path / "in" / "40.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 50_000)[:-30])

    def go(keep_going: bool = True) -> None:
        where = Folder("out")
        limits = Limits(max_bad_rows=0.1, keep_going=keep_going)
        steps = tuple(build_steps("mask", {"email": True}, "mask"))
        files = open_files(["in"], Columns())
        run(Work("many", (files,), steps, where, where.child("scratch"), "parquet", limits), LocalExecutor(1), print)

    with pytest.raises(UserError, match=r"40\.jsonl\.gz: truncated"):
        go(keep_going=False)
    go()
    ids = [row["id"] for row in kept(tmp_path / "out")]
    assert [name for name in ids if "gz" not in name] == [f"{seed}-{n}" for seed in range(80) for n in range(3)]
    assert sum("40.jsonl.gz" in name for name in ids) > 1_000
    assert [row["id"] for row in rejected(tmp_path / "out")] == ["in/07.jsonl:4"]
    before = times(tmp_path / "out" / "state")
    write_rows(tmp_path / "in" / "79.jsonl", documents(99, 5))
    go()
    now = times(tmp_path / "out" / "state")
    changed = {name for name in now if now[name] != before.get(name)}
    assert 0 < len(changed) <= 2  # the file that changed, and the one that is broken: it is tried again
    assert [row["id"] for row in kept(tmp_path / "out")][-5:] == [f"99-{n}" for n in range(5)]
