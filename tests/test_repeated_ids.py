"""Ids that come more than once: counted in a part, estimated over parts, told in the report and the terminal."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_data import write_rows
from prep_runs import english, make_small
from rich.console import Console

import prep.repeated_ids
from prep.documents import Columns
from prep.executors import LocalExecutor
from prep.pipeline import Work, run
from prep.recipe import build_steps, open_files
from prep.repeated_ids import IdCounter, count_repeated
from prep.report import describe_repeated, funnel_table
from prep.stage_folder import Limits
from prep.storage import Folder


def found(*batches: list[str], kind: pa.DataType | None = None) -> dict:
    counter = IdCounter()
    for batch in batches:
        counter.add(pa.array(batch, kind or pa.string()))
    return json.loads(json.dumps(counter.found()))


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "é", "0", "1", "00"]), max_size=6), max_size=5))
def test_few_ids_are_counted_exactly(parts):
    repeated = count_repeated([found(part[:2], part[2:], kind=pa.large_string()) for part in parts])
    ids = {name for part in parts for name in part}
    assert repeated == {
        "within": sum(part.count(name) > 1 for part in parts for name in set(part)),
        "across": sum(sum(name in part for part in parts) > 1 for name in ids),
        "exact": True,
    }


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_many_ids_are_estimated(share):
    """Twenty parts of 5,000 ids; of each, a share is in the next one too."""
    step = round(5_000 * (1 - share / 2)) if share < 1 else 0
    parts = [[str(n) for n in range(number * step, number * step + 5_000)] for number in range(20)]
    expected = len({name for part in parts for name in part})
    expected = 20 * 5_000 - expected if share < 1 else expected
    repeated = count_repeated([found(part) for part in parts])
    assert not repeated["exact"]
    assert repeated["within"] == 0
    assert repeated["across"] == pytest.approx(expected, rel=0.5)


def test_samples_are_small_and_fair():
    part = found([str(n) for n in range(100_000)])
    assert part["distinct"] == 100_000
    assert len(json.dumps(part)) < 1_000
    values = np.sort(
        np.concatenate([hashes(["x" * n for n in range(1, 3_000)]), hashes([str(n) for n in range(3_000)])])
    )
    assert np.allclose(values / 2**64, np.linspace(0, 1, len(values)), atol=0.03)


def hashes(ids: list[str]) -> np.ndarray:
    out = np.empty(len(ids), np.uint64)
    prep.repeated_ids._hash(*prep.repeated_ids.text_buffers(pa.array(ids)), out)
    return out


def test_counting_is_cheap():
    """A pass takes more than a microsecond for each hundred bytes of text; this is far below for each document."""
    ids = pa.array([f"<urn:uuid:{n:08x}-aaaa-bbbb-cccc-{n * 7919 % 2**32:012x}>" for n in range(200_000)])
    found(["warm up"])
    counter = IdCounter()
    begin = time.perf_counter()
    counter.add(ids)
    counter.found()
    assert time.perf_counter() - begin < 2  # 0.03 s on one core


def test_messages():
    assert describe_repeated(None) is None
    assert describe_repeated({"within": 0, "across": 0, "exact": True}) is None
    line = describe_repeated({"within": 1200, "across": 3, "exact": True})
    assert line is not None
    assert line.startswith("ids that come more than once: 1,200 within one part of the input, 3 in several parts; ")
    line = describe_repeated({"within": 0, "across": 123456, "exact": False})
    assert line is not None
    assert line.startswith("ids that come more than once: about 123 K in several parts; ")


def test_a_run_warns(tmp_path, monkeypatch):
    make_small(monkeypatch.setattr)
    for name, first in (("a", 0), ("b", 1_000_000)):
        write_rows(tmp_path / f"{name}.jsonl", [{"id": str(n), "text": english(first + n)} for n in (*range(150), 7)])
    for inputs, within, across in ((["a.jsonl"], 1, 0), (["a.jsonl", "b.jsonl"], 2, 150)):
        files = open_files([str(tmp_path / name) for name in inputs], Columns())
        out = Folder(tmp_path / f"out-{len(inputs)}")
        steps = tuple(build_steps("filter", {"preset": "gopher_quality"}, "t"))
        work = Work("x", (files,), steps, out, out.child("scratch"), "parquet", Limits())
        report = run(work, LocalExecutor(1), lambda line: None).report
        assert report["repeated_ids"]["within"] in (within, 0)  # 7 and 7 may lie in two parts of a file
        assert report["repeated_ids"]["within"] + report["repeated_ids"]["across"] == pytest.approx(
            within + across, rel=0.5
        )
        console = Console(file=io.StringIO(), width=200)
        for part in funnel_table(report):
            console.print(part)
        assert "warning: ids that come more than once: " in console.file.getvalue()
        assert "ids that come more than once" in (out.read("report.html") or b"").decode()
