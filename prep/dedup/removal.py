"""From the pass that made the arrays to the pass that removes: everything that a deduplication decides.

    pass 1   any steps, and the product that `product(settings)` gives, for each part
    here     exact copies, bands, candidates and their shingles (a pass over the parts that hold any), decisions; or
             the repeated units
    pass 2   the same documents again, with `Removal.stage` as what removes

What lies between them is in a scratch folder, in files that are whole or absent; `plan.json` there says for which input
and settings, and other ones throw it away. So a run that was killed goes on from there. `done.json` is written last:
with it, all is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from prep.dedup.decide import (
    AUDIT,
    CANDIDATES,
    DECIDED,
    EDGES,
    RANKS,
    REFERENCE_CANDIDATES,
    Corpus,
    PartArrays,
    count_removed,
    find_duplicates,
    summarise,
    write_decisions,
)
from prep.dedup.explain import megabytes, need
from prep.dedup.passes import ChooseRows, CutRepeats, RemoveDuplicates, Shingles, Signatures, UnitHashes, changed
from prep.dedup.repeats import CUTS, GROUPS, REPEATS, find_cuts
from prep.dedup.settings import DedupSettings
from prep.executors import Executor
from prep.parts import Job, Part, PlacedStage, part_name, read_state, run_part
from prep.progress import Progress
from prep.stage_folder import guard
from prep.stages import Product
from prep.storage import Folder

PLAN, DONE = "plan.json", "done.json"
LAYOUT = 2  # raise it when the files in the scratch folder change
SHINGLED, REFERENCE_SHINGLED = "shingled", "reference-shingled"


@dataclass(frozen=True)
class FirstPass:
    """Documents that pass 1 went over.

    Attributes:
        arrays: the folder with the arrays of the product.
        states: of the parts, in their order.
        parts: cuts the same parts again, with the documents that pass 1 left.
        schema: columns of the documents.
    """

    arrays: Folder
    states: Sequence[dict[str, Any]]
    parts: Callable[[], Iterator[Part]]
    schema: pa.Schema

    def part_arrays(self) -> list[PartArrays]:
        """What each part left."""
        return [
            PartArrays(self.arrays, state["number"], state["source"], state["kept_documents"], _keys(state["files"]))
            for state in self.states
        ]


@dataclass(frozen=True)
class Removal:
    """What pass 2 is to do.

    Attributes:
        stage: makes the stage that removes from the number of a part (`Job.removal`).
        parts: how many parts the documents have, and pass 2 must have.
        digest: of all that the removal depends on; belongs into the digest of pass 2.
        report: the entry `dedup` of report.json; for repeated units it lacks what pass 2 finds out.
    """

    stage: Callable[[int], PlacedStage]
    parts: int
    digest: str
    report: dict[str, Any]

    def check(self, states: Sequence[dict[str, Any]]) -> None:
        """Check the states of pass 2 beyond what each part can see of itself.

        Raises:
            UserError: it had other parts than pass 1.
        """
        if len(states) != self.parts:
            raise changed(f"{len(states):,} parts, before {self.parts:,}")


def product(settings: DedupSettings, *, reference: bool = False) -> Product:
    """What pass 1 has to compute; of a reference nothing is removed, so its documents need no ranks."""
    return UnitHashes(settings) if settings.level else Signatures(settings, ranked=not reference)


def find_removal(
    documents: FirstPass,
    settings: DedupSettings,
    scratch: Folder,
    out: Folder,
    executor: Executor,
    *,
    reference: FirstPass | None = None,
    audit: str = AUDIT,
    say: Callable[[str], None] = lambda line: None,
) -> Removal:
    """Decide what goes.

    Args:
        documents: what is deduplicated.
        settings: options.
        scratch: a folder for what lies between the passes.
        out: where the audit table goes.
        executor: runs tasks.
        reference: documents that none of `documents` may repeat; they are never removed.
        audit: name of the audit table; repeated units have none.
        say: takes a line for the user: what will be needed.

    Returns:
        What pass 2 is to do.

    Raises:
        UserError: a source would lose more than `settings.max_removed`; the audit table is there to be looked at. For
            repeated units that is known only after pass 2.
    """
    digest = _plan(documents, settings, reference)
    _open_scratch(scratch, digest)
    if settings.level:
        folder, suffix = scratch.child(CUTS), "npy"
        remove: Callable[[int], PlacedStage] = partial(CutRepeats, folder=folder, settings=settings)
    else:
        folder, suffix = scratch.child(DECIDED), "parquet"
        remove = partial(RemoveDuplicates, folder=folder, threshold=settings.threshold)
    wanted = [f"{part_name(state['number'])}.{suffix}" for state in documents.states]
    content = scratch.read(DONE)
    if content is None or set(wanted) - set(folder.names()) or not (settings.level or out.exists(audit)):
        made = _decide(documents, settings, scratch, out, executor, reference, audit, digest, say)
        folder.sync(wanted)
        content = orjson.dumps(made)
        scratch.write(DONE, content)
    done = orjson.loads(content)
    guard(done["sources"], settings.max_removed, "dedup", out.path(audit))
    return Removal(remove, len(documents.states), digest, done["report"])


def _decide(
    documents: FirstPass,
    settings: DedupSettings,
    scratch: Folder,
    out: Folder,
    executor: Executor,
    reference: FirstPass | None,
    audit: str,
    digest: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make the decisions; gives the report, and what each source loses as far as that is known."""
    parts = documents.part_arrays()
    before = reference.part_arrays() if reference else []
    if settings.level:
        repeats = find_cuts([*before, *parts], len(before), scratch, executor, say)
        return {"report": _units_report(documents, settings, repeats), "sources": {}}
    corpus = Corpus((*before, *parts), reference=len(before))
    total = int(corpus.starts()[-1])
    wanted = need(total, bands=settings.bands if settings.method == "minhash" else 0, workers=executor.workers)
    say(f"{total:,} documents: needs about {megabytes(wanted.memory)} of memory, {megabytes(wanted.disk)} of disk")

    def shingle(held: Sequence[PartArrays]) -> list[PartArrays]:
        say(f"{sum(part.documents for part in held):,} documents are candidates, to be verified")
        made = []
        for what, rows, name in (
            (reference, REFERENCE_CANDIDATES, REFERENCE_SHINGLED),
            (documents, CANDIDATES, SHINGLED),
        ):
            if what is not None:
                mine = [part for part in held if part.folder.uri == what.arrays.uri]
                made += _shingle(what, mine, scratch.child(rows), scratch.child(name), digest, executor)
        return made

    found = find_duplicates(corpus, settings, scratch, executor, shingle)
    write_decisions(corpus, found, scratch, out, audit)
    sources = count_removed(corpus, found.duplicates.keeper)
    return {"report": {**summarise(corpus, found, settings), "audit": audit}, "sources": sources}


def clear_scratch(scratch: Folder) -> None:
    """Remove what lies between the passes; the audit table is not among it."""
    scratch.remove(PLAN)
    scratch.remove(DONE)
    scratch.remove(RANKS)
    for name in (EDGES, GROUPS, REPEATS, CUTS, CANDIDATES, REFERENCE_CANDIDATES, DECIDED, SHINGLED, REFERENCE_SHINGLED):
        for folder in (
            scratch.child(name),
            *(scratch.child(name).child(below) for below in ("shingles", "state", "rejected")),
        ):
            for file in folder.names():
                folder.remove(file)


def _plan(documents: FirstPass, settings: DedupSettings, reference: FirstPass | None) -> str:
    made_of = [
        [[state["key"], state["digest"], state["kept_documents"]] for state in what.states] if what else None
        for what in (documents, reference)
    ]
    return xxhash.xxh3_128_hexdigest(orjson.dumps([LAYOUT, settings.describe(), made_of], option=orjson.OPT_SORT_KEYS))


def _open_scratch(scratch: Folder, digest: str) -> None:
    content = orjson.dumps({"digest": digest})
    if scratch.read(PLAN) != content:
        clear_scratch(scratch)
        scratch.write(PLAN, content)


def _shingle(
    documents: FirstPass, held: Sequence[PartArrays], rows: Folder, folder: Folder, digest: str, executor: Executor
) -> list[PartArrays]:
    """A pass over the parts that hold candidates; parts that are done are not done again."""
    choose = partial(ChooseRows, folder=rows)
    job = Job(folder, documents.schema, (), Shingles(), writes=False, removal=choose, removal_digest=digest)
    digest = job.digest()
    wanted = {part.number for part in held}
    done = {number for number in wanted if (state := read_state(folder, number)) and state["digest"] == digest}
    todo = wanted - done
    parts = (part for part in documents.parts() if part.number in todo) if todo else ()
    held_by = {state["number"]: state["kept_documents"] for state in documents.states}
    read = size = 0
    with Progress("dedup: candidates", sum(held_by[number] for number in todo)) as progress:
        for state in executor.map(partial(run_part, job, digest), parts):
            todo.discard(state["number"])
            read, size = read + held_by[state["number"]], size + state["bytes"]
            progress.update(read, size)
    if todo:
        raise changed(f"part {min(todo)} is not there any more")
    return [part._replace(folder=folder.child(job.product.name)) for part in held if job.product]


def _units_report(documents: FirstPass, settings: DedupSettings, repeats: int) -> dict[str, Any]:
    return {
        "method": settings.method,
        "threshold": settings.max_cut,
        "bands": None,
        "rows": None,
        "documents": sum(state["kept_documents"] for state in documents.states),
        "removed": None,
        "candidates": None,
        "verified": None,
        "repeated_units": repeats,
        "clusters": {},
        "similarity": None,
        "audit": None,
    }


def _keys(files: Iterable[str]) -> frozenset[str]:
    """Of the arrays among the files of a part: `signatures/part-00000.hashes.npy` is "hashes"."""
    return frozenset(file.rsplit(".", 2)[1] for file in files if file.endswith(".npy"))
