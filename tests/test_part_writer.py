"""Files of a part: the same documents give the same bytes, complete or absent, read back as they were."""

from __future__ import annotations

import datetime
import json
import math
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_data import prose

import prep.part_writer
from prep.documents import Columns
from prep.part_writer import FORMATS, PartWriter, read_part
from prep.sources import find_inputs, read_blocks
from prep.storage import Folder
from shards.errors import UserError

SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("score", pa.float64()), ("url", pa.string())]
)
ROWS = [
    {"id": f"d{n}", "text": prose(n, n % 60), "source": "web", "score": n / 8 if n % 3 else None, "url": "u" * (n % 5)}
    for n in range(500)
]


def batches(rows, sizes) -> list[pa.RecordBatch]:
    whole, made, at = pa.RecordBatch.from_pylist(rows, SCHEMA), [], 0
    for size in sizes:
        made.append(whole.slice(at, size))
        at += size
    return [*made, whole.slice(at)]


def write(folder: Folder, given, format="parquet", schema=SCHEMA) -> bytes:
    with PartWriter(folder, "part-00000", schema, format) as writer:
        for batch in given:
            writer.write(batch)
    assert writer.rows == sum(batch.num_rows for batch in given)
    return folder.read(f"part-00000.{format}") or b""


@pytest.mark.parametrize("format", FORMATS)
@given(st.lists(st.integers(0, 90), max_size=12), st.integers(1, 20_000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_leave_no_trace(tmp_path, monkeypatch, format, sizes, group_bytes):
    monkeypatch.setattr(prep.part_writer, "GROUP_BYTES", group_bytes)
    folder = Folder(tmp_path)
    whole = write(folder, batches(ROWS, []), format)
    assert write(folder, batches(ROWS, sizes), format) == whole
    back = list(read_part(folder, "part-00000", schema=SCHEMA))
    assert pa.Table.from_batches(back).to_pylist() == ROWS

    def size(rows) -> int:
        return sum(8 + sum(len(row[name].encode()) for name in ("id", "text", "source", "url")) for row in rows)

    for batch in back[:-1]:  # a group ends with the row that fills it
        assert size(batch.to_pylist()) >= group_bytes > size(batch.to_pylist()[:-1])


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_part_is_a_file(tmp_path, format):
    folder = Folder(tmp_path)
    write(folder, [], format)
    assert list(read_part(folder, "part-00000")) == []
    if format == "parquet":
        assert pq.read_table(tmp_path / "part-00000.parquet").schema.equals(SCHEMA)
    write(folder, batches(ROWS[:0], [0]), format)
    assert list(read_part(folder, "part-00000")) == []


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_left_of_a_part_that_failed(tmp_path, format, monkeypatch):
    monkeypatch.setattr(prep.part_writer, "GROUP_BYTES", 1_000)

    def half_way() -> None:
        with PartWriter(Folder(tmp_path), "p", SCHEMA, format) as writer:
            writer.write(batches(ROWS, [])[0])
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_the_readers_read_it(tmp_path, format):
    write(Folder(tmp_path), batches(ROWS, []), format)
    columns = Columns(keep=("score", "url"))
    blocks = read_blocks(find_inputs([str(tmp_path)], "web").inputs, columns)
    seen = [row for block in blocks for row in block.load().batch.to_pylist()]
    assert seen == [row for row in ROWS if row["text"]]


def test_other_tools_read_the_lines(tmp_path):
    write(Folder(tmp_path), batches(ROWS, []), "jsonl.zst")
    path = tmp_path / "part-00000.jsonl.zst"
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == ROWS
    try:
        lines = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("zstd is not installed")
    assert lines.count(b"\n") == len(ROWS)


def test_values_that_json_lacks(tmp_path):
    values = {
        "time": pa.array([datetime.datetime(2020, 1, 2, 3, 4, 5)], pa.timestamp("us")),
        "number": pa.array([math.nan]),
        "flag": pa.array([True]),
        "text": pa.array(['\x00\u2028\r\n"é😀']),
    }
    batch = pa.RecordBatch.from_pydict(values)
    folder = Folder(tmp_path)
    write(folder, [batch], "jsonl.zst", batch.schema)
    (back,) = read_part(folder, "part-00000", columns=["number", "flag", "text", "time"])
    assert back.to_pylist() == [
        {"number": None, "flag": True, "text": '\x00\u2028\r\n"é😀', "time": "2020-01-02 03:04:05.000000"}
    ]


def test_mistakes(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(UserError, match=r"unknown output format 'parket'; did you mean 'parquet'\?"):
        PartWriter(folder, "p", SCHEMA, "parket")
    with pytest.raises(UserError, match=r"holds no p\.parquet or p\.jsonl\.zst"):
        list(read_part(folder, "p"))
    for format in FORMATS:
        content = write(folder, batches(ROWS, []), format)
        folder.write(f"part-00000.{format}", content[: len(content) // 2])
        with pytest.raises(UserError, match=r"part-00000.*cannot be read.*run the stage again"):
            list(read_part(folder, "part-00000"))
        folder.remove(f"part-00000.{format}")
