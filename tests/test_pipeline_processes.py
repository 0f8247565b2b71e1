"""Whole preparations as real processes: any number of workers, Ray, kills, a full disk, huge documents."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from prep_data import write_rows
from prep_runs import documents, english, kept, make_inputs, make_small, recipe_data, rejected, snapshot, times
from prep_runs import write_recipe as write

from prep.executors import LocalExecutor
from prep.recipe import load_recipe
from prep.run_recipe import run_recipe
from shards.errors import UserError

TESTS = Path(__file__).parent
PROGRAM = [sys.executable, str(TESTS / "prep_runs.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A recipe with every kind of stage, and what it ends in when nothing disturbs it: one worker, this process."""
    folder = tmp_path_factory.mktemp("expected")
    data = recipe_data(make_inputs(folder / "in", 90), folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        recipe = load_recipe(write(folder / "recipe.yaml", data))
        run_recipe(recipe, LocalExecutor(1), workers=1, say=lambda line: None)
    files = snapshot(folder / "out")
    names = {name.partition("/")[0] for name in files}
    assert names == {"before-dedup", "documents", "web", "rest", "report.json"}
    assert sum(name.startswith("documents/part-") for name in files) > 5
    assert "documents/duplicates.parquet" in files
    return data, files


def start(data: dict[str, Any], folder: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    """Run the recipe with its output in a folder, with small parts."""
    recipe = write(folder / "recipe.yaml", {**data, "output": str(folder / "out")})
    command = [*PROGRAM, "run", str(recipe), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, **pipes, **more)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and what it said on stderr."""
    _, said = process.communicate(timeout=400)
    return process.returncode, said


def finish_here(data: dict[str, Any], folder: Path) -> str:
    """Run the recipe to its end in this process, which saves seconds; what it said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr)
        recipe = load_recipe(write(folder / "recipe.yaml", {**data, "output": str(folder / "out")}))
        run_recipe(recipe, LocalExecutor(1), workers=1, say=said.append)
    return "\n".join(said)


def differing(folder: Path, files: dict[str, bytes]) -> set[str]:
    """Names of the files that are not as expected."""
    found = snapshot(folder)
    return {name for name in found.keys() | files.keys() if found.get(name) != files.get(name)}


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def is_worker(pid: int) -> bool:
    """Whether it is one of the processes that do the work."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def alive(pid: int) -> bool:
    """Whether a process runs; one that is only left to be waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait while the process runs."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the main process alone: none of its workers outlives it."""
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    process.communicate()


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of all parts that are done, and of their states."""
    found = times(folder) if folder.exists() else {}
    done = {name.replace("/state/", "/").removesuffix(".json") for name in found if "/state/part-" in name}
    return {
        name: value
        for name, value in found.items()
        if not name.endswith(".tmp")
        and (name.replace("/state/", "/").partition(".")[0] in done or "/state/part-" in name)
    }


def count_files(folder: Path) -> int:
    """Files below a folder, the unfinished ones too."""
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.mark.parametrize("workers", ["2", pytest.param("3", marks=pytest.mark.slow)])
def test_workers_decide_nothing(expected, tmp_path, workers):
    data, files = expected
    code, said = finish(start(data, tmp_path, "--workers", workers))
    assert code == 0, said
    assert differing(tmp_path / "out", files) == set()
    before = times(tmp_path / "out")
    said = finish_here(data, tmp_path)
    assert said.count("up to date") == 4
    assert times(tmp_path / "out") == before


@pytest.mark.slow
def test_ray_decides_nothing(expected, tmp_path):
    pytest.importorskip("ray")
    data, files = expected
    code, said = finish(start(data, tmp_path, "--executor", "ray", "--workers", "2"))
    assert code == 0, said
    assert differing(tmp_path / "out", files) == set()


def test_killed_and_gone_on_with(expected, tmp_path):
    """First a worker in the first pass, then the main process in the second."""
    data, files = expected
    out = tmp_path / "out"
    process = start(data, tmp_path, "--workers", "2")
    wait_until(lambda: len(list((out / "before-dedup" / "state").glob("part-*.json"))) >= 3, process)
    os.kill(next(pid for pid in sorted(descendants(process.pid)) if is_worker(pid)), signal.SIGKILL)
    code, said = finish(process)
    assert code == 2
    assert "a worker process died" in said
    assert "Traceback" not in said
    first = states(out)
    assert first
    process = start(data, tmp_path, "--workers", "2")
    wait_until(lambda: len(list((out / "documents" / "state").glob("part-*.json"))) >= 2, process)
    assert process.poll() is None, finish(process)
    kill(process)
    second = states(out)
    assert first.items() <= second.items()
    assert "were done before" in finish_here(data, tmp_path)
    assert second.items() <= states(out).items()
    assert differing(out, files) == set()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(expected, tmp_path):
    """Some files after the run went on, and some milliseconds; what is done stays, what comes out is the same."""
    data, files = expected
    rng = random.Random(11)
    out = tmp_path / "out"
    kills = 0
    done: dict[str, tuple[int, int]] = {}
    while kills < 20:
        wanted = count_files(out) + rng.randrange(70)
        process = start(data, tmp_path, "--workers", "2")
        wait_until(lambda wanted=wanted: count_files(out) > wanted, process)
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is None:
            kill(process)
            kills += 1
        else:
            code, said = finish(process)
            assert code == 0, said
            assert differing(out, files) == set()
        now = states(out)
        assert done.items() <= now.items()
        done = now
        if process.returncode == 0:  # from the beginning again
            shutil.rmtree(out)
            done = {}
    finish_here(data, tmp_path)
    assert done.items() <= states(out).items()
    assert differing(out, files) == set()


def test_the_disk_is_full(expected, tmp_path):
    """No file may grow beyond 30 KB; then there is room again."""
    data, files = expected
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out/documents: the disk is full .* What is finished is kept"):
            finish_here(data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    finish_here(data, tmp_path)
    assert differing(tmp_path / "out", files) == set()


@pytest.mark.slow
def test_the_disk_is_full_for_workers(expected, tmp_path):
    data, files = expected

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    code, said = finish(start(data, tmp_path, "--workers", "2", preexec_fn=small_disk))
    assert code == 2
    assert "the disk is full" in said
    assert "Traceback" not in said
    finish_here(data, tmp_path)
    assert differing(tmp_path / "out", files) == set()


DIES_ONCE = """
import sys
from pathlib import Path
from prep_runs import DieOnce, make_small
from prep.documents import Columns
from prep.executors import open_executor
from prep.pipeline import Work, run
from prep.recipe import build_steps, open_files
from prep.stage_folder import Limits
from prep.stages import Step
from prep.storage import Folder

executor, mark = sys.argv[1:]
make_small(setattr)
out = Folder("out")
steps = (Step(DieOnce(mark)), *build_steps("dedup", {"method": "exact"}, "dedup"))
work = Work("dies", (open_files(["a.jsonl"], Columns()),), steps, out, out.child("scratch"), "parquet", Limits())
with open_executor(executor, 2) as opened:
    run(work, opened, print)
"""


@pytest.mark.slow
def test_a_ray_worker_that_dies_is_replaced(tmp_path):
    pytest.importorskip("ray")
    write_rows(tmp_path / "a.jsonl", documents(1, 200))
    command = [sys.executable, "-c", DIES_ONCE, "ray", str(tmp_path / "died")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    texts = {row["text"].casefold() for row in documents(1, 200)}
    assert len(kept(tmp_path / "out")) == len({" ".join(text.split()) for text in texts})


def limited(tmp_path: Path, *arguments: str) -> tuple[int, str, int]:
    """Run `minigpt-prep` with its usual parts: exit status, stderr, and the peak memory of its largest process."""
    code = (
        "import resource, sys; from prep.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):\n"
        "        print('peak', resource.getrusage(who).ru_maxrss, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    peaks = [int(line.split()[1]) * 1024 for line in done.stderr.splitlines() if line.startswith("peak")]
    return done.returncode, done.stderr, max(peaks)


@pytest.mark.slow
def test_a_document_of_200_megabytes(tmp_path):
    text = "\n".join(english(seed, 200) for seed in range(4_300))
    text = (text * (200_000_000 // len(text) + 1))[:200_000_000]
    rows = [{"id": "huge", "text": text}, *documents(1, 50)]
    with (tmp_path / "a.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    for command in (
        ["filter", "a.jsonl", "--rule", "length.characters=10..1000000000", "--mask", "email"],
        ["dedup", "a.jsonl"],
    ):
        out = tmp_path / command[0]
        code, said, peak = limited(tmp_path, *command, "--out", str(out), "--workers", "1")
        assert code == 0, said
        found = {row["id"]: row["text"] for row in kept(out)}
        assert found["huge"] == text
        assert peak < 4_000_000_000, f"{command[0]}: {peak:,} bytes"
        print(f"{command[0]}: peak {peak:,} bytes for a document of {len(text):,}")


@pytest.mark.slow
def test_ten_million_empty_lines(tmp_path):
    rows = [json.dumps(row).encode() for row in documents(1, 50)]
    empty = b"\n" * 5_000_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(empty + b"\n".join(rows) + b"\n" + empty))
    (tmp_path / "b.csv").write_bytes(b"id,text\n" + empty + b"x,good text\n" + empty)
    begin = time.monotonic()
    code, said, peak = limited(
        tmp_path, "dedup", "a.jsonl.zst", "b.csv", "--out", "out", "--method", "exact", "--workers", "1"
    )
    assert code == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [source["documents"] for source in report["sources"]] == [50, 1]
    assert not any(row["stage"] == "read" for row in rejected(tmp_path / "out"))
    assert peak < 2_000_000_000
    assert time.monotonic() - begin < 120
    assert len(kept(tmp_path / "out")) > 30
