"""CSV, saved datasets, columns that pass through, blocks in other processes, and very large or very empty files."""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import pickle
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prep_data import prose, read_all, small_tokenizer, write_rows

import prep.arrow_files
import prep.csv_rows
import prep.jsonl
from prep.documents import BLOCK_BYTES, Block, BrokenInput, Columns, Documents, Position
from prep.sources import check_inputs, find_inputs, read_blocks
from prep.tokens import tokenize
from prep.train_tokenizer import train_tokenizer
from shards.errors import UserError

ROWS = [{"id": f"d{n}", "text": prose(n, 30), "url": f"u{n}", "score": n / 2, "n": n} for n in range(200)]
KEEP = Columns(keep=("url", "score", "n"))


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (prep.jsonl, prep.csv_rows, prep.arrow_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(prep.jsonl, "READ_BYTES", 512)
    monkeypatch.setattr(prep.jsonl, "PIECE_BYTES", 300)


def write_csv(path: Path, rows: list[dict], delimiter: str = ",", end: str = "\n") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL  # else a line break of another kind stays bare
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_dataset(folder: Path, rows: list[dict], files: int = 2, batch_rows: int = 30) -> Path:
    """What `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    share = -(-len(rows) // files)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(number * share, share), max_chunksize=batch_rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.zst"])
def test_csv(tmp_path, name, end, small_blocks):
    rows = [{**row, "text": row["text"] + '\n"quoted", \ttab\r\n' * (row["n"] % 3)} for row in ROWS]
    path = write_csv(tmp_path / name, rows, "\t" if ".tsv" in name else ",", end)
    if name.endswith((".gz", ".zst")):
        path.write_bytes((gzip.compress if name.endswith(".gz") else zstandard.compress)(path.read_bytes()))
    seen, blocks, broken = read_all([path], KEEP)
    assert seen == [(row["id"], row["text"], "a", row["url"], str(row["score"]), str(row["n"])) for row in rows]
    assert len(blocks) > 10
    assert not broken


def test_csv_bad_rows(tmp_path, small_blocks):
    rows = [b"id,text,url", *(f"d{n},words of {n},u".encode() for n in range(100))]
    bad = {11: b"only one", 30: b'a,b,"c\nc",d', 50: b"x,\xff\xfe,u", 51: b"x,y,\xff", 80: b",,"}
    for at, row in bad.items():
        rows[at] = row
    rows[60] = b""  # an empty line is no row
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows))
    seen, blocks, broken = read_all([path], Columns(keep=("url",)))
    assert not broken
    rejected = [(row.row, row.reason) for block in blocks for row in block.rejected]
    assert [number for number, _ in rejected] == [11, 30, 50, 51]
    assert rejected[0][1] == "1 fields, not 3 as in the header"
    assert rejected[1][1] == "4 fields, not 3 as in the header"
    assert "column 'text': not UTF-8" in rejected[2][1]
    assert "column 'url': not UTF-8" in rejected[3][1]
    expected = [f"d{n}" for n in range(100) if n + 1 not in {*bad, 60}]
    assert [row[0] for row in seen] == expected
    assert sum(block.empty for block in blocks) == 1
    assert sum(block.rows for block in blocks) == 99


def test_csv_without_ids_and_with_odd_content(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,id\na\x00b,\n"""q"",",7\n5" nail,8\n"",9\n  ,10')
    assert read_all([path])[0] == [
        ("a.csv:1", "a\x00b", "a"),
        ("7", '"q",', "a"),
        ("8", '5" nail', "a"),
        ("10", "  ", "a"),
    ]
    path.write_bytes(b"text\na\n\nb\n")
    assert [row[:2] for row in read_all([path])[0]] == [("a.csv:1", "a"), ("a.csv:3", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "no column 'text'; columns found: a \\(string\\), b \\(string\\)"),
        (b"text,text\n1,2\n", "named twice: text"),
        (b"te\xff,text\n1,2\n", "header is not UTF-8"),
    ],
)
def test_csv_mistakes(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_inputs(find_inputs([str(tmp_path / "a.csv")]).inputs, Columns())


def test_csv_with_an_open_quote_is_broken(tmp_path, small_blocks):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"{n},words and words\n" for n in range(300)) + '300,"open\n' + "x,y\n" * 900)
    seen, _, broken = read_all([path])
    assert [row[0] for row in seen] == [str(n) for n in range(300)]
    assert "is a quote left open?" in broken[0]
    path.write_bytes(b"")
    assert read_all([path]) == ([], [], [])


@given(
    st.lists(st.tuples(st.text(max_size=12), st.text(alphabet='ab",\n\r é', max_size=12)), min_size=1, max_size=20),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 200),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_csv_reads_what_python_writes(tmp_path, monkeypatch, rows, end, block_bytes):
    monkeypatch.setattr(prep.csv_rows, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(prep.jsonl, "PIECE_BYTES", 7)
    path = write_csv(tmp_path / "a.csv", [{"k": k, "text": text} for k, text in rows], end=end)
    seen, _, broken = read_all([path], Columns(keep=("k",)))
    assert not broken
    assert [(row[3], row[1]) for row in seen] == [row for row in rows if row[1]]


def test_saved_datasets(tmp_path, small_blocks):
    folder = save_dataset(tmp_path / "mine", ROWS)
    seen, blocks, broken = read_all([folder], KEEP)
    assert seen == [(row["id"], row["text"], "mine", row["url"], row["score"], row["n"]) for row in ROWS]
    assert len(blocks) > 20
    assert not broken
    assert [item.name for item in find_inputs([str(folder)]).inputs] == [
        "mine/data-00000-of-00002.arrow",
        "mine/data-00001-of-00002.arrow",
    ]
    assert [row[0] for row in read_all([tmp_path])[0]] == [row["id"] for row in ROWS]  # found below a folder as well
    inputs = find_inputs([str(folder)]).inputs
    ends = [block.end for block in read_blocks(inputs, Columns())]
    for index, end in enumerate(ends):
        rest = [block.load().batch for block in read_blocks(inputs, Columns(), end)]
        assert [batch.to_pylist() for batch in rest] == [
            block.load().batch.to_pylist() for block in list(read_blocks(inputs, Columns()))[index + 1 :]
        ]
        if index > 4:
            break


def test_splits_of_a_saved_dataset(tmp_path):
    for split in ("train", "test"):
        save_dataset(tmp_path / "both" / split, ROWS[: 10 if split == "train" else 5])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"holds 2 splits of a dataset; give one by name: .*both/train, .*both/test"):
        find_inputs([str(tmp_path / "both")])
    assert len(read_all([tmp_path / "both" / "train"])[0]) == 10
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert [row[2] for row in read_all([tmp_path / "both"])[0]] == ["both"] * 5


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "dict"))
    large = dataset.cast_column("text", datasets.Value("large_string"))
    large.save_to_disk(str(tmp_path / "large"))
    dataset.shuffle(seed=1).save_to_disk(str(tmp_path / "shuffled"))
    for name in ("one", "dict", "large", "shuffled"):
        seen = read_all([tmp_path / name], KEEP)[0]
        assert sorted(seen, key=lambda row: row[5]) == [
            (row["id"], row["text"], name, row["url"], row["score"], row["n"]) for row in ROWS
        ]
    assert read_all([tmp_path / "shuffled"])[0] != read_all([tmp_path / "one"])[0]


@pytest.mark.parametrize("damage", ["truncated", "zeros", "offsets"])
def test_damaged_saved_dataset(tmp_path, damage, small_blocks):
    folder = save_dataset(tmp_path / "a", [{"text": prose(n, 30)} for n in range(200)], files=1)
    path = next(folder.glob("*.arrow"))
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if damage == "truncated":
        del data[half:]
    elif damage == "zeros":
        data[half : half + 5_000] = bytes(5_000)
    else:
        data[half : half + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    seen, blocks, broken = read_all([folder])
    assert len(seen) >= 60
    assert broken or any(block.rejected for block in blocks) or damage == "zeros"
    (folder / path.name).write_bytes(b"ARROW1\x00\x00 and so on")
    with pytest.raises(UserError, match="not a stream"):
        check_inputs(find_inputs([str(folder)]).inputs, Columns())


def test_kept_columns_pass_through_every_format(tmp_path, small_blocks):
    write_rows(tmp_path / "a.jsonl", ROWS)
    table = pa.Table.from_pylist(ROWS).set_column(2, "url", pa.array([r["url"] for r in ROWS]).dictionary_encode())
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=30)
    save_dataset(tmp_path / "c", ROWS)
    for argument in ("a.jsonl", "b.parquet", "c"):
        inputs = find_inputs([str(tmp_path / argument)], "s").inputs
        schema = check_inputs(inputs, KEEP)
        assert str(schema.types) == str([*[pa.string()] * 4, pa.float64(), pa.int64()])
        batches = [block.load().batch for block in read_blocks(inputs, KEEP, schema=schema)]
        assert all(batch.schema.equals(schema) for batch in batches)
        rows = [row for batch in batches for row in batch.to_pylist()]
        assert rows == [{**row, "source": "s"} for row in ROWS]


def test_types_are_settled_over_all_files(tmp_path):
    def settle(*names: str, keep: str = "x") -> pa.DataType:
        inputs = find_inputs([str(tmp_path / name) for name in names], "s").inputs
        columns = Columns(keep=(keep,))
        schema = check_inputs(inputs, columns)
        for block in read_blocks(inputs, columns, schema=schema):
            assert block.load().batch.schema.equals(schema)
        return schema.field(keep).type

    contents = {"int": 1, "float": 0.5, "text": "t", "bool": True, "null": None, "nested": {"a": 1}, "list": [1]}
    for name, value in contents.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "t", "x": value}] * 3)
    write_rows(tmp_path / "none.jsonl", [{"text": "t"}] * 3)
    pq.write_table(pa.table({"text": ["t"], "x": pa.array([1], pa.int32())}), tmp_path / "int32.parquet")
    pq.write_table(pa.table({"text": ["t"], "x": pa.array([1], pa.timestamp("us"))}), tmp_path / "time.parquet")
    pq.write_table(pa.table({"text": ["t"], "x": pa.array([b"1"])}), tmp_path / "bytes.parquet")
    (tmp_path / "text.csv").write_text("text,x\nt,1\n")
    (tmp_path / "plain.txt").write_text("t")
    assert settle("int.jsonl", "float.jsonl") == settle("float.jsonl", "int32.parquet") == pa.float64()
    assert settle("int.jsonl", "int32.parquet") == settle("int32.parquet", "int.jsonl") == pa.int64()
    assert settle("int32.parquet", "none.jsonl", "plain.txt") == pa.int32()
    assert settle("text.jsonl", "text.csv", "null.jsonl") == settle("null.jsonl") == pa.string()
    assert settle("time.parquet", "none.jsonl") == pa.timestamp("us")
    for names, message in [
        (("int.jsonl", "text.csv"), r"holds int64 in .*int\.jsonl and string in .*text\.csv"),
        (("bool.jsonl", "int.jsonl"), r"holds bool in .*bool\.jsonl and int64"),
        (("nested.jsonl",), r"nested\.jsonl: column 'x' holds nested values"),
        (("list.jsonl",), "nested values"),
        (("bytes.parquet",), "holds bytes"),
        (("none.jsonl", "plain.txt"), "no file has a column 'x' to keep; columns found: text"),
    ]:
        with pytest.raises(UserError, match=message):
            settle(*names)
    with pytest.raises(UserError, match="'source' cannot be kept"):
        settle("int.jsonl", keep="source")


def test_later_values_that_do_not_fit_are_bad_rows(tmp_path):
    later = [{"x": "5"}, {"x": 2.5}, {"x": True}, {"x": 2**70}, {"x": [1]}, {"x": None}, {}, {"x": -3}]
    path = write_rows(tmp_path / "a.jsonl", [{"text": "t", "x": 1}] * 150 + [{"text": "t", **row} for row in later])
    seen, blocks, _ = read_all([path], Columns(keep=("x",)))
    assert [row[3] for row in seen] == [1] * 150 + [None, None, -3]
    rejected = [row for block in blocks for row in block.rejected]
    assert [row.row for row in rejected] == [151, 152, 153, 154, 155]
    assert rejected[0].reason == "column 'x' holds '5', not int64"


def run_block(pickled: bytes) -> bytes:
    block: Block = pickle.loads(pickled)
    try:
        return pickle.dumps(block.load())
    except BrokenInput as error:
        return pickle.dumps(str(error))


def test_blocks_load_in_another_process(tmp_path, small_blocks):
    write_rows(tmp_path / "a.jsonl", [*ROWS, b"{", b""])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    write_csv(tmp_path / "c.csv", ROWS)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=60)
    save_dataset(tmp_path / "e", ROWS)
    (tmp_path / "f.txt").write_text("text")
    pq.write_table(table, tmp_path / "g.parquet", row_group_size=60)
    names = ["a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e", "f.txt", "g.parquet"]
    inputs = find_inputs([str(tmp_path / name) for name in names]).inputs
    offset = pq.ParquetFile(tmp_path / "g.parquet").metadata.row_group(1).column(1).data_page_offset
    data = bytearray((tmp_path / "g.parquet").read_bytes())
    data[offset : offset + 200] = bytes(200)
    (tmp_path / "g.parquet").write_bytes(data)
    blocks = list(read_blocks(inputs, Columns()))
    pickled = [pickle.dumps(block, protocol=5) for block in blocks]
    lazy = [
        len(p) for block, p in zip(blocks, pickled, strict=True) if inputs[min(block.end.input, 7)].kind == "parquet"
    ]
    assert max(lazy) < 2_000  # a block of Parquet says where its rows are, and does not hold them
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        loaded = [pickle.loads(result) for result in pool.map(run_block, pickled)]
    broken = 0
    for block, there in zip(blocks, loaded, strict=True):
        if isinstance(there, Documents):
            here = block.load()
            assert there.batch.to_pylist() == here.batch.to_pylist()
            assert (there.rows, there.empty, there.rejected) == (here.rows, here.empty, here.rejected)
        else:
            broken += 1
            with pytest.raises(BrokenInput, match=r"g\.parquet: row group 1 \(from row 61 on\)"):
                block.load()
    assert broken == 1
    assert sum(there.batch.num_rows for there in loaded if isinstance(there, Documents)) == 5 * 200 + 1 + 140


def test_tokenize_passes_a_broken_row_group_by(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=50)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    arguments = [str(path)], tmp_path / "tokenizer.json", tmp_path / "out"
    said: list[str] = []
    with pytest.raises(UserError, match=r"(?s)the rest of 1 file\(s\) cannot be read.*row group 1.*--keep-going"):
        tokenize(*arguments, workers=2, say=said.append)
    assert any("broken input" in line and "row group 1" in line for line in said)
    assert tokenize(*arguments, workers=2, keep_going=True, say=said.append).counts.documents == 150
    with pytest.raises(UserError, match="row group 1"):
        train_tokenizer([str(path)], tmp_path / "new.json", 300, special_tokens=["<|endoftext|>"], say=said.append)
    trained = train_tokenizer(
        [str(path)], tmp_path / "new.json", 300, special_tokens=["<|endoftext|>"], keep_going=True, say=said.append
    )
    assert (trained.rows, len(trained.broken)) == (150, 1)


def test_large_row_groups_are_cut_here_and_small_ones_where_they_are_loaded(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [prose(n, 100) for n in range(3_000)]}), path, row_group_size=1_500)
    inputs = find_inputs([str(path)]).inputs
    whole = list(read_blocks(inputs, Columns()))
    assert [block.end for block in whole] == [Position(0, 1_500), Position(0, 3_000)]
    cut = list(read_blocks(inputs, Columns(), whole_group_bytes=100))
    assert pa.Table.from_batches([block.load().batch for block in cut]).equals(
        pa.Table.from_batches([block.load().batch for block in whole])
    )
    rest = list(read_blocks(inputs, Columns(), Position(0, 700)))  # in the middle of a group: another run cut it so
    assert [block.load().batch.num_rows for block in rest][-1] == 1_500


def test_what_is_legal_stays(tmp_path):
    rows = [{"id": "same", "text": text} for text in ("a\x00b", "x", "x", "\x1b[31m", "")]
    write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    save_dataset(tmp_path / "c", rows)
    for name in ("a.jsonl", "b.parquet", "c"):
        assert [row[:2] for row in read_all([tmp_path / name])[0]] == [("same", row["text"]) for row in rows[:4]]


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
def test_truncated_parquet_is_named(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        check_inputs(find_inputs([str(path)]).inputs, Columns())


def test_blank_lines_between_rows(tmp_path, small_blocks):
    rng = random.Random(1)
    lines: list[bytes] = []
    for row in ROWS:
        lines += [rng.choice([b"", b"\r", b"  "])] * rng.choice([0, 0, 3, 60])
        lines.append(json.dumps({"text": row["text"]}).encode())
    path = write_rows(tmp_path / "a.jsonl", [*lines, b"", b"\r"])
    expected = [(f"a.jsonl:{n}", json.loads(line)["text"]) for n, line in enumerate(lines, 1) if line.strip()]
    seen, blocks, _ = read_all([path])
    assert [row[:2] for row in seen] == expected
    assert sum(block.rows for block in blocks) == len(ROWS)


MEASURE = """
import re, sys, time
from prep.documents import Columns
from prep.sources import find_inputs, read_blocks
def peak():  # of this program; what getrusage says begins with the peak of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, begin = peak(), time.process_time()
rows = 0
for block in read_blocks(find_inputs([sys.argv[1]]).inputs, Columns()):
    rows += block.load().rows
print(rows, time.process_time() - begin, (peak() - before) / 1024)
"""


def measure(path: Path) -> tuple[int, float, float]:
    """Rows, seconds of the processor and megabytes of memory that reading a file takes, in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, cwd=root, check=True)
    rows, seconds, megabytes = done.stdout.split()
    return int(rows), float(seconds), float(megabytes)


@pytest.mark.parametrize("line", [b"\n", b"\r\n"])
def test_ten_million_empty_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line * 10_000_000 + b'{"text":"a"}\n')
    rows, seconds, megabytes = measure(path)
    assert rows == 1
    assert seconds < 10  # 0.5 measured
    assert megabytes < 400
    assert read_all([path])[0] == [("a.jsonl:10000001", "a", "a")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt"])
def test_a_document_of_200_mb(tmp_path, name):
    text = ("a line of words\n" * 4 + "more: é, 語\n") * (200_000_000 // 79)
    path = tmp_path / name
    if name == "a.txt":
        path.write_text(text, encoding="utf-8")
    elif name == "a.jsonl":
        write_rows(path, [{"text": "a"}, {"text": text}, {"text": "b"}])
    elif name == "a.csv":
        write_csv(path, [{"text": "a"}, {"text": text}, {"text": "b"}])
    else:
        pq.write_table(pa.table({"text": ["a", text, "b"]}), path)
    batches = [block.load().batch for block in read_blocks(find_inputs([str(path)]).inputs, Columns())]
    lengths = [length for batch in batches for length in pc.binary_length(batch.column("text")).to_pylist()]
    assert lengths == ([len(text.encode())] if name == "a.txt" else [1, len(text.encode()), 1])
    _, seconds, megabytes = measure(path)
    assert megabytes < 8 * 200
    assert seconds < 60


def test_blocks_are_of_moderate_size(tmp_path):
    row = {"text": "words " * 200}
    write_rows(tmp_path / "a.jsonl", [row] * 10_000)
    write_csv(tmp_path / "b.csv", [row] * 10_000)
    save_dataset(tmp_path / "c", [row] * 10_000, batch_rows=1_000)
    for name in ("a.jsonl", "b.csv", "c"):
        blocks = list(read_blocks(find_inputs([str(tmp_path / name)]).inputs, Columns()))
        assert 2 <= len(blocks) <= 8
        assert all(block.size < 2 * BLOCK_BYTES for block in blocks)
