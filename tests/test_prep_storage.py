"""Folders and inputs, local and remote: what is written is complete or absent, errors say what to do."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import time

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from prep_data import prose, read_all, write_rows

import prep.storage
from prep.documents import Columns
from prep.output import describe_inputs
from prep.part_writer import FORMATS, PartWriter, read_part
from prep.sources import check_inputs, find_inputs, read_blocks
from prep.storage import Folder, is_remote, matches, open_input, raise_if_unreachable, remote_files, stat
from shards.errors import UserError


@pytest.fixture(scope="module")
def s3():
    """A local S3 server with a bucket, found by the environment as any other."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        import pyarrow.fs

        pyarrow.fs.FileSystem.from_uri("s3://bucket/?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        return Folder(tmp_path / "out")
    return Folder(request.getfixturevalue("s3") + f"/{tmp_path.name}/out")


def test_a_folder_reads_what_it_wrote(folder):
    assert folder.read("a.json") is None
    assert folder.names() == []
    assert not folder.exists("a.json")
    folder.remove("a.json")
    folder.write("a.json", b"one")
    folder.write("a.json", b"two")
    folder.child("sub").write("b.json", b"three")
    folder.write("part-00001 and %41é.txt", b"")
    assert folder.read("a.json") == b"two"
    assert folder.names() == ["a.json", "part-00001 and %41é.txt"]
    assert folder.names("*.json") == ["a.json"]
    assert folder.child("sub").names() == ["b.json"]
    assert folder.exists("a.json")
    assert not folder.exists("sub")
    with folder.open("a.json") as file:
        file.seek(1)
        assert file.read() == b"wo"
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.child("sub").read("b.json") == b"three"
    folder.remove("a.json")
    assert folder.names("*.json") == []
    with pytest.raises(UserError, match="no such file"):
        folder.open("a.json")


def test_a_file_is_complete_or_absent(folder):
    big = os.urandom(1 << 20) * 12  # more than one piece of an upload
    with folder.create("big.bin") as file:
        for _ in range(3):
            file.write(big)
        assert not folder.exists("big.bin")
    assert folder.read("big.bin") == big * 3

    def half_way() -> None:
        with folder.create("half.bin") as file:
            file.write(big)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_way()
    assert folder.names() == ["big.bin"]
    if folder.local:
        assert [path.name for path in folder.local.iterdir()] == ["big.bin"]


def test_one_writer_to_a_local_folder(tmp_path, s3):
    folder = Folder(tmp_path / "out")
    with folder.lock(), pytest.raises(UserError, match="another process is writing here"), folder.lock():
        pass
    with folder.lock():
        assert folder.names() == []
    with Folder(f"{s3}/x").lock(), Folder(f"{s3}/x").lock():
        pass


def test_remote_files_and_their_times(s3):
    folder = Folder(f"{s3}/listed")
    folder.write("b.txt", b"bb")
    folder.child("a").write("c.txt", b"c")
    found = remote_files(f"{s3}/listed/")
    assert [(file.path, file.size) for file in found] == [(f"{s3}/listed/a/c.txt", 1), (f"{s3}/listed/b.txt", 2)]
    assert all(file.modified > 10**18 for file in found)
    assert stat(f"{s3}/listed/b.txt") == found[1]
    assert stat(f"{s3}/listed") is None
    assert remote_files(f"{s3}/nothing") == []


def test_errors_of_storage_say_what_to_do(s3, monkeypatch):
    with pytest.raises(UserError, match=r"s3://nowhere/a/b: there is no such bucket"):
        Folder("s3://nowhere/a").write("b", b"")
    with pytest.raises(UserError, match=r"s3://bucket/no\.txt: no such file"):
        open_input(f"{s3}/no.txt")
    with pytest.raises(UserError, match="unknown kind of address 's4'; known: gs, hf, s3"):
        Folder("s4://bucket")
    with pytest.raises(UserError, match="names a bucket and a path"):
        open_input("s3://")
    with pytest.raises(UserError, match="only read here"):
        Folder("hf://datasets/a/b").write("c", b"")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UserError, match=r"s3://bucket/no\.txt: storage cannot be reached.*AWS_ENDPOINT_URL"):
            open_input(f"{s3}/no.txt")


def test_what_is_an_address():
    assert is_remote("s3://bucket/a")
    assert not any(is_remote(path) for path in ("a", "/a/b", "./s3:/a", "C:\\a"))


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("b/a.txt", "b/*.txt", True),
        ("b/x/a.txt", "b/*.txt", False),
        ("b/x/a.txt", "b/**/*.txt", True),
        ("b/a.txt", "b/**/*.txt", True),
        ("b/x/y/a.txt", "b/**", True),
        ("b/a.txt", "b/[ab].t?t", True),
    ],
)
def test_patterns(path, pattern, expected):
    assert matches(path, pattern) is expected


def test_inputs_in_s3(s3, tmp_path):
    rows = [{"id": f"d{n}", "text": prose(n, 30), "n": n} for n in range(300)]
    for name in (
        "a.jsonl",
        "sub/b.jsonl.gz",
        "c.parquet",
        "d.csv",
        "e.txt",
        "saved/data-0.arrow",
        "junk.xyz",
        ".hidden.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    data = write_rows(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(data))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=100)
    pa.csv.write_csv(table, tmp_path / "d.csv")
    with (
        pa.OSFile(str(tmp_path / "saved" / "data-0.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    remote = Folder(f"{s3}/in")
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            remote.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())

    def found(*arguments: str) -> list[tuple[str, str]]:
        return [(item.name, item.source) for item in find_inputs(arguments).inputs]

    names = ["in/a.jsonl", "in/c.parquet", "in/d.csv", "in/e.txt", "in/saved/data-0.arrow", "in/sub/b.jsonl.gz"]
    assert found(f"{s3}/in") == found(f"{s3}/in/") == [(name, "in") for name in names]
    (left_out,) = find_inputs([f"{s3}/in"]).left_out
    assert left_out.names == {".xyz": ["junk.xyz"]}
    assert found(f"{s3}/in/*.jsonl") == [("a.jsonl", "in")]
    assert found(f"{s3}/in/**/*.jsonl*") == [("a.jsonl", "in"), ("sub/b.jsonl.gz", "in")]
    assert found(f"{s3}/in/a.jsonl") == [("a.jsonl", "a")]
    assert found(f"{s3}/in/saved") == [("saved/data-0.arrow", "saved")]
    assert found(f"{s3}/in/a.jsonl", str(tmp_path / "a.jsonl")) == [("bucket/in/a.jsonl", "a"), ("a.jsonl", "a")]
    for argument, message in [
        (f"{s3}/in/*.txtt", "no file matches"),
        (f"{s3}/gone", "no such file or folder"),
        (f"{s3}/in/junk.xyz", "cannot tell by its name"),
    ]:
        with pytest.raises(UserError, match=message):
            find_inputs([argument])
    with pytest.raises(UserError, match="given twice"):
        find_inputs([f"{s3}/in/a.jsonl", f"{s3}/in"])

    columns = Columns(keep=("n",))
    for name in ("a.jsonl", "sub/b.jsonl.gz", "c.parquet", "saved"):
        inputs = find_inputs([f"{s3}/in/{name}"], "s").inputs
        assert all(item.size > 0 and item.modified > 10**18 for item in inputs)
        schema = check_inputs(inputs, columns)
        blocks = [
            pickle.loads(pickle.dumps(block, protocol=5)) for block in read_blocks(inputs, columns, schema=schema)
        ]
        seen = [row for block in blocks for row in block.load().batch.to_pylist()]
        assert seen == [{**row, "source": "s"} for row in rows]
    assert len(read_all([f"{s3}/in"])[0]) == 5 * 300 + 1
    described = describe_inputs(find_inputs([f"{s3}/in"]).inputs)["in"]
    time.sleep(1.1)  # times in S3 are whole seconds
    remote.write("e.txt", b"TEXT")
    again = describe_inputs(find_inputs([f"{s3}/in"]).inputs)["in"]
    assert again["digest"] == described["digest"]
    assert again["times"] != described["times"]


def test_inputs_from_the_hub(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    rows = [{"id": f"d{n}", "text": prose(n, 30)} for n in range(100)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    for number in range(2):
        memory.pipe(f"/datasets/owner/name/data/train-{number}.parquet", buffer.getvalue().to_pybytes())
    memory.pipe("/datasets/owner/name/README.md", b"# read me")

    class Hub(fsspec.AbstractFileSystem):
        """Paths without a slash in front, as the hub has them."""

        def info(self, path: str, **options: object) -> dict:
            return self._clean(memory.info("/" + path))

        def find(self, path: str, **options: object) -> dict:
            return {name.lstrip("/"): self._clean(info) for name, info in memory.find("/" + path, detail=True).items()}

        def ls(self, path: str, detail: bool = True, **options: object) -> list:
            return [self._clean(info) for info in memory.ls("/" + path, detail=True)]

        def _open(self, path: str, *arguments: object, **options: object) -> object:
            return memory.open("/" + path, "rb")

        @staticmethod
        def _clean(info: dict) -> dict:
            return {**info, "name": info["name"].lstrip("/")}

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    prep.storage._file_system.cache_clear()
    try:
        where = "hf://datasets/owner/name"
        assert [row[:2] for row in read_all([f"{where}/data/train-0.parquet"])[0]] == [
            (r["id"], r["text"]) for r in rows
        ]
        assert len(read_all([f"{where}/**/*.parquet"])[0]) == 200
        assert [item.name for item in find_inputs([f"{where}/data"]).inputs] == [
            "data/train-0.parquet",
            "data/train-1.parquet",
        ]
        with pytest.raises(UserError, match="no such file or folder"):
            find_inputs([f"{where}/test"])
    finally:
        prep.storage._file_system.cache_clear()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    class Hub:
        protocol = "hf"

        def info(self, path: str) -> dict:
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    prep.storage._file_system.cache_clear()
    with pytest.raises(UserError, match=r"hf://datasets/a/b/c\.parquet: the hub cannot be read; .*HF_TOKEN.*not known"):
        find_inputs(["hf://datasets/a/b/c.parquet"])
    prep.storage._file_system.cache_clear()


def test_a_part_in_s3(s3):
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    batch = pa.RecordBatch.from_pydict({"id": ["a", "b"], "text": ["x", "y"]}, schema)
    folder = Folder(f"{s3}/out")
    for format in FORMATS:
        with PartWriter(folder, f"p-{format[:3]}", schema, format) as writer:
            writer.write(batch)
        assert pa.Table.from_batches(read_part(folder, f"p-{format[:3]}")).to_pylist() == batch.to_pylist()
    assert folder.names() == ["p-jso.jsonl.zst", "p-par.parquet"]


def test_storage_that_fails_is_no_damaged_file():
    failure = OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")
    with pytest.raises(UserError, match="storage cannot be reached"):
        raise_if_unreachable("s3://bucket/a.parquet", failure)
    raise_if_unreachable("a.parquet", failure)
    raise_if_unreachable("s3://bucket/a.parquet", OSError("Corrupt snappy compressed data."))
