"""`minigpt-prep` as a user meets it: bad input, wrong options, dry runs, samples, help."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prep_data import small_tokenizer, write_rows
from prep_runs import documents, english, kept, make_small, rejected, times

import prep.filters.measures
from prep import cli

COMMANDS = ["run", "filter", "dedup", "decontaminate", "tokenize", "sample", "train-tokenizer", "train-classifier"]


@pytest.fixture
def prep_cli(tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own, in this process; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object, ok: bool = True) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["minigpt-prep", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        out, said = capsys.readouterr()
        assert code == (0 if ok else 2), said
        assert "Traceback" not in said
        return out, said

    return call


def one(prep_cli: Any, command: str, *arguments: object, ok: bool = True) -> tuple[str, str]:
    """A stage with one worker."""
    return prep_cli(command, *arguments, "--workers", 1, ok=ok)


KEEP_ALL = ("--rule", "length.characters=1..")


def test_every_kind_of_bad_row_is_set_aside_with_its_reason(prep_cli, tmp_path):
    good = [json.dumps({"id": f"g{n}", "text": f"good text {n}"}).encode() for n in range(5)]
    bad = {
        b"{no json": "not valid JSON",
        b'{"text": null}': "column 'text' is null",
        b'{"other": "x"}': "column 'text' is missing",
        b'{"text": 17}': "column 'text' holds a number, not text",
        b'{"text": ["a"]}': "column 'text' holds an array, not text",
        b'{"text": true}': "column 'text' holds true or false, not text",
        b"[1]": "the line holds an array, not an object",
        b'"text"': "the line holds text, not an object",
        b'{"text": "caf\xe9"}': "not UTF-8",
        b'{"text": "half \\ud83d"}': "a lone surrogate",
        b'{"id": {}, "text": "x"}': "id 'id' holds an object, not text or a whole number",
    }
    rows = [good[0]]
    for line in bad:
        rows += [line, b"", good[1]]
    write_rows(tmp_path / "a.jsonl", [*rows, good[4]])
    one(prep_cli, "filter", "a.jsonl", *KEEP_ALL, "--out", "out")
    assert len(kept(tmp_path / "out")) == 2 + len(bad)
    found = rejected(tmp_path / "out")
    assert {(row["stage"], row["rule"], row["source"]) for row in found} == {("read", "malformed", "a")}
    numbers = [2 + 3 * place for place in range(len(bad))]
    assert [row["id"] for row in found] == [f"a.jsonl:{number}" for number in numbers]
    for row, number, (line, reason) in zip(found, numbers, bad.items(), strict=True):
        assert row["detail"].startswith(f"a.jsonl, row {number}: ")
        assert reason in row["detail"]
        assert row["text"].startswith(line.decode("utf-8", "backslashreplace")[:8])
    out, _ = prep_cli("sample", "out", "--rule", "malformed", "-n", 20)
    assert "a.jsonl, row 2: not valid JSON" in out
    report = orjson.loads((tmp_path / "out" / "report.json").read_bytes())
    assert report["sources"][0]["malformed"] == len(bad)


def test_strange_text_comes_through_unchanged(prep_cli, tmp_path):
    """NUL bytes, control characters, emoji, right-to-left text, ids that come twice; empty documents are counted."""
    rows = [
        {"id": "same", "text": "a\0b\0"},
        {"id": "same", "text": "\ufeffwith a mark \u202e \r\n\x1b[31m"},
        {"id": "😀", "text": "😀" * 50},
        {"id": 7, "text": "عربي"},
        {"id": "empty", "text": ""},
        {"id": "", "text": "an empty id"},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    for command in (
        ["filter", *KEEP_ALL, "--mask", "email,ip,phone,secrets"],
        ["dedup"],
        ["dedup", "--method", "line"],
    ):
        out = tmp_path / f"{command[0]}-{len(command)}"
        one(prep_cli, *command, "a.jsonl", "--out", out)
        assert [row["text"] for row in kept(out)] == [row["text"] for row in rows if row["text"]]
        assert [row["id"] for row in kept(out)] == ["same", "same", "😀", "7", ""]
        assert orjson.loads((out / "report.json").read_bytes())["sources"][0]["empty"] == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file(prep_cli, tmp_path, suffix):
    rows = documents(1, 300)
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    packed = gzip.compress(raw) if suffix == ".gz" else zstandard.compress(raw)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) * 2 // 3])
    write_rows(tmp_path / "b.jsonl", documents(2, 20))
    command = ("filter", f"a.jsonl{suffix}", "b.jsonl", *KEEP_ALL, "--out", "out")
    _, said = one(prep_cli, *command, ok=False)
    assert f"a.jsonl{suffix}: truncated" in said
    assert "rows before the damage were read" in said
    assert "--keep-going" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    before = times(tmp_path / "out")
    one(prep_cli, *command, "--keep-going")
    now = times(tmp_path / "out")
    broken = {"part-00000.parquet", "state/part-00000.json"}  # the file may be whole by now: its part is tried again
    assert {name for name in before if now[name] != before[name]} <= broken
    found = kept(tmp_path / "out")
    read = [row["text"] for row in found if row["source"] == "a"]
    assert 50 < len(read) < 300
    assert read == [row["text"] for row in rows[: len(read)]]
    assert sum(row["source"] == "b" for row in found) == 20
    report = orjson.loads((tmp_path / "out" / "report.json").read_bytes())
    assert f"{len(read)} rows before" in report["broken"][0]


def test_damaged_parquet(prep_cli, tmp_path):
    table = pa.Table.from_pylist(documents(1, 300))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50, compression="none")
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2])
    _, said = one(prep_cli, "filter", "a.parquet", *KEEP_ALL, "--out", "out", ok=False)
    assert "a.parquet: not a readable Parquet file" in said
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=50, compression="zstd")
    raw = bytearray((tmp_path / "b.parquet").read_bytes())
    middle = len(raw) // 2
    raw[middle - 3_000 : middle + 3_000] = bytes(6_000)
    (tmp_path / "b.parquet").write_bytes(raw)
    _, said = one(prep_cli, "filter", "b.parquet", *KEEP_ALL, "--out", "out", ok=False)
    assert "b.parquet: row group" in said
    one(prep_cli, "filter", "b.parquet", *KEEP_ALL, "--out", "out", "--keep-going")
    left = [row["id"] for row in kept(tmp_path / "out")]
    assert 100 <= len(left) < 300
    assert left == [row["id"] for row in documents(1, 300) if row["id"] in set(left)]


def test_missing_columns_and_mixed_types(prep_cli, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"content": "x", "n": 1}])
    _, said = one(prep_cli, "filter", "a.jsonl", *KEEP_ALL, "--out", "out", ok=False)
    assert "a.jsonl: no column 'text'; columns found: content, n. Name one with --text-column" in said
    _, said = one(prep_cli, "filter", "a.jsonl", "--text-column", "n", *KEEP_ALL, "--out", "out", ok=False)
    assert "column 'n' holds a number, not text" in said
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    _, said = one(prep_cli, "filter", "numbers.parquet", *KEEP_ALL, "--out", "out", ok=False)
    assert "'text'" in said
    write_rows(tmp_path / "b.jsonl", [{"text": "b", "n": "one"}])
    mixed = ("a.jsonl", "b.jsonl", "--column", "n")
    write_rows(tmp_path / "a.jsonl", [{"text": "a", "n": 1}])
    _, said = one(prep_cli, "filter", *mixed, *KEEP_ALL, "--out", "out", ok=False)
    assert "'n'" in said
    assert "a.jsonl" in said
    assert "b.jsonl" in said
    write_rows(tmp_path / "b.jsonl", [{"text": "b", "n": 1.5}])  # whole numbers go into fractions
    write_rows(tmp_path / "c.jsonl", [{"text": "c"}])
    one(prep_cli, "filter", *mixed, "c.jsonl", *KEEP_ALL, "--out", "out")
    assert [row["n"] for row in kept(tmp_path / "out")] == [1.0, 1.5, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["filter", "a.jsonl", "--preset", "gofer"], "unknown preset 'gofer'; did you mean 'gopher'?"),
        (
            ["filter", "a.jsonl", "-p", "gopher", "-r", "gopher_quality.word_cont=5.."],
            "did you mean 'gopher_quality.word_count'?",
        ),
        (["filter", "a.jsonl", "-p", "gopher", "-r", "gopher_quality.word_count=some.."], "'some' is not a number"),
        (["filter", "a.jsonl", "-p", "gopher", "-r", "gopher_quality.word_count"], "is not NAME=LOW..HIGH"),
        (["filter", "a.jsonl", "-p", "gopher", "-r", "gopher_quality.word_count=9..1"], "is above high"),
        (["filter", "a.jsonl"], "nothing to filter by"),
        (["filter", "a.jsonl", "--classifier", "model"], "is not MODEL:LABEL:LOWEST_SCORE"),
        (["filter", "a.jsonl", "--classifier", "gone.bin:hq:0.5"], "gone.bin"),
        (["filter", "a.jsonl", "--words", "gone.txt"], "gone.txt"),
        (["filter", "a.jsonl", "--mask", "emial"], "did you mean 'email'?"),
        (["filter", "a.jsonl", "--language", "en:much"], "'much' is not a number"),
        (["filter", "gone.jsonl", "-p", "gopher"], "gone.jsonl: no such file or folder"),
        (["filter", "a.jsonl", "-p", "gopher", "--format", "csv"], "unknown output format 'csv'"),
        (["filter", "a.jsonl", "-p", "gopher", "--executor", "spark"], "unknown executor 'spark'"),
        (["dedup", "a.jsonl", "--threshold", "high"], "Invalid value for '--threshold'"),
        (["dedup", "a.jsonl", "--threshold", "1.5"], "threshold"),
        (["dedup", "a.jsonl", "--method", "minhsh"], "did you mean 'minhash'?"),
        (["dedup", "a.jsonl", "--keep", "longst"], "did you mean 'longest'?"),
        (["dedup", "a.jsonl", "--keep", "highest:score"], "'score'"),
        (["decontaminate", "a.jsonl", "--against", "gone.jsonl"], "gone.jsonl"),
        (["decontaminate", "a.jsonl", "--against", "a.jsonl", "--ngram", "1"], "ngram"),
    ],
)
def test_wrong_options(prep_cli, tmp_path, arguments, message):
    write_rows(tmp_path / "a.jsonl", documents(1, 20))
    _, said = one(prep_cli, *arguments, "--out", "out", ok=False)
    assert message in " ".join(said.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_too_many_bad_rows(prep_cli, tmp_path):
    rows: list[Any] = [{"text": f"text {n}"} for n in range(2_000)]
    rows[500:500] = [b"{bad"] * 60
    write_rows(tmp_path / "a.jsonl", rows)
    command = ("filter", "a.jsonl", *KEEP_ALL, "--out", "out")
    _, said = one(prep_cli, *command, ok=False)
    assert "60 of 2,060 rows are bad, more than --max-bad-rows 0.001" in said
    assert "minigpt-prep sample out --rejected --rule malformed" in said
    out, _ = prep_cli("sample", "out", "--rejected", "--rule", "malformed")
    assert "not valid JSON" in out
    before = times(tmp_path / "out")
    one(prep_cli, *command, "--max-bad-rows", 0.05)
    now = times(tmp_path / "out")
    assert {name: now[name] for name in before} == before
    assert len(kept(tmp_path / "out")) == 2_000


def test_nothing_is_left(prep_cli, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "short"}] * 3)
    _, said = one(prep_cli, "filter", "a.jsonl", "-p", "gopher", "--out", "out", ok=False)
    assert "no document is left of 3 rows" in said
    assert "minigpt-prep sample out --rejected" in said
    out, _ = prep_cli("sample", "out", "--rejected")
    assert "gopher_quality.word_count" in out
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for command in ("filter", "dedup"):
        options = KEEP_ALL if command == "filter" else ()
        _, said = one(prep_cli, command, "empty.jsonl", *options, "--out", command, ok=False)
        assert "empty.jsonl" in said or "no document" in said


def test_outputs_that_are_something_else(prep_cli, tmp_path):
    write_rows(tmp_path / "a.jsonl", documents(1, 30))
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    prep_cli("tokenize", "a.jsonl", "-t", "tokenizer.json", "-o", "tokens", "--workers", 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "part-00000.parquet").write_text("mine")
    before = times(tmp_path)
    for out, message in (
        ("tokens", "holds a token dataset"),
        ("file", "is a file"),
        ("foreign", "holds files that no stage of minigpt-prep has made"),
    ):
        for command in (["filter", *KEEP_ALL], ["dedup"], ["decontaminate", "--against", "tokenizer.json"]):
            if command[0] == "decontaminate":
                command[-1] = "a.jsonl:id"
                command += ["--min-words", "1", "--ngram", "2"]
            _, said = one(prep_cli, *command, "a.jsonl", "--out", out, ok=False)
            assert f"{out}: {message}" in said
    assert {name: value for name, value in times(tmp_path).items() if name in before} == before
    _, said = prep_cli("filter", "a.jsonl", *KEEP_ALL, ok=False)
    assert "--out: name the folder for the result" in said


def test_the_guard_on_the_command_line(prep_cli, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"id": n, "text": english(n % 100, 3)} for n in range(1_000)])
    _, said = one(prep_cli, "dedup", "a.jsonl", "--method", "exact", "--out", "out", ok=False)
    assert "dedup removes more than 50% of the documents of a:" in said
    assert ["a", "1,000", "900", "90.0%", "<-"] in [line.split() for line in said.splitlines()]
    assert "--max-removed 0.9 " in said
    one(prep_cli, "dedup", "a.jsonl", "--method", "exact", "--out", "out", "--max-removed", 0.9)
    assert len(kept(tmp_path / "out")) == 100


def test_statistics_are_not_measured_again(prep_cli, tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", documents(1, 80))
    one(prep_cli, "filter", "a.jsonl", "-p", "gopher", "--out", "direct")
    one(prep_cli, "filter", "a.jsonl", "-p", "gopher", "--stats-only", "--out", "stats")
    assert len(kept(tmp_path / "stats")) == 80
    assert kept(tmp_path / "stats")[0]["gopher_quality.word_count@1"] > 10
    real, asked = prep.filters.measures.statistics, []

    def statistics(batch, names):
        asked.extend(names)
        return real(batch, names)

    monkeypatch.setattr(prep.filters.measures, "statistics", statistics)
    one(prep_cli, "filter", "stats", "-p", "gopher", "--out", "again")
    assert asked == []
    assert [row["id"] for row in kept(tmp_path / "again")] == [row["id"] for row in kept(tmp_path / "direct")]
    reasons = [
        [(row["id"], row["rule"], row["value"], row["threshold"]) for row in rejected(tmp_path / name)]
        for name in ("again", "direct")
    ]
    assert reasons[0] == reasons[1]
    one(prep_cli, "filter", "stats", "-p", "gopher", "-r", "gopher_quality.word_count=..217", "--out", "other")
    assert asked == []


def test_a_dry_run(prep_cli, tmp_path):
    """Nothing is written; the funnel, rejects, and about what a run leaves."""
    rows = documents(1, 900)
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b").mkdir()
    for number, row in enumerate(documents(2, 300)):
        (tmp_path / "b" / f"{number:03}.txt").write_text(row["text"])
    before = times(tmp_path)
    out, _ = prep_cli("filter", "a.jsonl", "b", "-p", "gopher", "--dry-run", 200)
    assert times(tmp_path) == before
    assert "gopher_repetition.duplicate_lines" in out or "duplicate_lines" in out
    assert "The same line comes again" in out
    prep_cli("filter", "a.jsonl", "b", "-p", "gopher", "--out", "out", "--workers", 1)
    left = len(kept(tmp_path / "out"))
    from prep.documents import Columns
    from prep.dry_run import dry_run
    from prep.recipe import build_steps, open_files

    report, projection = dry_run(
        [open_files(["a.jsonl", "b"], Columns())], build_steps("filter", {"preset": "gopher"}, "x"), 200
    )
    assert [source["documents"] for source in report["sources"]] == [200, 200]
    assert projection["documents"] == pytest.approx(left, rel=0.2)
    size = sum(len(row["text"].encode()) for row in kept(tmp_path / "out"))
    assert projection["bytes"] == pytest.approx(size, rel=0.2)
    samples = [sample["rule"] for stage in report["stages"] for sample in stage["samples"]]
    assert samples
    assert all(samples.count(rule) <= 3 for rule in samples)


def test_samples(prep_cli, tmp_path, monkeypatch):
    make_small(monkeypatch.setattr)
    write_rows(tmp_path / "a.jsonl", [*documents(1, 120), b"{bad"])
    (tmp_path / "recipe.yaml").write_text(
        "name: x\noutput: out\nsources: [{name: a, path: a.jsonl}]\nmax_bad_rows: 0.5\n"
        "stages:\n- filter: {preset: gopher}\n- dedup: {method: exact}\n"
    )
    prep_cli("run", "recipe.yaml", "--workers", 1)
    out, _ = prep_cli("sample", "out", "-n", 3)
    assert out.count("── ") == 3
    out, _ = prep_cli("sample", "out", "--rejected", "-n", 400)
    for rule in ("malformed", "gopher_quality.word_count", "exact"):  # of all passes
        assert rule in out
    out, _ = prep_cli("sample", "out", "--rule", "exact", "-n", 2)
    assert "duplicate of 1-" in out
    out, _ = prep_cli("sample", "out/documents", "--rule", "exact", "-n", 2)
    assert "duplicate of 1-" in out
    _, said = prep_cli("sample", "out", "--rule", "exatc", ok=False)
    assert "unknown rule 'exatc'; did you mean 'exact'?" in said
    _, said = prep_cli("sample", "a.jsonl", ok=False)
    assert "not the folder of a stage" in said


def test_the_second_run_says_so_and_writes_nothing(prep_cli, tmp_path):
    write_rows(tmp_path / "a.jsonl", documents(1, 60))
    for command in (["filter", "-p", "gopher"], ["dedup"], ["dedup", "--method", "paragraph"]):
        out = tmp_path / "-".join(command)
        one(prep_cli, *command, "a.jsonl", "--out", out)
        before = times(out)
        _, said = one(prep_cli, *command, "a.jsonl", "--out", out)
        assert "up to date" in said
        assert times(out) == before


def test_explain_tells_the_need_without_an_input_and_with_one(prep_cli, tmp_path):
    out, _ = prep_cli("dedup", "--explain", "--bands", 14, "--rows", 8)
    assert "14 bands x 8 rows" in out
    assert "100,000,000" in out
    write_rows(
        tmp_path / "a.jsonl", [{"text": f"line {n} that is long enough to be looked at\nshort"} for n in range(5000)]
    )
    write_rows(tmp_path / "b.jsonl", documents(2, 20))
    for options, low, high in (
        (["a.jsonl"], 4900, 5100),
        (["a.jsonl", "--method", "line"], 4900, 5100),
        (["a.jsonl", "b.jsonl", "--method", "exact", "--reference", "a.jsonl"], 9800, 10_200),
    ):
        out, _ = prep_cli("dedup", "--explain", *options)
        assert low <= int(re.search(r"about ([\d,]+) ", out)[1].replace(",", "")) <= high, out
        assert ("14 bands" in out, "bands" in out) == (False, len(options) == 1)
    for options, message in (
        (["--threshold", 7], "less than or equal to 1"),
        (["--method", "line", "--bands", 3], "method line does not look at bands, which is for minhash"),
        (["--method", "lines"], "did you mean 'line'"),
        (["gone.jsonl"], "gone.jsonl: no such file"),
    ):
        _, said = prep_cli("dedup", "--explain", *options, ok=False)
        assert message in said
    _, said = prep_cli("dedup", "--out", "out", ok=False)
    assert "INPUT" in said
    _, said = prep_cli("dedup", "a.jsonl", "--out", "out", "--max-cut", 0.5, ok=False)
    assert "method minhash does not look at max_cut, which is for paragraph and line" in said


HELP = """
import json, sys
from prep import cli
import io, contextlib
found = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["minigpt-prep", *arguments, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, arguments
    found[" ".join(arguments)] = text.getvalue()
heavy = {"torch", "datasets", "transformers", "ray", "fasttext", "matplotlib", "numba", "pyarrow"} & sys.modules.keys()
print(json.dumps({"help": found, "heavy": sorted(heavy)}))
"""


def test_help_teaches_and_is_light():
    commands = [[], *([command] for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert all(command in found["help"][""] for command in COMMANDS)
    for command in COMMANDS:
        text = found["help"][command]
        assert "Examples" in text
        assert text.count(f"minigpt-prep {command}") >= 2, command
