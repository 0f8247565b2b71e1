"""Deduplication over parts: what stays, what goes and why, the same for any cuts, workers and interruptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.arrays import array_length, load_array, read_row, save_array
from prep.dedup import decide, removal, repeats
from prep.dedup.passes import Signatures
from prep.dedup.settings import DedupSettings
from prep.documents import START, Block, Documents
from prep.executors import LocalExecutor
from prep.parts import Job, Part, run_part
from prep.storage import Folder
from shards.errors import UserError
from shards.settings import validate

SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("score", pa.int64())])
Row = dict[str, Any]


def make_rows(number: int, source: str = "web", seed: int = 0) -> list[Row]:
    """Documents with exact copies (other case and white space) and edits of earlier ones among them."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=6)) for _ in range(2_000)]
    rows: list[Row] = []
    originals: list[list[str]] = []
    for index in range(number):
        kind = generator.random() if originals else 1.0
        if kind < 0.15:
            text = "  ".join(generator.choice(originals)).upper()
        elif kind < 0.35:
            changed = list(generator.choice(originals))
            for _ in range(generator.choice([1, 1, 2, 4, 12])):
                changed[generator.randrange(len(changed))] = generator.choice(words)
            text = " ".join(changed)
        else:
            originals.append(generator.choices(words, k=generator.randint(1, 120)))
            text = " ".join(originals[-1])
        rows.append({"id": f"{source}-{index}", "text": text, "source": source, "score": index % 7})
    return rows


def options(method: str, **others: Any) -> DedupSettings:
    """Settings; repeated units have no keeper policy."""
    given = {} if method in ("paragraph", "line") else others
    return validate(DedupSettings, {"method": method, **given}, "test")


def batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA)


def load(batch: pa.RecordBatch) -> Documents:
    return Documents(batch, rows=batch.num_rows)


def cut(rows: Sequence[Row], per_part: int, per_block: int) -> list[Part]:
    """Parts of one source each."""
    parts = []
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        for first in range(0, len(mine), per_part):
            chosen = mine[first : first + per_part]
            batches = [batch_of(chosen[at : at + per_block]) for at in range(0, len(chosen), per_block)]
            blocks = [Block(partial(load, batch), batch.nbytes, START, 0) for batch in batches]
            parts.append(Part(len(parts), source, blocks, 1, f"{source}-{first}-{len(chosen)}", 0))
    return parts


@dataclass
class Run:
    """What a deduplication left."""

    kept: list[Row]
    rejected: list[Row]
    audit: list[Row]
    report: dict[str, Any]


def dedup(
    folder: Path,
    rows: Sequence[Row],
    settings: DedupSettings,
    *,
    per_part: int = 40,
    per_block: int = 16,
    workers: int = 1,
    reference: Sequence[Row] | None = None,
    later: Sequence[Row] | None = None,
) -> Run:
    """Pass 1, decisions, pass 2, which may see other rows (`later`)."""
    out = Folder(folder)
    with LocalExecutor(workers) as executor:
        first = [first_pass(out.child("first"), rows, settings, per_part, per_block, executor)]
        if reference is not None:
            first.append(first_pass(out.child("reference"), reference, settings, per_part, per_block, executor))
        found = removal.find_removal(
            first[0], settings, out.child("scratch"), out, executor, reference=first[1] if first[1:] else None
        )
        job = Job(out, SCHEMA, (), removal=found.stage)
        states = list(executor.map(partial(run_part, job, found.digest), cut(later or rows, per_part, per_block)))
        found.check(states)
    audit = pq.read_table(folder / "duplicates.parquet").to_pylist() if (folder / "duplicates.parquet").exists() else []
    rejected = sorted(read(folder / "rejected"), key=lambda row: row["id"])  # a block's lie by rule
    return Run(read(folder), rejected, audit, found.report)


def first_pass(
    folder: Folder, rows: Sequence[Row], settings: DedupSettings, per_part: int, per_block: int, executor: LocalExecutor
) -> removal.FirstPass:
    product = removal.product(settings)
    job = Job(folder, SCHEMA, (), product, writes=False)
    states = list(executor.map(partial(run_part, job, job.digest()), cut(rows, per_part, per_block)))
    return removal.FirstPass(folder.child(product.name), states, lambda: iter(cut(rows, per_part, per_block)), SCHEMA)


def read(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_duplicates_go_and_their_keepers_stay(tmp_path: Path) -> None:
    rows = make_rows(300) + make_rows(200, "books", seed=1)
    run = dedup(tmp_path, rows, DedupSettings())
    kept = {row["id"] for row in run.kept}
    assert [row["id"] for row in run.kept] == [row["id"] for row in rows if row["id"] in kept]  # in their order
    assert len(run.kept) + len(run.rejected) == len(rows)
    assert {row["rule"] for row in run.rejected} == {"exact", "minhash"}
    sources = {row["id"]: row["source"] for row in rows}
    position = {row["id"]: index for index, row in enumerate(rows)}
    for row in run.rejected:
        assert row["keeper"] in kept
        assert position[row["keeper"]] < position[row["id"]]  # the first stays
        assert row["similarity"] >= (0.8 if row["rule"] == "minhash" else 1.0)
        assert row["threshold"] == (0.8 if row["rule"] == "minhash" else None)
        assert row["value"] == row["similarity"]
    audit = {row["id"]: row for row in run.audit}
    assert audit.keys() == {row["id"] for row in run.rejected}
    for row in run.rejected:
        entry = audit[row["id"]]
        assert (entry["keeper"], entry["method"], entry["similarity"]) == (
            row["keeper"],
            row["rule"],
            row["similarity"],
        )
        assert (entry["source"], entry["keeper_source"]) == (row["source"], sources[row["keeper"]])
        assert entry["cluster_size"] == 1 + sum(other["keeper"] == row["keeper"] for other in run.audit)
    assert run.report["documents"] == 500
    assert run.report["removed"] == len(run.rejected) == sum(run.report["similarity"]["counts"])
    assert run.report["verified"] > 0
    sizes = {row["keeper"]: row["cluster_size"] for row in run.audit}
    counted = {str(size): list(sizes.values()).count(size) for size in sorted(set(sizes.values()))}
    assert run.report["clusters"] == counted


@pytest.mark.parametrize("keep", ["first", "longest", "highest:score"])
def test_cuts_into_parts_and_blocks_change_nothing(tmp_path: Path, keep: str) -> None:
    rows = make_rows(240)
    settings = DedupSettings(keep=keep)
    one = dedup(tmp_path / "one", rows, settings, per_part=1_000, per_block=1_000)
    many = dedup(tmp_path / "many", rows, settings, per_part=23, per_block=5)
    assert (one.kept, one.rejected, one.audit, one.report) == (many.kept, many.rejected, many.audit, many.report)
    ranks = {"longest": lambda row: len(row["text"].encode()), "highest:score": lambda row: row["score"]}
    if keep in ranks:
        rank, documents = ranks[keep], {row["id"]: row for row in rows}
        assert all(rank(documents[row["keeper"]]) >= rank(row) for row in one.rejected)
        assert any(int(row["keeper"][4:]) > int(row["id"][4:]) for row in one.rejected)


def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    rows = make_rows(240)
    for workers in (1, 2):
        dedup(tmp_path / str(workers), rows, DedupSettings(), workers=workers)
    names = sorted(
        path.relative_to(tmp_path / "1")
        for path in (tmp_path / "1").rglob("*")
        if path.is_file() and path.parent.name != "state"
    )
    assert len(names) > 20
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_the_reference_is_never_removed_and_removes_what_it_holds(tmp_path: Path) -> None:
    rows, reference = make_rows(200), make_rows(150, "known", seed=5)
    near = reference[3]["text"] if len(reference[3]["text"]) > 200 else reference[4]["text"]
    planted = [{"id": "copy", "text": near.upper(), "source": "web", "score": 0}]
    planted += [{"id": "edit", "text": near + " more words", "source": "web", "score": 99}]
    run = dedup(tmp_path, rows + planted, DedupSettings(keep="longest"), reference=reference)
    alone = dedup(tmp_path / "alone", rows, DedupSettings(keep="longest"))
    assert [row["id"] for row in run.kept] == [row["id"] for row in alone.kept]
    removed = {row["id"]: row for row in run.audit}
    known = {row["id"] for row in reference}
    assert removed["copy"]["keeper"] in known
    assert removed["edit"]["keeper"] in known
    assert removed["copy"]["keeper_source"] == "known"
    assert run.report["documents"] == 202
    assert not known & {row["id"] for row in run.kept + run.rejected}


def test_exact_only_leaves_edits_alone(tmp_path: Path) -> None:
    rows = make_rows(200)
    run = dedup(tmp_path, rows, DedupSettings(method="exact"))
    seen: set[str] = set()
    expected = []
    for row in rows:
        text = " ".join(row["text"].lower().split())
        if text not in seen:
            expected.append(row["id"])
        seen.add(text)
    assert [row["id"] for row in run.kept] == expected
    assert {row["rule"] for row in run.rejected} == {"exact"}


def test_a_copy_is_handed_on_to_the_keeper_that_stands(tmp_path: Path) -> None:
    """B is a copy of A; A goes as a near-duplicate of the longer C: so B's keeper is C, with A's similarity."""
    words = [f"w{number}" for number in range(100)]
    texts = {"a": " ".join(words), "b": "\n".join(words).upper(), "c": " ".join([*words, "and", "one", "more"])}
    rows = [{"id": name, "text": text, "source": "web", "score": 0} for name, text in texts.items()]
    run = dedup(tmp_path, rows, DedupSettings(keep="longest"))
    assert [row["id"] for row in run.kept] == ["c"]
    assert [(row["id"], row["keeper"], row["rule"], row["similarity"]) for row in run.rejected] == [
        ("a", "c", "minhash", 96 / 99),
        ("b", "c", "minhash", 96 / 99),
    ]


def test_a_run_that_was_killed_goes_on_and_other_settings_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(200)
    expected = dedup(tmp_path / "expected", rows, DedupSettings())
    calls: list[str] = []
    whole, counted = decide.find_edges, removal.run_part

    def fails(*arguments: Any) -> Any:
        calls.append("band")
        if len(calls) == 7:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(decide, "find_edges", fails)
    with pytest.raises(KeyboardInterrupt):
        dedup(tmp_path / "killed", rows, DedupSettings())
    run = dedup(tmp_path / "killed", rows, DedupSettings())
    assert len(calls) == 7 + 18 - 6  # six bands were done
    assert (run.kept, run.rejected, run.audit, run.report) == (
        expected.kept,
        expected.rejected,
        expected.audit,
        expected.report,
    )
    monkeypatch.setattr(removal, "run_part", lambda *arguments: calls.append("part") or counted(*arguments))
    dedup(tmp_path / "killed", rows, DedupSettings())
    assert "part" not in calls  # the shingles are there
    looser = dedup(tmp_path / "killed", rows, DedupSettings(threshold=0.5))
    assert "part" in calls
    assert looser.kept == dedup(tmp_path / "looser", rows, DedupSettings(threshold=0.5)).kept
    assert len(looser.kept) < len(run.kept)


def test_a_source_that_would_lose_too_much_stops_the_run(tmp_path: Path) -> None:
    texts = [f"the document {number % 400} of many" for number in range(1_000)]
    rows = [{"id": str(number), "text": text, "source": "web", "score": 0} for number, text in enumerate(texts)]
    few = [{**row, "source": "few"} for row in rows[:10]]
    with pytest.raises(UserError, match=r"more than 50% of the documents of web") as caught:
        dedup(tmp_path, rows + few, DedupSettings(method="exact"))
    message = str(caught.value)
    assert "--max-removed 0.6" in message
    assert "duplicates.parquet" in message  # which is there to be looked at
    assert pq.read_metadata(tmp_path / "duplicates.parquet").num_rows == 600 + 10
    assert "60.0%" in message
    assert "few" in message
    assert len(dedup(tmp_path, rows + few, DedupSettings(method="exact", max_removed=0.6)).kept) == 400
    assert len(dedup(tmp_path / "small", rows[:999], DedupSettings(method="exact")).kept) == 400  # too few to tell


@pytest.mark.parametrize("level", ["paragraph", "line"])
def test_repeated_units_are_cut_and_what_loses_much_is_dropped(
    tmp_path: Path, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = "\n\n" if level == "paragraph" else "\n"
    unit = {name: f"This is {name} that stands in some of the documents, and it is long." for name in "abcdef"}
    documents = ["ab", "cad", "ca", "e", "ab", "cf"]  # b is first in a document that stays, f stays, c was first in 1
    texts = [between.join([*(unit[name] for name in names), "short"]) for names in documents]
    rows = [{"id": str(number), "text": text, "source": "web", "score": 0} for number, text in enumerate(texts)]
    for per_part, partition in ((1, 2), (2, 100), (100, 1)):
        monkeypatch.setattr(repeats, "PARTITION_UNITS", partition)
        folder = tmp_path / f"{level}{per_part}"
        run = dedup(folder, rows, options(level), per_part=per_part, per_block=1)
        assert [(row["id"], row["text"]) for row in run.kept] == [
            ("0", texts[0]),
            ("1", between.join([unit["c"], unit["d"], "short"])),
            ("3", texts[3]),
            ("5", between.join([unit["f"], "short"])),
        ]
        assert [(row["id"], row["rule"], row["text"]) for row in run.rejected] == [
            ("2", level, texts[2]),
            ("4", level, texts[4]),
        ]
        assert run.rejected[0]["value"] == 2 * len(unit["a"]) / (2 * len(unit["a"]) + len("short"))
        assert run.report["repeated_units"] == 6


def test_arrays_are_read_by_row_and_length(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for name, array in (("wide", np.arange(12).reshape(3, 4)), ("narrow", np.arange(3).reshape(3, 1))):
        for order in "CF":
            save_array(folder, f"{name}.npy", np.asarray(array, order=order))
            assert array_length(folder, f"{name}.npy") == array.shape[1]
            assert [read_row(folder, f"{name}.npy", row).tolist() for row in range(3)] == array.tolist()
    with pytest.raises(UserError, match=r"none.npy: missing"):
        load_array(folder, "none.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "minhahs"}, "did you mean 'minhash'"),
        ({"keep": "longst"}, "did you mean 'longest'"),
        ({"keep": "highest:"}, "did you mean 'highest:COLUMN'"),
        ({"threshold": 1.2}, "threshold: .*less than or equal to 1"),
        ({"threshold": 0}, "threshold: .*greater than 0"),
        ({"bands": 0}, "bands: .*greater than or equal to 1"),
        ({"rows": "7"}, "rows: .*integer"),
        ({"max_removed": -1}, "max_removed: .*greater"),
        ({"seed": -1}, "seed: .*greater"),
        ({"treshold": 0.8}, "did you mean 'threshold'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(DedupSettings, options, "recipe.yaml")


def test_a_keeper_column_must_be_there_and_hold_numbers() -> None:
    batch = batch_of(make_rows(3))
    assert Signatures(DedupSettings(keep="highest:score"))(batch)["best"].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(UserError, match=r"no column 'scor' .*score"):
        Signatures(DedupSettings(keep="highest:scor"))(batch)
    with pytest.raises(UserError, match="column 'id' is string; its values must be numbers"):
        Signatures(DedupSettings(keep="highest:id"))(batch)


@pytest.mark.parametrize("method", ["exact", "minhash", "paragraph", "line"])
def test_parts_without_documents_do_no_harm(tmp_path: Path, method: str) -> None:
    settings = options(method, keep="longest")
    product = removal.product(settings)
    for empty in (batch_of([]), batch_of(make_rows(3)).slice(3), batch_of(make_rows(3)).filter(pa.array([False] * 3))):
        assert all(array.shape[-1] == 0 for array in product(empty).values())
    rows = [
        *make_rows(40),
        *({"id": f"n{n}", "text": text, "source": "odd", "score": 0} for n, text in enumerate("!?!")),
    ]
    parts = cut(rows, 20, 10)
    none = Part(len(parts), "none", [Block(partial(load, batch_of([])), 0, START, 0)], 1, "none", 0)
    nothing = Part(len(parts) + 1, "nothing", [], 1, "nothing", 0)
    out = Folder(tmp_path)
    with LocalExecutor(1) as executor:
        job = Job(out.child("first"), SCHEMA, (), product, writes=False)
        states = [run_part(job, job.digest(), part) for part in [*parts, none, nothing]]
        first = removal.FirstPass(job.folder.child(product.name), states, lambda: iter([*parts, none, nothing]), SCHEMA)
        found = removal.find_removal(first, settings, out.child("scratch"), out, executor)
        last = Job(out, SCHEMA, (), removal=found.stage, removal_digest=found.digest)
        kept = [run_part(last, last.digest(), part)["kept_documents"] for part in [*parts, none, nothing]]
    assert kept[-2:] == [0, 0]
    assert kept[2] == (3 if settings.level else 2)  # documents without a word: copies, yet never near-duplicates
