"""Files of lines: a full or failing disk delays lines and loses none, of one writer or of two."""

from __future__ import annotations

import errno
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train.append
from train.append import AppendOnly
from train.distributed import Ranks
from train.watch import Watch

ALONE = Ranks(0, 1, torch.device("cpu"), None)


class FlakyDisk:
    """Refuses what `plan` says, call by call; a failed sync loses all that the one before did not make durable."""

    def __init__(self, path, plan):
        self.path, self.plan, self.full = path, plan, False
        self.file = path.open("a+b", buffering=0)
        self.durable = path.stat().st_size

    def refuses(self) -> bool:
        return next(self.plan, False)

    def write(self, content: bytes) -> int:
        if self.full or self.refuses():
            self.full = not self.full and len(content) > 1  # it writes a half first, and refuses when asked again
            if not self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content[: len(content) // 2])
        return self.file.write(content[: max(1, len(content) - 3)])  # a short count is no error

    def truncate(self, size: int) -> None:
        os.truncate(self.path, size)

    def sync(self, number: int) -> None:
        size = self.path.stat().st_size
        if self.refuses():
            content = self.path.read_bytes()
            self.path.write_bytes(content[: self.durable] + bytes(size - self.durable))
            raise OSError(errno.EIO, "Input/output error")
        self.durable = size

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


@given(
    st.lists(st.sampled_from(["write", "write", "sync"]), max_size=30), st.lists(st.booleans(), max_size=30), st.data()
)
def test_no_line_is_lost_doubled_or_moved(tmp_path_factory, actions, plan, data):
    path, said = tmp_path_factory.mktemp("lines") / "lines", []
    path.write_bytes(b"before\n")
    lines = AppendOnly(path, said.append)
    lines._file.close()
    lines._file = disk = FlakyDisk(path, iter(plan))
    expected = [b"before\n"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.append.os, "fsync", disk.sync)
        patch.setattr(train.append, "SYNC_BYTES", data.draw(st.sampled_from([10, 50, 2**16])))
        for number, action in enumerate(actions):
            if action == "write":
                expected.append(f"line {number}\n".encode())
                lines.write(expected[-1])
            else:
                lines.sync()
        disk.plan = iter(())
        lines.close()
    assert path.read_bytes() == b"".join(expected)
    assert said == [line for pair in zip(said[::2], said[1::2], strict=True) for line in pair]  # in turns
    assert all("cannot" in line for line in said[::2])
    assert all("again" in line for line in said[1::2])


def test_a_disk_that_only_refuses_to_sync_does_not_work(tmp_path, monkeypatch):
    """As a full network file system does, which takes every line at first."""
    said, path = [], tmp_path / "lines"
    lines = AppendOnly(path, said.append)

    def refuse(number: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(train.append.os, "fsync", refuse)
        for number in range(4):
            lines.write(b"%d\n" % number)
            lines.sync()
    assert len(said) == 1
    lines.write(b"4\n")
    assert said[1:] == [f"{path} can be written again; nothing is missing"]
    assert path.read_bytes() == b"0\n1\n2\n3\n4\n"


def test_another_writer_loses_nothing(tmp_path):
    """The watch reports to `train.log`, too, in mid-run: long before and after a sync of 64 KiB."""
    path, said = tmp_path / "logs" / "train.log", []
    path.parent.mkdir()
    lines = AppendOnly(path, said.append)
    watch = Watch(tmp_path, ALONE, 60.0)
    expected, reports = [], []
    for number in range(2000):
        expected.append(b"line %4d, of which there are many, so that they fill the memory more than once\n" % number)
        lines.write(expected[-1])
        if number % 300 == 150:
            reports.append(f"report {number}\n" + "    a line of a stack\n" * 100 + "its end")
            watch._say(reports[-1])
    lines.close()
    watch.close()
    content = path.read_bytes()
    assert len(b"".join(expected)) > 2 * 2**16
    assert [line for line in content.splitlines(keepends=True) if line.startswith(b"line")] == expected
    found = re.findall(r"^\d{4}-\S+ (report.*?its end)$", content.decode(), flags=re.MULTILINE | re.DOTALL)
    assert found == reports
    assert said == []


@given(
    st.lists(st.sampled_from(["write", "write", "sync", "other"]), max_size=30),
    st.lists(st.booleans(), max_size=30),
    st.data(),
)
def test_no_line_of_two_writers_is_lost_while_the_disk_is_full(tmp_path_factory, actions, plan, data):
    path = tmp_path_factory.mktemp("lines") / "lines"
    lines = AppendOnly(path, lambda _: None)
    lines._file.close()
    lines._file = disk = FlakyDisk(path, iter(plan))
    own, others = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.append, "SYNC_BYTES", data.draw(st.sampled_from([10, 50, 2**16])))
        for number, action in enumerate(actions):
            if action == "write":
                own.append(f"line {number}\n".encode())
                lines.write(own[-1])
            elif action == "sync":
                lines.sync()
            else:
                others.append(f"report {number}\n".encode())
                with path.open("ab") as file:
                    file.write(others[-1])
        disk.plan = iter(())
        lines.close()
    content = path.read_bytes()
    assert all(report in content for report in others)  # one may follow a part of a line that the disk cut short
    found = content.splitlines(keepends=True)
    assert all(line in found for line in own)
    last = [len(found) - found[::-1].index(line) for line in own]
    assert last == sorted(last)
    if not others:
        assert found == own
