"""Readers: every kind of file, and everything that can be wrong with it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_data import TEXT, prose, read_all, write_rows

import prep.arrow_columns
import prep.jsonl
import prep.parquet
from prep.arrow_columns import batch_documents, bounded
from prep.documents import DOCUMENT, Columns, Input, Position
from prep.sources import check_inputs, find_inputs, read_blocks
from shards.errors import UserError

ROWS = [{"id": f"d{n}", "text": prose(n, 30), "n": n} for n in range(200)]
EXPECTED = [(row["id"], row["text"], "rows") for row in ROWS]


def compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else zstandard.compress(data))
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small files have many."""
    monkeypatch.setattr(prep.jsonl, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(prep.jsonl, "READ_BYTES", 512)
    monkeypatch.setattr(prep.jsonl, "PIECE_BYTES", 300)
    monkeypatch.setattr(prep.parquet, "MAX_BATCH_ROWS", 7)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_rows_plain_and_compressed(tmp_path, suffix, small_blocks):
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    if suffix.endswith((".gz", ".zst")):
        compressed(path, path.read_bytes())
    rows, blocks, broken = read_all([path])
    assert rows == EXPECTED
    assert not broken
    assert sum(block.rows for block in blocks) == 200


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_many_members_or_frames(tmp_path, suffix):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    data = b"".join(lines)
    cuts = [0, 11, 5_000, 5_001, len(data)]  # also in the middle of a line
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(b"".join(compress(data[a:b]) for a, b in itertools.pairwise(cuts)) + b"\0" * 9 * (suffix == ".gz"))
    assert read_all([path])[0] == EXPECTED


def test_blank_lines_crlf_bom_and_no_final_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text":"a"}\r\n\r\n  \n{"text":"b"}\r\n\n{"text":"c\\r\\n"}')
    rows, blocks, _ = read_all([path])
    assert rows == [("rows.jsonl:1", "a", "rows"), ("rows.jsonl:4", "b", "rows"), ("rows.jsonl:6", "c\r\n", "rows")]
    assert sum(block.rows for block in blocks) == 3


BAD = [
    (b"{", "not valid JSON"),
    (b"null", "holds null, not an object"),
    (b"[1]", "holds an array, not an object"),
    (b'{"text":null}', "is null"),
    (b'{"x":"no text"}', "is missing"),
    (b'{"text":12}', "holds a number, not text"),
    (b'{"text":true}', "holds true or false, not text"),
    (b'{"text":{"a":"b"}}', "holds an object, not text"),
    (b'{"text":"\xff"}', "not UTF-8"),
    (b'{"text":"\xed\xa0\x80"}', "not UTF-8"),
    (b'{"text":"\\ud800"}', "surrogate"),
    (b'{"text":"raw \x00 byte"}', "not valid JSON"),
    (b'{"text":"a"}{"text":"b"}', "not valid JSON"),
    (b'{"text":"a","id":[1]}', "holds an array, not text or a whole number"),
    (b"\x00\x01\x02", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
@pytest.mark.parametrize("at", [1, 100, 200])
def test_bad_line_is_set_aside_and_the_rest_is_read(tmp_path, line, reason, at):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:at], line, *ROWS[at:]])
    rows, blocks, _ = read_all([path])
    assert rows == EXPECTED
    (rejected,) = [row for block in blocks for row in block.rejected]
    assert (rejected.file, rejected.row) == (str(path), at + 1)
    assert reason in rejected.reason
    assert sum(block.rows for block in blocks) == 201


def test_a_bare_null_first_is_set_aside(tmp_path):  # pyarrow.json crashes the process on it
    path = write_rows(tmp_path / "rows.jsonl", [b"null", *ROWS])
    rows, blocks, _ = read_all([path])
    assert rows == EXPECTED
    assert blocks[0].rejected[0].row == 1


def test_text_stays_text(tmp_path):
    texts = ["2020-01-01T00:00:00", "12", "true", "null", "a\x00b", "😀\u2028", "\\", '"', " "]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text, "z": float("nan")} for text in texts])
    assert [row[1] for row in read_all([path])[0]] == texts


def test_ids_numbers_text_and_none(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"id": 7, "text": "x"}, {"id": "k", "text": "y"}, {"text": "z"}])
    assert [row[0] for row in read_all([path])[0]] == ["7", "k", "a.jsonl:3"]
    path = write_rows(
        tmp_path / "b.jsonl", [{"id": 2**60, "key": "u", "text": "x"}, {"id": 2**63, "key": "v", "text": "y"}]
    )
    assert [row[0] for row in read_all([path])[0]] == [str(2**60), str(2**63)]
    assert [row[0] for row in read_all([path], Columns("text", "key"))[0]] == ["u", "v"]


def test_empty_documents_are_counted(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}, {"text": ""}])
    rows, blocks, _ = read_all([path])
    assert [row[:2] for row in rows] == [("a.jsonl:2", "x")]
    assert [(block.rows, block.empty) for block in blocks] == [(3, 2)]


def test_a_very_long_line(tmp_path):
    text = "long words " * 3_000_000  # 33 MB, many blocks
    path = write_rows(tmp_path / "a.jsonl", [ROWS[0], {"id": "long", "text": text}, ROWS[1]])
    compressed(tmp_path / "a.jsonl.zst", path.read_bytes())
    for name in ("a.jsonl", "a.jsonl.zst"):
        assert [len(row[1]) for row in read_all([tmp_path / name])[0]] == [
            len(ROWS[0]["text"]),
            len(text),
            len(ROWS[1]["text"]),
        ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_broken_in_the_middle(tmp_path, suffix, damage, small_blocks):
    data = b"".join(json.dumps({"id": str(n), "text": prose(n, 100)}).encode() + b"\n" for n in range(2_000))
    good = compressed(tmp_path / f"a.jsonl{suffix}", data).read_bytes()
    half = len(good) // 2
    bad = good[:half] if damage == "truncated" else good[:half] + bytes(64) + good[half + 64 :]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(bad)
    other = write_rows(tmp_path / "b.jsonl", ROWS)
    rows, _, broken = read_all([path, other])
    (message,) = broken
    assert str(path) in message
    assert "rows before the damage" in message
    first = [row for row in rows if row[2] == "a"]
    assert [int(row[0]) for row in first] == list(range(len(first)))
    assert len(first) > (400 if damage == "truncated" else 100)
    assert [row[0] for row in rows if row[2] == "b"] == [row["id"] for row in ROWS]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"text": st.text(max_size=40)}, optional={"id": st.text(max_size=5) | st.integers(-(2**63), 2**64 - 1)}
        ),
        max_size=30,
    ),
    st.booleans(),
    st.integers(1, 300),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_read_as_python_reads_them(tmp_path, monkeypatch, rows, ascii_only, block_bytes):
    monkeypatch.setattr(prep.jsonl, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8", newline=""
    )
    expected = [
        (str(row["id"]) if "id" in row else f"rows.jsonl:{number}", row["text"], "rows")
        for number, row in enumerate(rows, 1)
        if row["text"]
    ]
    seen, blocks, _ = read_all([path])
    has_ids = bool(rows) and any("id" in row for row in rows[:3])
    assert [row[1:] for row in seen] == [row[1:] for row in expected]
    assert sum(block.empty for block in blocks) == sum(not row["text"] for row in rows)
    if has_ids and block_bytes > 200:  # the id column is known from the first block
        assert seen == expected


def test_every_block_end_is_a_place_to_go_on(tmp_path, small_blocks):
    paths = [
        compressed(tmp_path / "a.jsonl.zst", write_rows(tmp_path / "a.jsonl", ROWS).read_bytes()),
        tmp_path / "b.parquet",
        tmp_path / "c.txt",
        tmp_path / "d.txt",
        compressed(tmp_path / "e.jsonl.gz", (tmp_path / "a.jsonl").read_bytes()[:9_000]),
    ]
    pq.write_table(pa.table({"text": [row["text"] for row in ROWS[:50]]}), paths[1], row_group_size=20)
    paths[2].write_text("one")
    paths[3].write_text("two")
    inputs = find_inputs([str(path) for path in paths]).inputs
    blocks = [(block.end, block.consumed, block.load()) for block in read_blocks(inputs, Columns())]
    assert len(blocks) > 20
    assert [consumed for _, consumed, _ in blocks] == sorted(consumed for _, consumed, _ in blocks)
    assert blocks[-1][1] == sum(item.size for item in inputs)
    for index, (end, _, _) in enumerate(blocks):
        rest = [(block.end, block.load()) for block in read_blocks(inputs, Columns(), end)]
        assert [(at, loaded.batch.to_pylist()) for at, loaded in rest] == [
            (at, loaded.batch.to_pylist()) for at, _, loaded in blocks[index + 1 :]
        ]


def test_parquet(tmp_path, small_blocks):
    path = tmp_path / "rows.parquet"
    table = pa.table({"n": range(200), "text": [row["text"] for row in ROWS], "id": [row["id"] for row in ROWS]})
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(table.set_column(1, "text", table["text"].cast(kind)), path, row_group_size=64)
        assert read_all([path])[0] == EXPECTED
    assert [row[0] for row in read_all([path], Columns("text", "n"))[0]] == [str(n) for n in range(200)]


def test_parquet_bad_rows(tmp_path):
    texts = pa.array([b"good", b"bad \xff", None, b"", b"fine"], pa.binary())
    # pyarrow does not check UTF-8 when the type is only claimed
    claimed = pa.Array.from_buffers(pa.string(), 5, texts.buffers())
    pq.write_table(pa.table({"text": claimed}), tmp_path / "a.parquet")
    rows, blocks, _ = read_all([tmp_path / "a.parquet"])
    assert [row[:2] for row in rows] == [("a.parquet:1", "good"), ("a.parquet:5", "fine")]
    assert [(row.row, row.reason.split(" (")[0]) for row in blocks[0].rejected] == [
        (2, "column 'text': not UTF-8"),
        (3, "column 'text' is null"),
    ]
    assert (blocks[0].rows, blocks[0].empty) == (5, 1)


def test_parquet_broken_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [prose(n, 200) for n in range(1_000)]})
    pq.write_table(table, path, row_group_size=100, compression="zstd")
    offset = pq.ParquetFile(path).metadata.row_group(6).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)
    rows, _, broken = read_all([path])
    assert [int(row[0].split(":")[1]) for row in rows] == [*range(1, 601), *range(701, 1_001)]
    assert len(broken) == 1
    assert "row group 6" in broken[0]
    assert str(path) in broken[0]
    blocks = list(read_blocks(find_inputs([str(path)]).inputs, Columns(), whole_group_bytes=0))
    assert sum(block.load().batch.num_rows for block in blocks) == 600
    assert "row group 6" in (blocks[-1].broken or "")


def test_text_files_folders_and_globs(tmp_path):
    root = tmp_path / "corpus"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "b.md").write_text("# b")
    (root / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    (root / "sub" / "c.py").write_text("c = 1")
    (root / "sub" / "empty.txt").write_text("")
    (root / "sub" / "latin.txt").write_bytes(b"ok\ncaf\xe9")
    (root / "sub" / ".git" / "d.txt").write_text("hidden")
    (root / "settings.json").write_text("{}")
    (root / "image.png").write_bytes(b"\x89PNG")
    rows, (block,), _ = read_all([root])
    assert rows == [
        ("corpus/a.txt", "a\r\n", "corpus"),
        ("corpus/b.md", "# b", "corpus"),
        ("corpus/sub/c.py", "c = 1", "corpus"),
    ]
    assert (block.rows, block.empty) == (5, 1)
    assert [(row.file, row.row) for row in block.rejected] == [(str(root / "sub" / "latin.txt"), 2)]
    assert "not UTF-8" in block.rejected[0].reason
    assert [row[0] for row in read_all([str(root / "**" / "*.py")])[0]] == ["sub/c.py"]
    assert [row[0] for row in read_all([root / "b.md", str(root / "*.txt")])[0]] == ["b.md", "a.txt"]
    assert [item.source for item in find_inputs([str(root)], source="mine").inputs] == ["mine"] * 5


def test_same_name_in_two_folders_gives_two_ids(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    ids = [row[0] for row in read_all([tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"])[0]]
    assert len(set(ids)) == 2


def test_what_a_folder_leaves_out_is_told_in_one_line(tmp_path):
    root, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text("far")
    (root / "README.md").write_text("read me")
    for name in ("train.json", "sub/more.json", "sub/most.json"):
        write_rows(root / name, [{"text": "a"}] * 3)
    for name in ("x.foo", "y.FOO", "LICENSE", "z.xls.gz", ".hidden.foo"):
        (root / name).write_text("?")
    (root / "linked").symlink_to(elsewhere)
    (root / "sub" / "loop").symlink_to(root)
    (root / "lost.txt").symlink_to(tmp_path / "nowhere")
    inputs, (left_out,) = find_inputs([str(root)])
    assert [item.name for item in inputs] == ["corpus/README.md"]
    assert left_out.counts() == {
        ".foo": 2,
        ".json": 3,
        ".xls.gz": 1,
        "link to nowhere": 1,
        "linked folder": 2,
        "no suffix": 1,
    }
    message = str(left_out)
    assert "\n" not in message
    assert (
        f"{root}: left out 3 × .json (sub/more.json, sub/most.json, …), 2 × linked folder (linked, sub/loop)" in message
    )
    assert f"give '{root}/**/*.json'" in message
    (root / "sub" / "loop").unlink()  # a pattern with ** follows links
    assert len(read_all([root, f"{root}/**/*.json"])[0]) == 10  # what the message says works
    assert len(read_all([root, root / "linked"])[0]) == 2
    assert find_inputs([str(elsewhere)]).left_out == []


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def scandir(path):  # the tests may run as root, to whom every folder is open
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed: this folder cannot be read \(Permission denied\)"):
        find_inputs([str(tmp_path)])


def test_ids_do_not_depend_on_how_a_path_is_spelled(tmp_path, monkeypatch):
    for folder in ("x", "y"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        write_rows(tmp_path / "in" / folder / "a.jsonl", [{"text": folder}] * 2)
    monkeypatch.chdir(tmp_path / "in" / "x")

    def names(*arguments: str) -> list[str]:
        return [item.name for item in find_inputs(arguments).inputs]

    whole = tmp_path / "in"
    for spelled in (str(whole), f"{whole}/", "..", "../", "../../in", "../x/.."):
        assert names(spelled) == ["in/x/a.jsonl", "in/y/a.jsonl"], spelled
    assert names(".") == names("../x") == names(f"{whole}/x") == ["x/a.jsonl"]
    assert names("a.jsonl") == names("./a.jsonl") == names(f"{whole}/x/a.jsonl") == ["a.jsonl"]
    assert names("*.jsonl") == names("../x/*.jsonl") == names(f"{whole}/x/*.jsonl") == ["a.jsonl"]
    both = names("a.jsonl", "../y/a.jsonl")  # one name twice: told apart by their folders
    assert both == names(f"{whole}/x/a.jsonl", f"{whole}/y/a.jsonl") == ["x/a.jsonl", "y/a.jsonl"]


def test_parquet_rows_that_are_far_too_large(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    texts = ["a", "b" * 5_000, "c", "d" * 500, "e" * 500, "f"]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path)
    monkeypatch.setattr(prep.arrow_columns, "MAX_BATCH_BYTES", 800)
    monkeypatch.setattr(prep.arrow_columns, "MAX_DOCUMENT_BYTES", 4_000)
    blocks = [
        block.load() for block in read_blocks(find_inputs([str(path)]).inputs, Columns(), whole_group_bytes=1_000)
    ]
    rows = [tuple(row.values()) for documents in blocks for row in documents.batch.to_pylist()]
    assert [row[:2] for row in rows] == [(f"a.parquet:{n}", text) for n, text in enumerate(texts, 1) if n != 2]
    (rejected,) = [row for block in blocks for row in block.rejected]
    assert rejected.row == 2
    assert "no document is larger than 4,000 bytes" in rejected.reason
    assert sum(block.rows for block in blocks) == 6


def test_more_than_2_gb_in_a_batch_is_no_traceback(tmp_path):
    zeros = pa.py_buffer(np.zeros(3 << 30, np.uint8))  # pages that nobody touches
    offsets = pa.py_buffer(np.arange(4, dtype=np.int64) << 30)
    texts = pa.Array.from_buffers(pa.large_string(), 3, [None, offsets, zeros])
    batch = pa.RecordBatch.from_arrays([texts], names=["text"])
    item = Input(str(tmp_path / "a.parquet"), "a.parquet", "a", "parquet", 0)
    with pytest.raises(UserError, match=r"a\.parquet: rows 8 to 10 cannot be taken as text.*smaller row groups"):
        batch_documents(batch, item, Columns(), None, DOCUMENT, np.arange(8, 11))
    assert [part.num_rows for part in bounded(batch)] == [1, 1, 1]


def check(*arguments: str | Path, columns: Columns = TEXT) -> None:
    check_inputs(find_inputs([str(argument) for argument in arguments]).inputs, columns)


def test_mistakes_are_named(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"title": "t", "body": "b", "n": 1}] * 3)
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"title": ["t"], "n": [1]}), parquet)
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    (tmp_path / "no.parquet").write_text("no")
    (tmp_path / "a.docx").write_text("?")
    (tmp_path / "empty").mkdir()
    for arguments, columns, parts in [
        ([rows], Columns(), ["no column 'text'", "title, body, n", "--text-column"]),
        ([rows], Columns("n"), ["column 'n' holds a number, not text"]),
        ([rows], Columns("body", "key"), ["no column 'key'", "--id-column"]),
        ([parquet], Columns(), ["no column 'text'", "title (string), n (int64)"]),
        ([parquet], Columns("n"), ["column 'n' holds int64, not text"]),
        ([tmp_path / "array.json"], Columns(), ["JSON array", "jq"]),
        ([tmp_path / "no.parquet"], Columns(), ["not a readable Parquet file"]),
        ([tmp_path / "a.docx"], Columns(), ["cannot tell", ".parquet"]),
        ([tmp_path / "empty"], Columns(), ["no file that can be read"]),
        ([tmp_path / "gone.txt"], Columns(), ["no such file"]),
        ([tmp_path / "*.txt"], Columns(), ["no file matches"]),
        ([rows, rows], Columns("body"), ["given twice"]),
    ]:
        with pytest.raises(UserError) as error:
            check(*arguments, columns=columns)
        assert all(part in str(error.value) for part in parts), str(error.value)
    check(rows, columns=Columns("body", "title"))


def test_position_is_plain_data():
    assert Position(*json.loads(json.dumps(Position(3, 4)))) == Position(3, 4)
