"""The tokenize run: what lies in the shards, for any number of workers, after kill -9, on bad input."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard
from prep_data import SHARED, prose, small_tokenizer, write_rows
from tokenizers import Tokenizer

import prep.jsonl
from prep.output import Output
from prep.tokens import Options, tokenize
from shards.errors import UserError
from shards.format import DEFAULT_SHARD_TOKENS
from shards.reader import TokenDataset
from shards.verify import verify_dataset

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
COMMAND = (
    "import sys, prep.documents; prep.documents.BLOCK_BYTES = int(sys.argv.pop(1)); from prep.cli import main; main()"
)
DOCUMENTS = [{"id": f"d{n}", "text": prose(n, 5 + n % 90)} for n in range(1_500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(small_tokenizer(SPECIALS))
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS)


def run(*arguments: str | Path, block_bytes: int = 8 << 20, **options: object) -> subprocess.CompletedProcess[str]:
    """`minigpt-prep tokenize` as a process of its own."""
    command = [sys.executable, "-c", COMMAND, str(block_bytes), "tokenize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def documents(folder: Path) -> list[tuple[str, list[int]]]:
    """(id, tokens) of all documents of a dataset."""
    with_dataset = TokenDataset(folder)
    stream = with_dataset.read(0, with_dataset.tokens).tolist()
    spans = with_dataset.documents_between(0, with_dataset.tokens)
    return [(span.id, stream[span.start : span.stop]) for span in spans]


def expected(tokenizer: Path, rows: list[dict[str, str]], eos: str = "<|endoftext|>") -> list[tuple[str, list[int]]]:
    reference = Tokenizer.from_file(str(tokenizer))
    reference.encode_special_tokens = True
    end = reference.token_to_id(eos)
    return [(row["id"], [*reference.encode(row["text"], add_special_tokens=False).ids, end]) for row in rows]


def test_tokens_are_those_of_tokenizers(tokenizer, source, tmp_path):
    summary = tokenize([str(source)], tokenizer, tmp_path / "out", Options(shard_tokens=5_000))
    assert documents(tmp_path / "out") == expected(tokenizer, DOCUMENTS)
    assert verify_dataset(tmp_path / "out").problems in ([], ())
    manifest = summary.train
    assert manifest.backend.startswith("fastokens ")
    assert (manifest.documents, manifest.dtype, manifest.eos_id, manifest.bos_id) == (1_500, "uint16", 0, None)
    text_bytes = sum(len(row["text"].encode()) for row in DOCUMENTS)
    assert manifest.sources == {"rows": {"documents": 1_500, "tokens": manifest.tokens, "text_bytes": text_bytes}}
    assert not (tmp_path / "out" / "progress.json").exists()


def test_books_with_the_gpt2_tokenizer(tmp_path):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    rows = []
    with (SHARED / "books.jsonl.zst").open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read(3_000_000)
    rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
    source = write_rows(tmp_path / "books.jsonl", rows)
    gpt2 = SHARED / "gpt2-tokenizer.json"
    summary = tokenize([str(source)], gpt2, tmp_path / "out")
    assert summary.train.backend.startswith("fastokens ")
    assert documents(tmp_path / "out") == expected(gpt2, rows)


def test_text_never_becomes_a_control_token(tokenizer, tmp_path):
    texts = ["<|endoftext|>", "a<|endoftext|>b<|im_start|>", "<s> <|im_end|><s>", "plain"]
    source = write_rows(tmp_path / "a.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    for bos in (None, "<s>"):
        out = tmp_path / f"out-{bos is None}"
        summary = tokenize([str(source)], tokenizer, out, Options(bos=bos))
        decode = Tokenizer.from_file(str(tokenizer))
        for (_, tokens), text in zip(documents(out), texts, strict=True):
            inner = tokens[1:-1] if bos else tokens[:-1]
            assert not set(inner) & {0, 1, 2, 3}
            assert decode.decode(inner) == text
            assert tokens[-1] == 0
            assert bos is None or tokens[0] == 3
        assert summary.counts.literal_specials == {"<|endoftext|>": 2, "<|im_start|>": 1, "<|im_end|>": 1, "<s>": 2}


def test_gpt2_end_of_text_in_a_document(tmp_path):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    source = write_rows(tmp_path / "a.jsonl", [{"text": "foo<|endoftext|>bar"}])
    summary = tokenize([str(source)], SHARED / "gpt2-tokenizer.json", tmp_path / "out")
    ((_, tokens),) = documents(tmp_path / "out")
    assert tokens == [21943, 27, 91, 437, 1659, 5239, 91, 29, 5657, 50256]
    assert summary.counts.literal_specials == {"<|endoftext|>": 1}


def test_same_bytes_for_any_number_of_workers(tokenizer, source, tmp_path):
    outputs = []
    for workers, block_bytes in ((1, 3_000), (5, 3_000), (2, 50_000)):
        out = tmp_path / f"out{len(outputs)}"
        options = ["--workers", workers, "--val-fraction", 0.1, "--shard-tokens", 7_000]
        done = run(source, "-t", tokenizer, "-o", out, *options, block_bytes=block_bytes)
        assert done.returncode == 0, done.stderr
        outputs.append(files(out))
    assert outputs[0] == outputs[1] == outputs[2]


def test_validation_part_by_hash_of_the_id(tokenizer, source, tmp_path):
    tokenize([str(source)], tokenizer, tmp_path / "out", Options(val_fraction=0.1))
    bound = math.ceil(0.1 * 2**64)
    rows = expected(tokenizer, DOCUMENTS)
    chosen = [xxhash.xxh3_64_intdigest(identity.encode()) < bound for identity, _ in rows]
    assert 100 < sum(chosen) < 200
    assert documents(tmp_path / "out" / "val") == [row for row, val in zip(rows, chosen, strict=True) if val]
    assert documents(tmp_path / "out") == [row for row, val in zip(rows, chosen, strict=True) if not val]
    shuffled = write_rows(tmp_path / "shuffled.jsonl", random.Random(0).sample(DOCUMENTS, len(DOCUMENTS)))
    tokenize([str(shuffled)], tokenizer, tmp_path / "other", Options(val_fraction=0.1))
    assert sorted(documents(tmp_path / "other" / "val")) == sorted(documents(tmp_path / "out" / "val"))


def test_an_empty_validation_part_is_said(tokenizer, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", DOCUMENTS[:3])
    notices: list[str] = []
    summary = tokenize([str(source)], tokenizer, tmp_path / "out", Options(val_fraction=1e-9), say=notices.append)
    assert summary.val is None
    assert "--val-fraction" in notices[-1]
    assert not (tmp_path / "out" / "val").exists()


def test_rerun_is_up_to_date_and_other_options_are_refused(tokenizer, source, tmp_path):
    out = tmp_path / "out"
    arguments = [source, "-t", tokenizer, "-o", out, "--val-fraction", "0.1"]
    assert run(*arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run(*arguments)
    assert (again.returncode, "up to date" in again.stdout) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other = run(*arguments[:-1], "0.2")
    assert other.returncode == 2
    assert "--val-fraction was 0.1 and is 0.2" in other.stderr
    assert "--overwrite" in other.stderr
    write_rows(source, DOCUMENTS[:1_000])
    assert "source 'rows' has changed" in run(*arguments).stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run(*arguments, "--overwrite").returncode == 0
    assert len(documents(out)) + len(documents(out / "val")) == 1_000


def test_overwrite_leaves_foreign_files_alone(tokenizer, source, tmp_path):
    out = tmp_path / "out"
    tokenize([str(source)], tokenizer, out, Options(val_fraction=0.1))
    (out / "notes.txt").write_text("mine")
    assert files(out / "val")
    tokenize([str(source)], tokenizer, out, Options(val_fraction=0.0), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "val").exists()


def test_touched_files_are_told_apart_from_changed_ones(tokenizer, source, tmp_path):
    out = tmp_path / "out"
    tokenize([str(source)], tokenizer, out)
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match=r"the files of source 'rows' have new times.*still 1 file"):
        tokenize([str(source)], tokenizer, out)
    source.write_bytes(source.read_bytes() + b'{"text":"x"}\n')
    with pytest.raises(UserError, match=r"source 'rows' has changed \(was 1 file"):
        tokenize([str(source)], tokenizer, out)


def test_overwrite_keeps_the_progress_of_the_same_run(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr(prep.jsonl, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(prep.jsonl, "PIECE_BYTES", 5_000)
    out, whole, options = tmp_path / "out", tmp_path / "whole", Options(shard_tokens=9_000)
    tokenize([str(source)], tokenizer, whole, options)
    take, blocks = Output.take, 0

    def interrupted(self: Output, *arguments: object) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 30:
            raise KeyboardInterrupt
        take(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Output, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenize([str(source)], tokenizer, out, options)
    assert progress(out)
    notices: list[str] = []
    tokenize([str(source)], tokenizer, out, options, overwrite=True, say=notices.append)
    assert "going on behind" in notices[0]
    assert files(out) == files(whole)
    summary = tokenize([str(source)], tokenizer, out, options, overwrite=True)  # finished: made once more
    assert not summary.up_to_date
    assert files(out) == files(whole)


def test_a_damaged_run_is_overwritten(tokenizer, source, tmp_path):
    out = tmp_path / "out"
    tokenize([str(source)], tokenizer, out)
    (out / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: damaged.*--overwrite"):
        tokenize([str(source)], tokenizer, out)
    tokenize([str(source)], tokenizer, out, overwrite=True)
    assert tokenize([str(source)], tokenizer, out).up_to_date


def test_a_second_process_is_turned_away(tokenizer, tmp_path):
    rows = [{"id": f"d{n}", "text": prose(n, 40 + n % 200)} for n in range(6_000)]
    arguments = [write_rows(tmp_path / "a.jsonl", rows), "-t", tokenizer, "--shard-tokens", "9000"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-c", COMMAND, "20000", "tokenize", *map(str, arguments), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not progress(out):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # it is in the middle, and stays there
    try:
        assert not (out / "dataset.json").exists()
        before = files(out)
        for more in ([], ["--overwrite"], ["--bos", "<s>", "--overwrite"]):
            second = run(*arguments, "-o", out, *more)
            assert second.returncode == 2
            assert f"{out}: another process is writing here" in second.stderr
        assert files(out) == before
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert run(*arguments, "-o", whole).returncode == 0
    assert files(out) == files(whole)


def test_what_a_folder_leaves_out_is_in_the_table_and_the_recipe(tokenizer, tmp_path):
    folder, out = tmp_path / "corpus", tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("read me")
    write_rows(folder / "train.json", [{"text": "a"}])
    (folder / "x.foo").write_text("?")
    done = run(folder, "-t", tokenizer, "-o", out)
    assert done.returncode == 0
    assert "left out of folders     1 × .foo, 1 × .json" in done.stdout
    assert done.stderr.count("left out") == 1
    assert f"give '{folder}/*.json'" in done.stderr
    recipe = json.loads((out / "dataset.json").read_bytes())["recipe"]
    assert recipe["left_out"] == [{"folder": "corpus", "files": {".foo": 1, ".json": 1}}]
    assert "left out" in run(folder, "-t", tokenizer, "-o", out).stderr  # also when up to date


def test_validation_documents_do_not_depend_on_the_spelling_of_the_path(tokenizer, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in DOCUMENTS])
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "rows.jsonl", [{"text": row["text"]} for row in DOCUMENTS[:300]])
    monkeypatch.chdir(tmp_path / "more")
    options = Options(val_fraction=0.1)
    tokenize([f"{tmp_path}/rows.jsonl", f"{tmp_path}/more/rows.jsonl"], tokenizer, tmp_path / "a", options)
    tokenize(["../rows.jsonl", "rows.jsonl"], tokenizer, tmp_path / "b", options)
    assert files(tmp_path / "a") == {**files(tmp_path / "b"), "run.json": files(tmp_path / "a")["run.json"]}
    assert documents(tmp_path / "a" / "val")


def test_killed_at_random_moments_and_resumed(tokenizer, tmp_path):
    rows = [{"id": f"d{n}", "text": prose(n, 40 + n % 200)} for n in range(6_000)]
    rows = [b"{bad" if n % 900 == 7 else row for n, row in enumerate(rows)]
    plain = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes().replace(b'"d', b'"e')))
    options = ["--val-fraction", "0.2", "--shard-tokens", "9000", "--max-bad-rows", "0.1"]

    def arguments(out: Path) -> list[str | Path]:
        return [tmp_path / "in", "-t", tokenizer, "-o", out, *options]

    whole, out = tmp_path / "whole", tmp_path / "out"
    done = run(*arguments(whole), block_bytes=20_000)
    assert done.returncode == 0, done.stderr
    generator = random.Random(1)
    command = [sys.executable, "-c", COMMAND, "20000", "tokenize", *map(str, arguments(out))]
    positions = []
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = progress(out)
        while process.poll() is None and progress(out) == before:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed ten times"
        positions.append(tuple(progress(out) or (0, 0)))
    assert len(set(positions)) == 10
    assert positions == sorted(positions)
    resumed = run(*arguments(out), block_bytes=20_000)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on behind" in resumed.stderr
    assert files(out) == files(whole)
    assert any(name.startswith("rejected/part-") for name in files(out))
    assert verify_dataset(out).problems in ([], ())


def progress(out: Path) -> list[int] | None:
    """The position in the input of the last checkpoint."""
    try:
        return json.loads((out / "progress.json").read_bytes())["position"]
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("moment", ["before val", "before train", "before the end"])
def test_interrupted_while_finishing(tokenizer, source, tmp_path, monkeypatch, moment):
    from prep import output
    from shards.writer import DatasetWriter

    options = Options(val_fraction=0.1, shard_tokens=9_000)
    tokenize([str(source)], tokenizer, tmp_path / "whole", options)
    finish, calls = DatasetWriter.finish, {"before val": 0, "before train": 1, "before the end": 2}[moment]

    def failing(self: DatasetWriter, **arguments: object) -> object:
        nonlocal calls
        if calls == 0:
            raise KeyboardInterrupt
        calls -= 1
        return finish(self, **arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        if moment == "before the end":
            patch.setattr(output.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(DatasetWriter, "finish", failing)
        with pytest.raises(KeyboardInterrupt):
            tokenize([str(source)], tokenizer, tmp_path / "out", options)
    tokenize([str(source)], tokenizer, tmp_path / "out", options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_file_stops_at_the_end_and_can_be_accepted(tokenizer, source, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(prep.jsonl, "BLOCK_BYTES", 5_000)
    data = source.read_bytes()
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.compress(data)
    broken = tmp_path / f"rows.jsonl{suffix}"
    broken.write_bytes(packed[: len(packed) * 2 // 3])
    other = write_rows(tmp_path / "z.jsonl", [{"id": "last", "text": "the last one"}])
    arguments, out = [str(broken), str(other)], tmp_path / "out"
    notices: list[str] = []
    with pytest.raises(UserError, match=r"(?s)rows\.jsonl.*truncated.*--keep-going"):
        tokenize(arguments, tokenizer, out, say=notices.append)
    assert "truncated" in notices[0]
    assert not (out / "dataset.json").exists()
    summary = tokenize(arguments, tokenizer, out, keep_going=True)
    assert len(summary.counts.broken) == 1
    found = documents(out)
    assert found[-1][0] == "last"
    assert found[:-1] == expected(tokenizer, DOCUMENTS)[: len(found) - 1]
    assert len(found) > 500
    assert summary.train.recipe["counts"]["broken"] == summary.counts.broken


def test_too_many_bad_rows_stop_the_run_and_a_higher_limit_goes_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prep.jsonl, "BLOCK_BYTES", 20_000)
    rows = [row if n % 100 else b"{" for n, row in enumerate(DOCUMENTS)]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows are bad, more than --max-bad-rows 0\.001"):
            tokenize([str(source)], tokenizer, out)
    assert not (out / "dataset.json").exists()
    summary = tokenize([str(source)], tokenizer, out, max_bad_rows=0.02)
    assert (summary.counts.bad, summary.counts.rows, summary.counts.documents) == (15, 1_500, 1_485)
    parts = sorted((out / "rejected").iterdir())
    rejected = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert [row["row"] for row in rejected] == list(range(1, 1_500, 100))
    assert rejected[0]["file"] == str(source)
    assert "not valid JSON" in rejected[0]["reason"]
    assert documents(out) == expected(tokenizer, [row for row in rows if isinstance(row, dict)])


def test_few_bad_rows_of_a_small_file_do_not_stop(tokenizer, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [*DOCUMENTS[:50], b"{", {"text": ""}])
    counts = tokenize([str(source)], tokenizer, tmp_path / "out").counts
    assert (counts.documents, counts.bad, counts.empty, counts.rows) == (50, 1, 1, 52)


@pytest.mark.parametrize("rows", [[], [{"text": ""}], [b"{", b"}"]])
def test_no_document_is_an_error(tokenizer, tmp_path, rows):
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="no document in the input"):
        tokenize([str(source)], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_mistakes_on_the_command_line(tokenizer, source, tmp_path):
    out = tmp_path / "out"
    for arguments, message in [
        ([tmp_path / "gone.jsonl", "-t", tokenizer], "no such file or folder"),
        ([source, "-t", tmp_path / "gone.json"], "cannot be read"),
        ([source, "-t", source], "not a tokenizer.json"),
        ([source, "-t", tokenizer, "--eos", "<|nope|>"], "--eos: unknown control token"),
        ([source, "-t", tokenizer, "--text-column", "body"], "columns found: id, text"),
        ([source, "-t", tokenizer, "--val-fraction", "1.5"], "--val-fraction"),
        ([source, "-t", tokenizer, "--shard-tokens", "0"], "shard_tokens"),
    ]:
        done = run(*arguments, "-o", out)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert run(source, "-t", tokenizer, "-o", out).returncode == 0  # none of the mistakes is in the way


def test_output_inside_the_input_folder_is_not_read(tokenizer, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*DOCUMENTS[:100], b"{"])
    tokenize([str(tmp_path)], tokenizer, tmp_path / "out")
    assert tokenize([str(tmp_path)], tokenizer, tmp_path / "out").up_to_date


def test_disk_full_is_one_message_and_resumable(tokenizer, tmp_path):
    rows = [{"id": str(n), "text": prose(n, 300)} for n in range(1_500)]
    source, out, whole = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", tmp_path / "whole"

    def small_files() -> None:  # a write beyond the limit fails as it does on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    arguments = [source, "-t", tokenizer, "--shard-tokens", 250_000]
    failed = run(*arguments, "-o", out, block_bytes=200_000, preexec_fn=small_files)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert str(out) in failed.stderr
    assert not (out / "dataset.json").exists()
    assert run(*arguments, "-o", out).returncode == 0
    assert run(*arguments, "-o", whole).returncode == 0
    assert files(out) == files(whole)


def test_no_heavy_imports():
    code = "import sys, prep.cli; print({'numpy', 'pyarrow'} & set(sys.modules) or 'none')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "none"
    heavy = {"torch", "datasets", "transformers", "numba"}
    code = f"import sys, prep, prep.cli, prep.tokens; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.skipif(os.environ.get("COLUMNS") == "0", reason="no terminal width")
def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "prep.cli", "tokenize", "--help"], capture_output=True, text=True)
    assert "Examples" in done.stdout
    assert "minigpt-prep tokenize books.jsonl.zst" in done.stdout
    assert f"2^{DEFAULT_SHARD_TOKENS.bit_length() - 1}" in done.stdout


@pytest.mark.slow
def test_all_books_document_by_document(tmp_path):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    gpt2, books = SHARED / "gpt2-tokenizer.json", SHARED / "books.jsonl.zst"
    tokenize([str(books)], gpt2, tmp_path / "out")
    with books.open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    assert documents(tmp_path / "out") == expected(gpt2, [json.loads(line) for line in data.splitlines()])
    shutil.rmtree(tmp_path / "out")
