"""Folders and inputs, local and remote: what is written is complete or absent, errors say what to do."""

from __future__ import annotations

import os
import pickle
import socket

import pytest

from prep.storage import Folder, is_remote, matches, open_input, remote_files, stat
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
