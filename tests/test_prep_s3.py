"""Preparations from s3:// to s3://, against a local S3 server: the same documents as on a local disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow.fs
import pytest
from prep_data import small_tokenizer, write_rows
from prep_runs import documents, make_small, write_recipe

from prep import cli
from prep.storage import Folder
from shards.reader import TokenDataset


@pytest.fixture(scope="module")
def bucket():
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
        pyarrow.fs.FileSystem.from_uri("s3://bucket/?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in this process, with small parts; gives stdout and stderr."""
    make_small(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["minigpt-prep", *map(str, arguments)])
        found: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            found = stopped.code or 0
        out, said = capsys.readouterr()
        assert found == code, said
        assert "Traceback" not in said
        return out, said

    return run


def objects(address: str) -> dict[str, tuple[int, int]]:
    """Every object below an address: size and time of change."""
    system, path = pyarrow.fs.FileSystem.from_uri(address)
    infos = system.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    return {info.path.removeprefix(path + "/"): (info.size, info.mtime_ns) for info in infos if info.is_file}


def content(folder: Folder, below: str = "") -> dict[str, bytes | None]:
    """The documents, or what else lies in a folder, by name."""
    place = folder.child(below) if below else folder
    return {name: place.read(name) for name in place.names("part-*")}


STAGES = {
    "filter": ["--preset", "gopher", "--mask", "email"],
    "dedup": ["--threshold", "0.7", "--bands", "6"],
    "decontaminate": ["--against", "exam.jsonl"],
}


@pytest.mark.parametrize("command", STAGES)
def test_from_s3_to_s3_as_on_a_disk(bucket, call, tmp_path, command):
    (tmp_path / "in").mkdir()
    for seed in (1, 2):
        write_rows(
            tmp_path / "in" / f"{seed}.jsonl", [*documents(seed, 70), *([b"{bad"] if command == "filter" else [])]
        )
        Folder(f"{bucket}/{command}/in").write(f"{seed}.jsonl", (tmp_path / "in" / f"{seed}.jsonl").read_bytes())
    write_rows(tmp_path / "exam.jsonl", [{"question": documents(1, 3)[2]["text"][:120]}])
    remote, local = Folder(f"{bucket}/{command}/out"), Folder(tmp_path / "out")
    options = [*STAGES[command], "--workers", 1, "--max-bad-rows", 0.1]
    call(command, f"{bucket}/{command}/in/*.jsonl", *options, "--out", remote)
    call(command, "in/*.jsonl", *options, "--out", "out")
    assert len(content(local)) > 1
    assert content(remote) == content(local)
    assert remote.read("duplicates.parquet") == local.read("duplicates.parquet")
    if command != "filter":  # its malformed rows name their file by its address
        assert content(remote, "rejected") == content(local, "rejected")
    ours, theirs = (orjson.loads(folder.read("manifest.json") or b"") for folder in (remote, local))
    for manifest in (ours, theirs):
        del manifest["made_from"]  # has the times of change in it
    assert ours == theirs
    before = objects(remote.uri)
    assert {"report.json", "report.html", "manifest.json"} <= before.keys()
    _, said = call(command, f"{bucket}/{command}/in/*.jsonl", *options, "--out", remote)
    assert "up to date" in said
    assert objects(remote.uri) == before
    out, _ = call("sample", remote, "-n", 2)
    assert out.count("── ") == 2
    out, _ = call("sample", remote, "--rejected", "-n", 300)
    assert ("malformed" in out) == (command == "filter")


def test_a_chain_on_s3_that_ends_in_tokens(bucket, call, tmp_path):
    Folder(f"{bucket}/chain").write("a.jsonl", write_rows(tmp_path / "a.jsonl", documents(1, 60)).read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    call("filter", f"{bucket}/chain/a.jsonl", "-p", "gopher", "--out", f"{bucket}/chain/clean", "--workers", 1)
    call("dedup", f"{bucket}/chain/clean", "--method", "exact", "--out", f"{bucket}/chain/unique", "--workers", 1)
    call("tokenize", f"{bucket}/chain/unique", "-t", "tokenizer.json", "-o", "tokens", "--workers", 1)
    manifest = orjson.loads(Folder(f"{bucket}/chain/unique").read("manifest.json") or b"")
    assert TokenDataset(tmp_path / "tokens").documents == manifest["documents"]
    assert {part["source"] for part in manifest["parts"]} == {"a"}


def test_recipes_on_s3(bucket, call, tmp_path):
    Folder(f"{bucket}/recipe").write("a.jsonl", write_rows(tmp_path / "a.jsonl", documents(1, 60)).read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    data: dict[str, Any] = {
        "name": "far",
        "output": f"{bucket}/recipe/out",
        "sources": [{"name": "a", "path": f"{bucket}/recipe/a.jsonl"}],
        "stages": [{"filter": {"preset": "gopher"}}, {"dedup": {"method": "exact"}}],
    }
    call("run", write_recipe(tmp_path / "recipe.yaml", data), "--workers", 1)
    before = objects(f"{bucket}/recipe/out")
    assert {"report.json", "documents/manifest.json", "before-dedup/manifest.json"} <= before.keys()
    call("run", "recipe.yaml", "--workers", 1)
    assert objects(f"{bucket}/recipe/out") == before
    out, _ = call("sample", f"{bucket}/recipe/out", "-n", 1)
    assert out.count("── ") == 1
    data["stages"].append({"tokenize": {"tokenizer": "tokenizer.json"}})
    data["output"] = f"{bucket}/recipe/other"
    _, said = call("run", write_recipe(tmp_path / "recipe.yaml", data), "--workers", 1, code=2)
    assert "token shards are written to a local folder" in said
    assert f"minigpt-prep tokenize {bucket}/recipe/other/documents" in said
    assert objects(f"{bucket}/recipe/out") == before
    assert Folder(f"{bucket}/recipe/other/documents").names() == []


def test_a_stopped_upload_is_gone_on_with(bucket, call, tmp_path, monkeypatch):
    """The server refuses half way; the parts that are there are not sent again."""
    Folder(f"{bucket}/stop").write("a.jsonl", write_rows(tmp_path / "a.jsonl", documents(1, 150)).read_bytes())
    command = ("filter", f"{bucket}/stop/a.jsonl", "-p", "gopher", "--out", f"{bucket}/stop/out", "--workers", 1)
    original, calls = pyarrow.fs.copy_files, []

    def fails(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError("When uploading: AWS Error NETWORK_CONNECTION during PutObject operation")
        original(*arguments, **more)

    monkeypatch.setattr(pyarrow.fs, "copy_files", fails)
    _, said = call(*command, code=2)
    assert "storage cannot be reached" in said
    monkeypatch.setattr(pyarrow.fs, "copy_files", original)
    before = objects(f"{bucket}/stop/out")
    done = {name[6:16] for name in before if name.startswith("state/part-")}
    assert done
    call(*command)
    now = objects(f"{bucket}/stop/out")
    assert all(now[name] == before[name] for name in before if any(part in name for part in done))
    assert Path("tokens").exists() is False
