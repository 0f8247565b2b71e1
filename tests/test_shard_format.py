"""Reading a dataset: the stream against brute force, and every kind of damage refused with file and advice."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import shards.verify
from shards.errors import UserError
from shards.format import Manifest, dataset_fingerprint, pack_header, token_dtype, tokenizer_hash, unpack_header
from shards.reader import Document, TokenDataset
from shards.verify import verify_dataset
from shards.writer import DatasetWriter

EOS = 0
TOKENIZER = '{"b": [1, 2.5], "a": "ü"}'.encode()


def write(directory, lengths, shard_tokens, vocab_size=500):
    """A dataset of documents of the given lengths; returns its stream."""
    ends = np.cumsum(lengths)
    stream = np.random.default_rng(0).integers(1, vocab_size, ends[-1]).astype(np.uint32)
    stream[ends - 1] = EOS
    ids = pa.array([f"document-{number}" for number in range(len(lengths))])
    sources = pa.array([("web", "code")[number % 2] for number in range(len(lengths))])
    options = {"tokenizer_json": TOKENIZER, "vocab_size": vocab_size, "eos_id": EOS, "shard_tokens": shard_tokens}
    writer = DatasetWriter(directory, **options)
    writer.append(stream, ends, ids, sources, ends)
    writer.finish(backend="test", recipe={"inputs": ["ä.jsonl"]})
    return stream


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Documents that cross borders, end on one (10), and fill shards of their own (25 tokens)."""
    directory = tmp_path_factory.mktemp("data") / "set"
    write(directory, [4, 6, 25, 3, 9, 8], 10)
    return directory


@pytest.fixture
def dataset(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "set")


def test_token_dtype_changes_behind_65536_ids():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_tokenizer_hash_sees_content_not_formatting():
    assert tokenizer_hash(TOKENIZER) == tokenizer_hash(b'{\n  "a": "\\u00fc",\n  "b": [1, 2.5]\n}')
    assert tokenizer_hash(TOKENIZER) != tokenizer_hash(TOKENIZER.replace(b"2.5", b"2.6"))
    with pytest.raises(UserError, match="not valid JSON"):
        tokenizer_hash(b"{")


def test_fingerprint_depends_on_data_and_tokenizer_alone(pristine, tmp_path):
    manifest = Manifest.read(pristine)
    write(tmp_path / "again", [4, 6, 25, 3, 9, 8], 10)
    assert Manifest.read(tmp_path / "again").fingerprint == manifest.fingerprint
    others = [("uint32", manifest.tokenizer_hash, manifest.shards), ("uint16", "other", manifest.shards)]
    write(tmp_path / "borders", [4, 7, 24, 3, 9, 8], 10)  # other document borders
    others.append(("uint16", manifest.tokenizer_hash, Manifest.read(tmp_path / "borders").shards))
    assert len({manifest.fingerprint, *(dataset_fingerprint(*other) for other in others)}) == 4


def test_manifest_survives_writing_and_reading(pristine, tmp_path):
    manifest = Manifest.read(pristine)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert (tmp_path / "dataset.json").read_bytes() == (pristine / "dataset.json").read_bytes()
    assert "ä.jsonl" in (tmp_path / "dataset.json").read_text()
    assert (manifest.dtype, manifest.tokens, manifest.documents) == ("uint16", 55, 6)


def test_header_survives_packing(pristine):
    entry = Manifest.read(pristine).shards[3]
    assert unpack_header(pack_header(entry, 2), pristine, 2) == entry


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_strategy, shard_tokens=st.integers(1, 40), vocab_size=st.sampled_from([500, 70_000]))
def test_stream_against_brute_force(tmp_path_factory, lengths, shard_tokens, vocab_size):
    directory = tmp_path_factory.mktemp("stream")
    stream = write(directory, lengths, shard_tokens, vocab_size)
    ends = np.cumsum(lengths)
    data = TokenDataset(directory)
    assert (data.tokens, data.documents, data.vocab_size) == (len(stream), len(lengths), vocab_size)
    rng = np.random.default_rng(1)
    ranges = [(0, len(stream)), (0, 0), (len(stream), len(stream))]
    ranges += [tuple(sorted(rng.integers(0, len(stream) + 1, 2).tolist())) for _ in range(30)]
    for start, stop in ranges:
        read = data.read(start, stop)
        assert read.dtype == data.dtype
        assert read.tolist() == stream[start:stop].tolist()
        found = data.document_ends(start, stop)
        assert found.dtype == np.int64
        assert found.tolist() == ends[(ends > start) & (ends <= stop)].tolist()
        assert data.documents_between(start, stop) == [
            Document(f"document-{number}", ("web", "code")[number % 2], end - length, end)
            for number, (length, end) in enumerate(zip(lengths, ends.tolist(), strict=True))
            if start < stop and end - length < stop and end > start
        ]
    for start, stop in ((-1, 1), (2, 1), (0, len(stream) + 1)):
        for method in (data.read, data.document_ends, data.documents_between):
            with pytest.raises(IndexError, match=f"stream of {len(stream)}"):
                method(start, stop)


def test_documents_are_found_across_row_groups(tmp_path):
    write(tmp_path, [2] * 40_000, 2**17)
    data = TokenDataset(tmp_path)
    for first in (0, 16_382, 32_767, 39_990):
        found = data.documents_between(2 * first + 1, 2 * first + 8)
        assert [document.id for document in found] == [f"document-{first + k}" for k in range(4)]
        assert [document.start for document in found] == [2 * (first + k) for k in range(4)]


def test_shards_are_read_only_maps_that_outlive_close(pristine):
    data = TokenDataset(str(pristine))
    shard = data.shard(1)
    assert data.shard(1) is shard
    with pytest.raises(ValueError, match="read-only"):
        shard[0] = 1
    expected = shard.tolist()
    data.close()
    assert shard.tolist() == expected
    assert data.read(10, 20).tolist() == expected


def test_pickling_sends_the_path_not_the_tokens(pristine):
    data = TokenDataset(pristine)
    data.read(0, data.tokens)
    sent = pickle.dumps(data)
    assert len(sent) < 500
    assert pickle.loads(sent).read(0, 55).tolist() == data.read(0, 55).tolist()


def test_tokenizer_is_kept_byte_for_byte(dataset):
    assert TokenDataset(dataset).tokenizer_json() == TOKENIZER
    (dataset / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(UserError, match="not the tokenizer that made this dataset"):
        TokenDataset(dataset).tokenizer_json()


def test_training_does_not_need_the_documents(dataset):
    expected = TokenDataset(dataset).read(0, 55).tolist()
    for path in dataset.glob("documents-*"):
        path.unlink()
    data = TokenDataset(dataset)
    assert data.read(0, 55).tolist() == expected
    assert data.document_ends(0, 55).tolist() == [4, 10, 35, 38, 47, 55]
    with pytest.raises(UserError, match=r"documents-00000\.parquet is missing"):
        data.documents_between(0, 1)


def edit(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def flip(position):
    def change(content):
        content[position] ^= 1

    return change


def set_field(directory, **fields):
    path = directory / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# what is done to the dataset, and what opening it then says; verifying must say the same
REFUSED = {
    "no manifest": (
        lambda d: (d / "dataset.json").unlink(),
        r"has no dataset\.json: the dataset is unfinished or the path is wrong; run the same minigpt-prep tokenize",
    ),
    "cut manifest": (lambda d: edit(d / "dataset.json", lambda c: c[:-20]), r"dataset\.json: not valid JSON"),
    "other JSON": (lambda d: (d / "dataset.json").write_text("[]"), "not the manifest of a minigpt dataset"),
    "newer manifest": (lambda d: set_field(d, format_version=2), r"format version 2 is newer .*update minigpt"),
    "unknown field": (lambda d: set_field(d, extra=1), r"damaged manifest .*extra"),
    "wrong total": (lambda d: set_field(d, tokens=56), "add up to 55 tokens and 6 documents, its totals say 56 and 6"),
    "wrong dtype": (lambda d: set_field(d, dtype="uint32"), "dtype uint32 with a vocabulary of 500"),
    "wrong type": (lambda d: set_field(d, shard_tokens="10"), "damaged manifest"),
    "no shards": (lambda d: set_field(d, shards=[]), "damaged manifest"),
    "bin missing": (
        lambda d: (d / "shard-00001.bin").unlink(),
        r"shard-00001\.bin is missing, but dataset\.json",
    ),
    "idx missing": (lambda d: (d / "shard-00005.idx").unlink(), r"shard-00005\.idx is missing"),
    "bin cut": (lambda d: edit(d / "shard-00002.bin", lambda c: c[:-2]), r"shard-00002\.bin: 18 bytes, .* says 20"),
    "bin longer": (lambda d: edit(d / "shard-00005.bin", lambda c: c + c), r"shard-00005\.bin: 20 bytes, .* says 10"),
    "idx cut": (lambda d: edit(d / "shard-00003.idx", lambda c: c[:-4]), r"shard-00003\.idx: 68 bytes, .* says 72"),
    "header cut": (lambda d: edit(d / "shard-00003.idx", lambda c: c[:40]), "40 bytes, too short for an index header"),
    "magic": (lambda d: edit(d / "shard-00003.idx", flip(0)), "not a minigpt shard index"),
    "newer idx": (lambda d: edit(d / "shard-00003.idx", flip(9)), "index version 257 is newer .*update minigpt"),
    "token width": (lambda d: edit(d / "shard-00003.idx", flip(14)), "65538 bytes per token, expected 2"),
    "header offset": (
        lambda d: edit(d / "shard-00003.idx", flip(32)),
        r"header disagrees with dataset\.json \(offset 31, not 30\)",
    ),
    "another shard": (
        lambda d: shutil.copy(d / "shard-00001.idx", d / "shard-00002.idx"),
        r"shard-00002\.idx: the header disagrees with dataset\.json \(offset 10, not 20; bin_xxh3",
    ),
    "not a folder": (lambda d: (shutil.rmtree(d), d.write_text("")), r"has no dataset\.json"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_damage_that_opening_refuses(dataset, damage):
    act, message = REFUSED[damage]
    assert verify_dataset(dataset).problems == ()
    act(dataset)
    with pytest.raises(UserError, match=message) as caught:
        TokenDataset(dataset)
    assert str(caught.value) in verify_dataset(dataset).problems


def seal(directory, shard):
    """Recompute the checksums of a shard, so that only its meaning is wrong."""
    path = directory / "dataset.json"
    fields = json.loads(path.read_text())
    idx = directory / f"shard-{shard:05d}.idx"
    entry = fields["shards"][shard]
    entry["bin_xxh3"] = xxhash.xxh3_64_hexdigest((directory / f"shard-{shard:05d}.bin").read_bytes())
    entry["idx_xxh3"] = xxhash.xxh3_64_hexdigest(idx.read_bytes()[64:])
    path.write_text(json.dumps(fields))
    manifest = Manifest.read(directory)
    set_field(directory, fingerprint=dataset_fingerprint(manifest.dtype, manifest.tokenizer_hash, manifest.shards))
    idx.write_bytes(pack_header(manifest.shards[shard], 2) + idx.read_bytes()[64:])


def set_tokens(directory, shard, position, token):
    path = directory / f"shard-{shard:05d}.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[position] = token
    tokens.tofile(path)
    seal(directory, shard)


def set_rows(directory, shard, change):
    path = directory / f"documents-{shard:05d}.parquet"
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


FOUND = {
    "bin flipped": (lambda d: edit(d / "shard-00002.bin", flip(7)), r"shard-00002\.bin: the checksum differs"),
    "idx flipped": (lambda d: edit(d / "shard-00003.idx", flip(-4)), r"shard-00003\.idx: the checksum differs"),
    "largest id": (lambda d: set_tokens(d, 2, 3, 500), r"shard-00002\.bin: token id 500 is not below .* size 500"),
    "no EOS": (lambda d: set_tokens(d, 3, 4, 9), r"shard-00003\.bin: a document ends without EOS \(id 0\)"),
    "no EOS at the border": (lambda d: set_tokens(d, 0, 9, 9), r"shard-00000\.bin: a document ends without EOS"),
    "ends fall": (
        lambda d: (edit(d / "shard-00000.idx", lambda c: c[:64] + c[68:72] + c[64:68]), seal(d, 0)),
        r"shard-00000\.idx: document ends do not rise",
    ),
    "stream open": (
        lambda d: (edit(d / "shard-00005.idx", lambda c: c[:64] + b"\4\0\0\0"), seal(d, 5)),
        "the last document ends at token 54 of 55",
    ),
    "rows missing": (lambda d: set_rows(d, 0, lambda r: r[:1]), r"documents-00000\.parquet: 1 rows, but 2 documents"),
    "row length": (
        lambda d: set_rows(d, 3, lambda r: [{**r[0], "tokens": 26}, *r[1:]]),
        r"documents-00003\.parquet: row 0 says 26 tokens, the \.idx file 25",
    ),
    "row source": (lambda d: set_rows(d, 0, lambda r: [{**row, "source": "web"} for row in r]), "sources"),
    "parquet cut": (lambda d: edit(d / "documents-00001.parquet", lambda c: c[:99]), r"00001\.parquet: cannot be read"),
    "parquet gone": (lambda d: (d / "documents-00004.parquet").unlink(), r"documents-00004\.parquet is missing"),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not the tokenizer"),
    "tokenizer cut": (lambda d: (d / "tokenizer.json").write_text("{"), r"set/tokenizer\.json: not valid JSON"),
    "tokenizer gone": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "fingerprint": (lambda d: set_field(d, fingerprint="0"), r"dataset\.json: the fingerprint is not that"),
}


@pytest.mark.parametrize("damage", FOUND)
def test_damage_that_only_verifying_finds(dataset, damage, monkeypatch):
    monkeypatch.setattr(shards.verify, "_CHUNK", 3)
    assert verify_dataset(dataset).problems == ()
    act, message = FOUND[damage]
    act(dataset)
    TokenDataset(dataset)
    with pytest.raises(AssertionError, match=message):
        assert not verify_dataset(dataset).problems, "\n".join(verify_dataset(dataset).problems)


def test_any_flipped_byte_is_found(dataset):
    """One byte at a time, in every .bin and .idx file."""
    for path in sorted([*dataset.glob("*.bin"), *dataset.glob("*.idx")]):
        for position in range(path.stat().st_size):
            edit(path, flip(position))
            problems = verify_dataset(dataset).problems
            assert any(path.name in problem for problem in problems), f"{path.name}, byte {position}"
            edit(path, flip(position))
    assert verify_dataset(dataset).problems == ()


def test_verifying_reports_everything_and_its_progress(dataset):
    seen = []
    found = verify_dataset(dataset, progress=seen.append)
    assert (found.shards, found.tokens, found.documents, sum(seen)) == (6, 55, 6, 55)
    edit(dataset / "shard-00001.bin", flip(0))
    edit(dataset / "shard-00004.bin", flip(0))
    assert len(verify_dataset(dataset).problems) == 2
    for shard in (1, 3):
        edit(dataset / f"shard-{shard:05d}.bin", lambda content: content[:-1])
    assert len(verify_dataset(dataset).problems) == 2
