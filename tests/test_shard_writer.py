"""The bytes of a dataset depend on its documents alone: not on batching, checkpoints, crashes or SIGKILL."""

import itertools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.open_shard
from shards.errors import UserError
from shards.verify import verify_dataset
from shards.writer import DatasetWriter

EOS = 7
TOKENIZER = b'{"model": {"vocab": {"a": 0}}}'


def settings_for(shard_tokens, vocab_size=1000):
    return {"tokenizer_json": TOKENIZER, "vocab_size": vocab_size, "eos_id": EOS, "shard_tokens": shard_tokens}


def make_documents(lengths, vocab_size=1000, seed=0):
    """One (tokens, id, source, text bytes) per length; the last token is EOS."""
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        tokens = rng.integers(0, vocab_size, length)
        tokens[-1] = EOS
        documents.append((tokens, f"document-{number}", ["web", "code", "maths"][rng.integers(3)], 4 * length))
    return documents


def append(writer, documents, dtype=np.uint32):
    tokens, ids, sources, sizes = zip(*documents, strict=True) if documents else ((), (), (), ())
    writer.append(
        np.concatenate([np.empty(0, int), *tokens]).astype(dtype),
        np.cumsum([len(t) for t in tokens], dtype=np.int64),
        pa.array(ids, pa.string()),
        pa.array(sources, pa.string()),
        np.array(sizes, np.int64),
    )


def finish(writer):
    return writer.finish(backend="test", recipe={"seed": 1})


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def write_straight(directory, documents, shard_tokens, **options):
    writer = DatasetWriter(Path(directory), **settings_for(shard_tokens, **options))
    append(writer, documents)
    finish(writer)
    return contents(directory)


document_lengths = st.lists(st.integers(1, 25), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(lengths=document_lengths, shard_tokens=st.integers(1, 40), vocab_size=st.sampled_from([1000, 2**16, 2**16 + 1]))
def test_files_hold_what_the_format_says(lengths, shard_tokens, vocab_size):
    """Parsed by hand, without the reader."""
    documents = make_documents(lengths, vocab_size)
    stream = np.concatenate([tokens for tokens, *_ in documents])
    ends = np.cumsum(lengths)
    dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    with tempfile.TemporaryDirectory() as folder:
        files = write_straight(folder, documents, shard_tokens, vocab_size=vocab_size)
        shard_count = -(-len(stream) // shard_tokens)
        kinds = ("shard-{:05d}.bin", "shard-{:05d}.idx", "documents-{:05d}.parquet")
        names = {kind.format(shard) for shard in range(shard_count) for kind in kinds}
        assert set(files) == names | {"dataset.json", "tokenizer.json"}
        assert files["tokenizer.json"] == TOKENIZER
        manifest = json.loads(files["dataset.json"])
        for shard in range(shard_count):
            offset = shard * shard_tokens
            expected = stream[offset : offset + shard_tokens]
            bin_bytes, idx_bytes = files[f"shard-{shard:05d}.bin"], files[f"shard-{shard:05d}.idx"]
            assert np.frombuffer(bin_bytes, dtype).tolist() == expected.tolist()
            inside = (ends > offset) & (ends <= offset + len(expected))
            shard_ends = (ends[inside] - offset).astype("<u4").tobytes()
            assert idx_bytes[64:] == shard_ends
            checksums = xxhash.xxh3_64_intdigest(bin_bytes), xxhash.xxh3_64_intdigest(shard_ends)
            width = np.dtype(dtype).itemsize
            header = (b"MGPTIDX1", 1, width, len(expected), int(inside.sum()), offset, *checksums, 0)
            assert struct.unpack("<8sIIQQQQQQ", idx_bytes[:64]) == header
            rows = pq.read_table(Path(folder) / f"documents-{shard:05d}.parquet").to_pylist()
            assert rows == [
                {"id": name, "source": source, "tokens": len(tokens)}
                for (tokens, name, source, _), here in zip(documents, inside, strict=True)
                if here
            ]
            assert manifest["shards"][shard] == {
                "tokens": len(expected),
                "documents": int(inside.sum()),
                "offset": offset,
                "bin_xxh3": f"{checksums[0]:016x}",
                "idx_xxh3": f"{checksums[1]:016x}",
            }
        assert list(manifest["sources"]) == sorted(manifest["sources"])
        for name in {source for _, _, source, _ in documents}:
            sizes = [len(tokens) for tokens, _, source, _ in documents if source == name]
            counts = {"documents": len(sizes), "tokens": sum(sizes), "text_bytes": 4 * sum(sizes)}
            assert manifest["sources"].pop(name) == counts
        assert not manifest["sources"]
        assert (manifest["tokens"], manifest["documents"]) == (len(stream), len(lengths))
        assert verify_dataset(folder).problems == ()


class Crash(BaseException):
    """The process dies here."""


class Crashes:
    """Counts file operations of the writer and dies, as by SIGKILL, before those whose numbers were given."""

    def __init__(self, monkeypatch):
        self.dies_at = set()
        self.count = 0
        for name in ("replace", "pwrite", "unlink"):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.watched(lambda descriptor: None))  # no power cut here, and it is slow
        write, write_table = shards.open_shard._GrowingFile.write, pq.write_table

        def torn_write(file, data):
            view = memoryview(data).cast("B")
            self.step(lambda: file.file.write(view[: len(view) // 2]))
            write(file, data)

        def torn_table(table, path, **options):
            self.step(lambda: Path(path).write_bytes(b"PAR1 torn"))
            write_table(table, path, **options)

        monkeypatch.setattr(shards.open_shard._GrowingFile, "write", torn_write)
        monkeypatch.setattr(pq, "write_table", torn_table)

    def watched(self, function):
        def step(*arguments, **options):
            self.step(lambda: None)
            return function(*arguments, **options)

        return step

    def step(self, last_act):
        self.count += 1
        if self.count in self.dies_at:
            last_act()
            raise Crash


def write_with_crashes(directory, batches, checkpoints, shard_tokens):
    """Append batches, checkpoint after those in `checkpoints`; after a crash go on from the last durable checkpoint."""
    state, following = None, 0
    while not (directory / "dataset.json").exists():
        try:
            if state:
                writer = DatasetWriter.resume(directory, json.loads(state), **settings_for(shard_tokens))
            else:
                writer = DatasetWriter(directory, **settings_for(shard_tokens))
            for number in range(following, len(batches)):
                append(writer, batches[number])
                if number in checkpoints:
                    state, following = json.dumps(writer.checkpoint()), number + 1
            finish(writer)
        except Crash:
            pass


def split(documents, cuts):
    borders = [0, *sorted(cut % (len(documents) + 1) for cut in cuts), len(documents)]
    return [documents[a:b] for a, b in itertools.pairwise(borders)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=document_lengths,
    shard_tokens=st.integers(3, 60),
    cuts=st.lists(st.integers(0, 100), max_size=8),
    checkpoints=st.sets(st.integers(0, 8)),
    dies_at=st.sets(st.integers(1, 150), max_size=6),
)
def test_batches_checkpoints_and_crashes_leave_no_trace(lengths, shard_tokens, cuts, checkpoints, dies_at):
    documents = make_documents(lengths)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        straight = write_straight(Path(folder) / "straight", documents, shard_tokens)
        Crashes(monkeypatch).dies_at = dies_at
        write_with_crashes(Path(folder) / "crashed", split(documents, cuts), checkpoints, shard_tokens)
        assert contents(Path(folder) / "crashed") == straight


def test_a_crash_before_any_single_file_operation(tmp_path, monkeypatch):
    """Documents that end on a shard border, one that fills three shards, a last shard that is exactly full."""
    documents = make_documents([4, 6, 3, 31, 1, 5, 10])
    batches = [documents[:1], documents[1:3], documents[3:4], documents[4:]]
    straight = write_straight(tmp_path / "straight", documents, shard_tokens=10)
    assert len([name for name in straight if name.endswith(".bin")]) == 6
    crashes = Crashes(monkeypatch)
    write_with_crashes(tmp_path / "uninterrupted", batches, {0, 2}, 10)
    operations = crashes.count
    assert operations > 50
    for operation in range(1, operations + 1):
        crashes.count, crashes.dies_at = 0, {operation, operation + 7}
        write_with_crashes(tmp_path / str(operation), batches, {0, 2}, 10)
        assert contents(tmp_path / str(operation)) == straight, f"died before operation {operation}"


WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_shard_writer import append, finish, make_documents, settings_for
from shards.files import write_atomic
from shards.writer import DatasetWriter

directory, progress = Path(sys.argv[1]), Path(sys.argv[2])
documents = make_documents([3000] * 400)
state, following = json.loads(progress.read_text()) if progress.exists() else (None, 0)
options = settings_for(200_000)
writer = DatasetWriter.resume(directory, state, **options) if state else DatasetWriter(directory, **options)
for number in range(following, 100):
    print(number, flush=True)
    append(writer, documents[4 * number : 4 * number + 4])
    if number % 4 == 3:
        write_atomic(progress, json.dumps([writer.checkpoint(), number + 1]))
finish(writer)
"""


def test_sigkill_at_random_moments(tmp_path):
    paths = [str(tmp_path / "killed"), str(tmp_path / "progress"), str(Path(__file__).parent)]
    moments, begun_at = random.Random(5), []
    while not (tmp_path / "killed" / "dataset.json").exists():
        worker = subprocess.Popen([sys.executable, "-c", WORKER, *paths], stdout=subprocess.PIPE)
        begun_at.append(int(worker.stdout.readline()))
        if len(begun_at) <= 5:
            for _ in range(moments.randrange(15)):
                worker.stdout.readline()
            time.sleep(moments.uniform(0, 0.003))
            worker.send_signal(signal.SIGKILL)
        worker.communicate()
        assert worker.returncode in (-signal.SIGKILL if len(begun_at) <= 5 else 0, 0)
    assert len(set(begun_at)) > 2  # it was killed, and went on from checkpoints
    straight = write_straight(tmp_path / "straight", make_documents([3000] * 400), 200_000)
    assert contents(tmp_path / "killed") == straight


def test_totals_grow_with_every_append(tmp_path):
    writer = DatasetWriter(tmp_path / "new" / "folder", **settings_for(10))
    documents = make_documents([4, 6, 25])
    append(writer, documents[:1])
    assert (writer.shards_finished, writer.tokens, writer.documents) == (0, 4, 1)
    append(writer, documents[1:2])
    assert (writer.shards_finished, writer.tokens, writer.documents) == (1, 10, 2)
    append(writer, [])
    append(writer, documents[2:])
    assert (writer.shards_finished, writer.tokens, writer.documents) == (3, 35, 3)


def test_uint16_and_uint32_input_give_the_same_files(tmp_path):
    documents = make_documents([30, 40])
    for dtype in (np.uint16, np.uint32):
        writer = DatasetWriter(tmp_path / np.dtype(dtype).name, **settings_for(32))
        append(writer, documents, dtype)
        finish(writer)
    assert contents(tmp_path / "uint16") == contents(tmp_path / "uint32")


@pytest.mark.parametrize(("vocab_size", "largest"), [(1000, 1000), (65_536, 65_536), (70_000, 70_000)])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, vocab_size, largest):
    writer = DatasetWriter(tmp_path, **settings_for(100, vocab_size))
    tokens, *rest = make_documents([5])[0]
    append(writer, [(tokens, *rest)])
    tokens[2] = largest  # as uint16, 65,536 would wrap to 0
    with pytest.raises(UserError, match=f"token id {largest:,} is not below the vocabulary size {vocab_size:,}"):
        append(writer, [(tokens, *rest)])
    assert (writer.tokens, writer.documents) == (5, 1)


def test_arrays_that_do_not_fit_together_are_refused(tmp_path):
    writer = DatasetWriter(tmp_path, **settings_for(100))
    tokens = np.array([1, 2, EOS, 3, EOS], np.uint32)
    names, sizes = pa.array(["a", "b"]), np.array([2, 1])
    for ends, wanted in (([3, 4], "rise strictly"), ([5, 5], "rise strictly"), ([2, 5], "not EOS"), ([5], "columns")):
        with pytest.raises(ValueError, match=wanted):
            writer.append(tokens, np.array(ends), names, names, sizes)
    with pytest.raises(ValueError, match="expected uint16 or uint32"):
        writer.append(tokens.astype(np.int64), np.array([3, 5]), names, names, sizes)
    with pytest.raises(ValueError, match="null"):
        writer.append(tokens, np.array([3, 5]), pa.array(["a", None]), names, sizes)
    writer.append(tokens, np.array([3, 5]), names, names, sizes)
    assert writer.documents == 2


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="shard_tokens"):
        DatasetWriter(tmp_path / "a", **settings_for(2**32))
    with pytest.raises(UserError, match="eos_id"):
        DatasetWriter(tmp_path / "a", **settings_for(10, vocab_size=7))
    with pytest.raises(UserError, match="no document"):
        finish(DatasetWriter(tmp_path / "a", **settings_for(10)))
    assert not (tmp_path / "a" / "dataset.json").exists()
    write_straight(tmp_path / "b", make_documents([3]), 10)
    with pytest.raises(UserError, match="holds a finished dataset"):
        DatasetWriter(tmp_path / "b", **settings_for(10))


def test_a_checkpoint_is_refused_with_other_settings_or_damaged_files(tmp_path):
    writer = DatasetWriter(tmp_path, **settings_for(10))
    append(writer, make_documents([4, 13]))
    state = writer.checkpoint()
    writer.close()
    with pytest.raises(UserError, match="begun with shard_tokens = 10, not 11"):
        DatasetWriter.resume(tmp_path, state, **settings_for(11))
    partial = tmp_path / "shard-00001.bin.tmp"
    content = partial.read_bytes()
    partial.write_bytes(content[:-1])
    with pytest.raises(UserError, match="shorter than at the checkpoint"):
        DatasetWriter.resume(tmp_path, state, **settings_for(10))
    partial.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match="changed since the checkpoint"):
        DatasetWriter.resume(tmp_path, state, **settings_for(10))
    partial.write_bytes(content)
    (tmp_path / "shard-00000.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.bin is missing"):
        DatasetWriter.resume(tmp_path, state, **settings_for(10))


def test_a_new_writer_clears_the_remains_of_another(tmp_path):
    straight = write_straight(tmp_path / "straight", make_documents([12]), 10)
    abandoned = DatasetWriter(tmp_path / "again", **settings_for(5))
    append(abandoned, make_documents([4, 50, 7]))
    (tmp_path / "again" / "notes.txt").write_text("mine")
    assert write_straight(tmp_path / "again", make_documents([12]), 10) == {**straight, "notes.txt": b"mine"}


def test_going_on_with_other_documents_leaves_nothing_of_the_first(tmp_path):
    documents = make_documents([4, 6, 10, 3])
    straight = write_straight(tmp_path / "straight", documents[:2], 10)
    writer = DatasetWriter(tmp_path / "cut", **settings_for(10))
    append(writer, documents[:2])
    state = writer.checkpoint()
    append(writer, documents[2:])
    finish_me = DatasetWriter.resume(tmp_path / "cut", state, **settings_for(10))
    finish(finish_me)
    assert contents(tmp_path / "cut") == straight


def test_row_groups_and_pages_do_not_depend_on_batches(tmp_path):
    """More rows than a Parquet page or row group holds."""
    documents = [(tokens, f"{name:0>200}", *rest) for tokens, name, *rest in make_documents([2] * 40_000)]
    straight = write_straight(tmp_path / "straight", documents, 60_000)
    assert pq.read_metadata(tmp_path / "straight" / "documents-00000.parquet").num_row_groups == 2
    writer = DatasetWriter(tmp_path / "batches", **settings_for(60_000))
    cuts = random.Random(1)
    for batch in split(documents, [cuts.randrange(40_000) for _ in range(30)]):
        append(writer, batch)
    finish(writer)
    assert contents(tmp_path / "batches") == straight


def test_disk_full_leaves_a_resumable_directory(tmp_path):
    """The kernel refuses to let any file grow beyond a limit; the same code path as a full disk."""
    documents = make_documents([400] * 30)
    straight = write_straight(tmp_path / "straight", documents, 5000)
    directory = tmp_path / "full"
    writer = DatasetWriter(directory, **settings_for(5000))
    append(writer, documents[:15])
    state = writer.checkpoint()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"full/shard-00001\.bin\.tmp: cannot be written \(File too large\).*same command"
        ):
            append(writer, documents[15:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for call in (writer.checkpoint, lambda: append(writer, documents[15:]), lambda: finish(writer)):
        with pytest.raises(RuntimeError, match="resume from the last checkpoint"):
            call()
    writer = DatasetWriter.resume(directory, state, **settings_for(5000))
    append(writer, documents[15:])
    finish(writer)
    assert contents(directory) == straight


def test_pending_rows_do_not_keep_the_batch_they_came_from(tmp_path):
    """Provenance of an open shard lies on disk, so memory does not grow with the shard."""
    writer = DatasetWriter(tmp_path, **settings_for(10**9))
    ids = pa.array([f"document-{number:01000d}" for number in range(1000)])
    tokens, ends = np.full(1000, EOS, np.uint16), np.arange(1, 1001)
    before = pa.total_allocated_bytes()
    for _ in range(50):
        writer.append(tokens, ends, ids, ids, ends)
    assert pa.total_allocated_bytes() - before < 5_000_000
    finish(writer)
    assert verify_dataset(tmp_path).problems == ()
