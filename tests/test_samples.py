"""Documents and rejects of a stage's folder, chosen and shown, from small folders written here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from prep.samples import choose, show
from prep.stages import REASON_COLUMNS
from shards.errors import UserError

DOCUMENT = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("score", pa.float64())])
REJECT = pa.schema([*DOCUMENT, *REASON_COLUMNS])


def document(number: int, source: str) -> dict[str, Any]:
    return {"id": f"{source}-{number}", "text": f"text {number}\n" * 3, "source": source, "score": number / 7}


def reject(number: int, source: str) -> dict[str, Any]:
    row = document(number, source) | dict.fromkeys(REASON_COLUMNS.names)
    if number % 10 == 0:
        return row | {"stage": "dedup", "rule": "minhash", "keeper": f"{source}-1", "similarity": 0.87654}
    if source == "books":
        return row | {"stage": "gopher", "rule": "gopher.stop_words", "value": 1.0, "threshold": 2.0}
    return row | {"stage": "language", "rule": "language.other", "value": 0.91, "detail": "de"}


def write(folder: Path, kind: str, rows: list[dict[str, Any]], schema: pa.Schema, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=20, compression="zstd")
        return
    half = len(rows) // 2
    content = b"".join(  # two frames, as an appended file has them
        zstandard.compress("".join(json.dumps(row) + "\n" for row in part).encode())
        for part in (rows[:half], rows[half:])
    )
    (folder / f"part-{number:05d}.jsonl.zst").write_bytes(content)


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def folder(request, tmp_path_factory) -> Path:
    """Two parts of web, one of books, 50 documents each, and as many rejects."""
    folder = tmp_path_factory.mktemp(request.param)
    for part, source in enumerate(("web", "web", "books")):
        numbers = range(50 * part, 50 * part + 50)
        write(folder, request.param, [document(n, source) for n in numbers], DOCUMENT, part)
        write(folder / "rejected", request.param, [reject(n, source) for n in numbers], REJECT, part)
    (folder / "manifest.json").write_text("{}")
    return folder


def shown(capsys: pytest.CaptureFixture[str], folder: Path | str, **options: Any) -> str:
    show(str(folder), **options)
    return capsys.readouterr().out


def ids(output: str) -> list[str]:
    return re.findall(r"^── \d+ (\S+) · ", output, re.M)


def test_documents_are_spread_over_the_parts_and_follow_the_seed(folder, capsys):
    output = shown(capsys, folder, number=6)
    found = ids(output)
    assert len(found) == len(set(found)) == 6
    parts = [int(name.split("-")[1]) // 50 for name in found]
    assert parts == [0, 0, 1, 1, 2, 2]
    assert shown(capsys, folder, number=6) == output
    assert ids(shown(capsys, folder, number=6, seed=1)) != found
    assert "── 1 " + found[0] + " · web · " in output
    number = int(found[0].split("-")[1])
    assert f"score={number / 7:.4g}\ntext {number}\ntext {number}\ntext {number}\n" in output
    assert ids(shown(capsys, folder, number=1000)) == [f"{('web', 'web', 'books')[n // 50]}-{n}" for n in range(150)]


def test_one_source(folder, capsys):
    found = ids(shown(capsys, folder, number=100, source="books"))
    assert found == [f"books-{n}" for n in range(100, 150)]


def test_rejects_of_a_rule(folder, capsys):
    output = shown(capsys, folder, rule="gopher.stop_words", number=100)
    assert ids(output) == [f"books-{n}" for n in range(100, 150) if n % 10]
    assert output.count("   gopher.stop_words · 1 < 2\n") == 45
    output = shown(capsys, folder, rule="minhash", source="web", number=3)
    assert all(name.startswith("web-") and name.endswith("0") for name in ids(output))
    assert output.count("   minhash · duplicate of web-1 · similarity 0.877\n") == 3
    assert "language.other · 0.91 · de" in shown(capsys, folder, rule="language.other", number=1)


def test_rejects_begin_with_the_rules(folder, capsys):
    output = shown(capsys, folder, rejected=True, number=2)
    table = re.findall(r"^(\S+) +(\S+) +(\d+) *$", output, re.M)
    assert table == [
        ("language", "language.other", "90"),
        ("gopher", "gopher.stop_words", "45"),
        ("dedup", "minhash", "15"),
    ]
    assert len(ids(output)) == 2
    output = shown(capsys, folder, rejected=True, source="books", number=2)
    assert "language.other" not in output
    assert re.search(r"^dedup +minhash +5 *$", output, re.M)


def test_texts_are_cut_unless_all_is_wanted(folder, capsys):
    output = shown(capsys, folder, number=1, characters=4)
    assert re.search(r"^text … \d+ more characters$", output, re.M)
    assert "more characters" not in shown(capsys, folder, number=1, characters=None)


def test_wrong_names_get_the_nearest(folder):
    with pytest.raises(UserError, match=r"unknown rule 'gopher\.stopwords'; did you mean 'gopher\.stop_words'"):
        show(str(folder), rule="gopher.stopwords")
    with pytest.raises(UserError, match="unknown source 'book'; did you mean 'books'"):
        show(str(folder), source="book")
    with pytest.raises(UserError, match=r"rule 'gopher\.stop_words' removed nothing of source 'web'"):
        show(str(folder), rule="gopher.stop_words", source="web")


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "web.parquet").write_text("x")
    for name in ("", "nowhere", "file"):
        with pytest.raises(UserError, match="not the folder of a stage: that is what minigpt-prep filter, dedup"):
            show(str(tmp_path / name))


def test_nothing_rejected_and_nothing_left(tmp_path, capsys):
    write(tmp_path, "parquet", [document(1, "web")], DOCUMENT, 0)
    assert "no document was rejected" in shown(capsys, tmp_path, rejected=True)
    assert "no document was rejected" in shown(capsys, tmp_path, rule="minhash")
    other = tmp_path / "other"
    write(other, "parquet", [], DOCUMENT, 0)
    write(other / "rejected", "parquet", [], REJECT, 0)
    assert shown(capsys, other).endswith("other: no document is left in it\n")
    assert "no document was rejected" in shown(capsys, other, rejected=True)


@pytest.mark.parametrize("name", ["part-00000.parquet", "part-00000.jsonl.zst"])
def test_a_damaged_part_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(zstandard.compress(b"no json\n") if "jsonl" in name else b"PAR1 and then nothing")
    with pytest.raises(UserError, match=re.escape(f"{name}: cannot be read (")):
        show(str(tmp_path))


def test_hostile_texts_do_not_reach_the_terminal(tmp_path, capsys):
    bad = "\x1b]0;owned\x07[bold]x[/bold]\x00\u202e\x9b31m"
    row = {"id": "a" + bad, "text": bad + "\tend", "source": "s" + bad, "score": None}
    reasons = dict.fromkeys(REASON_COLUMNS.names, None) | {"stage": bad, "rule": bad, "detail": bad, "keeper": bad}
    write(tmp_path / "rejected", "parquet", [row | reasons], REJECT, 0)
    output = shown(capsys, tmp_path, rejected=True)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", output)
    assert "␛]0;owned␇[bold]x[/bold]␀⟨202E⟩⟨9B⟩31m" in output


def test_only_what_is_needed_is_read(tmp_path, capsys, monkeypatch):
    for part in range(8):
        write(tmp_path, "parquet", [document(100 * part + n, f"s{part}") for n in range(60)], DOCUMENT, part)
    read: list[tuple[int, Any]] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, number: int, columns: Any = None, **options: Any) -> pa.Table:
        read.append((number, columns))
        return original(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert len(ids(shown(capsys, tmp_path, number=2))) == 2
    assert [columns for _, columns in read] == [None, None]  # of 24 row groups
    read.clear()
    assert len(ids(shown(capsys, tmp_path, number=1, source="s3"))) == 1
    assert [columns for _, columns in read] == [["source"]] * 3 + [None]  # the part of s3, then one of its groups


@given(st.integers(0, 5000), st.integers(1, 60), st.integers())
def test_choice_is_even(total, number, seed):
    found = choose(total, number, seed)
    assert len(found) == min(total, number)
    assert found == sorted(set(found))
    if total > number:
        assert all(place * total // number <= at < (place + 1) * total // number for place, at in enumerate(found))


def make_recipe(folder: Path, kind: str, first: str, second: str, last: str) -> Path:
    """Folders of a recipe with two deduplications, as runs leave them: nine documents removed in each pass."""
    for place, name in enumerate((first, second, last)):
        below = folder / name
        write(below, kind, [document(n, "web") for n in range(5)], DOCUMENT, 0)
        gone = [reject(n, "web") | {"id": f"{place}-{n}"} for n in range(10 * place + 1, 10 * place + 10)]
        write(below / "rejected", kind, gone, REJECT, 0)
        (below / "state").mkdir(exist_ok=True)
        (below / "state" / "part-00000.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "names", [("before-dedup", "before-dedup-2", "documents"), ("scratch", "scratch-2", "")], ids=["recipe", "stage"]
)
def test_rejects_of_all_passes_and_where_they_lie(tmp_path, capsys, kind, names):
    make_recipe(tmp_path / "out", kind, *names)
    output = shown(capsys, tmp_path / "out", rejected=True, number=100)
    assert re.findall(r"^language +language\.other +(\d+) *$", output, re.M) == ["27"]
    assert ids(output) == [f"{place}-{n}" for place in range(3) for n in range(10 * place + 1, 10 * place + 10)]
    where = re.findall(r"^── .* · in (\S+)$", output, re.M)
    assert where == [f"{name}/rejected".lstrip("/") for name in names for _ in range(9)]
    assert len(ids(shown(capsys, tmp_path / "out", rule="language.other", number=3))) == 3
    stayed = shown(capsys, tmp_path / "out", number=100)
    assert ids(stayed) == [f"web-{n}" for n in range(5)]
    assert stayed.count(" · in documents\n") == (5 if names[2] else 0)
    alone = shown(capsys, tmp_path / "out" / names[0], rejected=True, number=100)
    assert ids(alone) == [f"0-{n}" for n in range(1, 10)]
    assert " · in " not in alone


def test_from_object_storage(tmp_path, capsys, monkeypatch):
    """The same output from a file system that is not local: every access goes through `Folder`."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        system, _ = pyarrow.fs.FileSystem.from_uri("s3://samples/?allow_bucket_creation=true")
        system.create_dir("samples")
        write(tmp_path, "parquet", [document(n, "web") for n in range(50)], DOCUMENT, 0)
        write(tmp_path / "rejected", "parquet", [reject(n, "web") for n in range(50)], REJECT, 0)
        pyarrow.fs.copy_files(str(tmp_path), "samples/out", destination_filesystem=system)
        for options in ({"number": 4}, {"rejected": True}, {"rule": "minhash"}):
            assert shown(capsys, "s3://samples/out", **options) == shown(capsys, tmp_path, **options)
    finally:
        server.stop()
