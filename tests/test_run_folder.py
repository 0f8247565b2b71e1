"""What a run prints, on a terminal and elsewhere."""

from __future__ import annotations

import os
import re
import select
import sys

import torch

from train.distributed import Ranks
from train.run_folder import RunFolder

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


def screen(output: str) -> list[str]:
    """Lines that a terminal shows: a carriage return goes back, ESC [ K erases to the end of the line."""
    lines, column = [""], 0
    for token in re.findall(r"\r\n|\n|\r|\x1b\[K|[^\r\n\x1b]+", output):
        if token in ("\n", "\r\n"):
            lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + token + lines[-1][column + len(token) :]
            column += len(token)
    return lines


def read_until(controller: int, ending: str) -> str:
    """What arrives at a terminal, which may take its time."""
    output = ""
    while not output.endswith(ending):
        ready, _, _ = select.select([controller], [], [], 20)
        assert ready, output
        output += os.read(controller, 4096).decode()
    return output


def test_the_status_line_on_a_terminal(tmp_path, monkeypatch):
    controller, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    with os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        folder = RunFolder(tmp_path, ALONE)
        folder.say("a line")
        for step in range(9, 12):
            folder.status(f"step {step}, a long text" + " that wraps" * step)
        folder.say("short")
        folder.status("step 12")
        shown = screen(read_until(controller, "step 12"))
        folder.say("the end")
        after = screen(read_until(controller, "the end\r\n"))
    os.close(controller)
    assert shown == ["a line", "short", "step 12"]
    assert after == ["the end", ""]
    assert [line.split(" ", 1)[1] for line in (tmp_path / "logs" / "train.log").read_text().splitlines()] == [
        "a line",
        "short",
        "the end",
    ]


def test_no_status_line_elsewhere(tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path, ALONE)
    folder.status("step 12")
    folder.say("a line")
    assert capsys.readouterr().out == "a line\n"
    other = RunFolder(tmp_path, Ranks(1, 2, CPU, None))
    other.say("nothing")
    other.status("nothing")
    assert capsys.readouterr().out == ""


def test_a_terminal_that_has_gone_does_not_end_a_run(tmp_path, monkeypatch):
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        folder = RunFolder(tmp_path, ALONE)
        os.close(controller)
        for number in range(3):
            folder.status(f"step {number}")
            folder.say(f"line {number}")
    assert len((tmp_path / "logs" / "train.log").read_text().splitlines()) == 3
