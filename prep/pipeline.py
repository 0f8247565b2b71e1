"""From sources through stages to clean documents: the passes that a recipe, or one command, comes down to.

Stages that look at one document at a time run together in one pass over the parts. A deduplication needs to have seen
all documents, so it ends a pass: what the pass leaves behind are signatures beside the documents, and the next pass
begins with the removal. The last pass writes the documents that were asked for.

    [read, language, filter, signatures]  ->  bands, candidates, decisions  ->  [remove, decontaminate]  ->  documents
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import xxhash

from prep.characters import UNICODE_VERSION
from prep.decontaminate import DecontaminateStage
from prep.dedup.decide import AUDIT
from prep.dedup.exact import load_kernels
from prep.dedup.removal import FirstPass, Removal, find_removal, product
from prep.dedup.settings import DedupSettings
from prep.executors import Executor
from prep.part_writer import Format
from prep.parts import Files, Job, Part, cut_parts, written_parts
from prep.repeated_ids import count_repeated
from prep.report import render
from prep.stage_folder import Limits, check_removed, merge_tallies, open_for_writing, run_pass
from prep.stages import Step, Tally
from prep.storage import Folder
from shards.errors import UserError

SCRATCH, REFERENCE = "scratch", "reference"
REPORT_JSON, REPORT_HTML = "report.json", "report.html"


class DedupStep(NamedTuple):
    """A deduplication over all sources, against the documents of `reference` too."""

    settings: DedupSettings
    reference: tuple[Files, ...] = ()


class GuardedStep(NamedTuple):
    """A step that may not remove more than a share of a source's documents."""

    step: Step
    max_removed: float


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        title: of the report.
        sources: what is read.
        steps: in order.
        out: folder of the documents.
        between: folder of the documents before the deduplication, and of what deduplication keeps for itself.
        format: of the documents.
        limits: when reading stops.
    """

    title: str
    sources: tuple[Files, ...]
    steps: tuple[Step | GuardedStep | DedupStep, ...]
    out: Folder
    between: Folder
    format: Format
    limits: Limits


@dataclass
class Result:
    """What came out: the report (see `write_report`), the states of the last pass, whether all was there before."""

    report: dict[str, Any]
    states: list[dict[str, Any]] = field(repr=False)
    up_to_date: bool = False


class _Pass(NamedTuple):
    job: Job
    parts: Callable[[], Iterator[Part]]
    states: list[dict[str, Any]]


def run(work: Work, executor: Executor, say: Callable[[str], None] = print) -> Result:
    """Do the work; what an earlier run of the same work has finished is not done again.

    Raises:
        UserError: a mistake that the user can mend; what was done until then is kept.
    """
    begin = time.monotonic()
    _check_apart(work)
    open_for_writing(work.out)
    schema = union_schema([files.schema for files in work.sources])
    total = sum(files.size for files in work.sources)
    made_from = _describe_files(work.sources)
    if any(isinstance(step, DedupStep) for step in work.steps):  # numba needs half a second, the workers more
        threading.Thread(target=load_kernels, daemon=True).start()
    with work.out.lock(), _full_disk_explained(work.out):
        passes: list[_Pass] = []
        removals: list[Removal] = []
        parts: Callable[[], Iterator[Part]] = partial(cut_parts, work.sources)
        groups = _split(work.steps)
        up_to_date = True
        for number, (guarded, dedup) in enumerate(groups):
            steps = tuple(item.step if isinstance(item, GuardedStep) else item for item in guarded)
            removal = removals[-1] if removals else None
            cleans = bool(steps) or removal is not None
            job = Job(
                folder=work.out if dedup is None else _between(work, number),
                schema=schema,
                steps=steps,
                product=product(dedup.settings) if dedup else None,
                writes=dedup is None or cleans or _slow_to_read(work.sources),
                format=work.format if dedup is None else "parquet",
                scratch=dedup is not None and not cleans,
                removal=removal.stage if removal else None,
                removal_digest=removal.digest if removal else None,
            )
            title = "reading" if dedup and not cleans else " + ".join(_titles(removal is not None, steps))
            before = groups[number - 1][1] if number else None
            check = partial(_check_guards, guarded, before.settings if before else None, removal, job.folder)
            done = run_pass(
                title, job, parts, executor, total=total, made_from=made_from, limits=work.limits, check=check, say=say
            )
            states, up_to_date = done.states, up_to_date and done.up_to_date
            passes.append(_Pass(job, parts, states))
            if job.writes:
                schema, total = job.out_schema(), sum(state["kept_bytes"] for state in states)
                made_from = xxhash.xxh3_128_hexdigest(orjson.dumps([[s["key"], s["digest"]] for s in states]))
                parts = _written(job, states, schema)
            if dedup is not None:
                removals.append(_deduplicate(work, number, dedup, passes[-1], parts, schema, executor, say))
        seconds = time.monotonic() - begin
        report = read_report(work.out) if up_to_date else None
        if report is not None and report["made_from"] == done.made_from:
            return Result(report, passes[-1].states, up_to_date=True)
        report = make_report(work, passes, removals, groups, seconds, executor.workers)
        report["made_from"] = done.made_from
        for name in set(work.out.names(AUDIT.replace(".", "*."))) - {removal.report["audit"] for removal in removals}:
            work.out.remove(name)  # of another deduplication, which an earlier run had
        write_report(work.out, report)
    return Result(report, passes[-1].states)


def union_schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of several sources together, each of one type.

    Raises:
        UserError: a column of two types.
    """
    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for column in schema:
            known = fields.setdefault(column.name, column)
            if not known.type.equals(column.type):
                raise UserError(
                    f"column '{column.name}' holds {known.type} in one source and {column.type} in another; give it "
                    f"one type, or do not keep it"
                )
    return pa.schema(list(fields.values()))


def make_report(
    work: Work,
    passes: Sequence[_Pass],
    removals: Sequence[Removal],
    groups: Sequence[tuple[Sequence[Any], DedupStep | None]],
    seconds: float,
    workers: int,
) -> dict[str, Any]:
    """The report of all passes, ready for JSON (schema: `prep.report`)."""
    stages: list[dict[str, Any]] = []
    decontamination: list[dict[str, Any]] = []
    dedups: list[dict[str, Any]] = []
    for number, (one, (steps, _)) in enumerate(zip(passes, groups, strict=True)):
        tallies = merge_tallies(one.job.folder, len(one.states))
        if one.job.removal is not None:
            removed = tallies[0].documents_in - tallies[0].documents_out
            dedups.append({**removals[number - 1].report, "removed": removed})
            stages.append(stage_report(tallies.pop(0)))
        for item, tally in zip(steps, tallies, strict=True):
            stages.append(stage_report(tally))
            stage = item.step.stage if isinstance(item, GuardedStep) else item.stage
            if isinstance(stage, DecontaminateStage):
                decontamination += stage.report(tally)
    first, last = passes[0].states, passes[-1].states
    return {
        "title": work.title,
        "command": shlex.join(["minigpt-prep", *sys.argv[1:]]),
        "config": [one.job.describe() for one in passes],
        "unicode": UNICODE_VERSION,
        "seconds": seconds,
        "text_bytes": sum(state["bytes"] for state in first),
        "workers": workers,
        "sources": _source_report(first, last),
        "broken": [problem for state in first for problem in state["broken"]],
        "repeated_ids": count_repeated(state["ids"] for state in first),
        "stages": stages,
        "dedup": dedups or None,
        "decontamination": decontamination or None,
        "tokens": None,
    }


def stage_report(tally: Tally) -> dict[str, Any]:
    """What one stage did, for the report."""
    histograms = [
        {"name": name, **vars(histogram), "edges": histogram.edges()} for name, histogram in tally.histograms.items()
    ]
    measured = list(tally.histograms)  # in the order of the rules; those of lines and of other stages come behind
    rules = sorted(
        tally.rules.items(), key=lambda item: measured.index(item[0]) if item[0] in measured else len(measured)
    )
    return {
        "name": tally.stage,
        "documents_in": tally.documents_in,
        "bytes_in": tally.bytes_in,
        "documents_out": tally.documents_out,
        "bytes_out": tally.bytes_out,
        "rules": [{"name": rule, "documents": n, "bytes": size} for rule, (n, size) in rules],
        "counts": tally.counts,
        "histograms": histograms,
        "samples": [sample for samples in tally.samples.values() for sample in samples],
    }


def write_report(folder: Folder, report: dict[str, Any]) -> None:
    """`report.json` and `report.html`."""
    folder.write(REPORT_JSON, orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    folder.write(REPORT_HTML, render(report).encode())


def read_report(folder: Folder) -> dict[str, Any] | None:
    """The report that was written, if both of its files are there."""
    content = folder.read(REPORT_JSON)
    if content is None or not folder.exists(REPORT_HTML):
        return None
    report: dict[str, Any] = orjson.loads(content)
    return report


def _check_apart(work: Work) -> None:
    """Refuse to read what the run would write over."""
    dedups = [step for step in work.steps if isinstance(step, DedupStep)]
    for files in (*work.sources, *(files for dedup in dedups for files in dedup.reference)):
        for item in files.inputs:
            name, before = work.out.holds(item.path), work.between.holds(item.path)
            if before is not None or (name or "").startswith(("part-", "rejected/", "state/")):
                raise UserError(f"{item.path}: lies where the result goes ({work.out}); choose another --out")


def _slow_to_read(sources: Sequence[Files]) -> bool:
    """Whether documents are better written once than read three times: rows have to be decompressed and parsed."""
    return any(item.kind in ("rows", "csv") for files in sources for item in files.inputs)


def _split(
    steps: Sequence[Step | GuardedStep | DedupStep],
) -> list[tuple[list[Step | GuardedStep], DedupStep | None]]:
    """The steps of each pass, and the deduplication that ends it."""
    groups: list[tuple[list[Step | GuardedStep], DedupStep | None]] = []
    current: list[Step | GuardedStep] = []
    for step in steps:
        if isinstance(step, DedupStep):
            groups.append((current, step))
            current = []
        else:
            current.append(step)
    return [*groups, (current, None)]


def _between(work: Work, number: int) -> Folder:
    return work.between if number == 0 else Folder(f"{work.between.uri}-{number + 1}")


def _titles(removal: bool, steps: Sequence[Step]) -> list[str]:
    names = (["dedup"] if removal else []) + [step.stage.name for step in steps]
    return names or ["writing"]


def _written(job: Job, states: list[dict[str, Any]], schema: pa.Schema) -> Callable[[], Iterator[Part]]:
    return lambda: written_parts(job.folder, states, schema)


def _deduplicate(
    work: Work,
    number: int,
    dedup: DedupStep,
    before: _Pass,
    parts: Callable[[], Iterator[Part]],
    schema: pa.Schema,
    executor: Executor,
    say: Callable[[str], None],
) -> Removal:
    """Decide what goes; `parts` cuts the documents that the pass before has left."""
    assert before.job.product is not None
    folder = before.job.folder
    reference = None
    if dedup.reference:
        own = union_schema([files.schema for files in dedup.reference])
        job = Job(folder.child(REFERENCE), own, (), product(dedup.settings, reference=True), writes=False)
        size, made_from = sum(files.size for files in dedup.reference), _describe_files(dedup.reference)
        cut = partial(cut_parts, dedup.reference)
        done = run_pass(
            "reading the reference", job, cut, executor, total=size, made_from=made_from, limits=work.limits, say=say
        )
        reference = FirstPass(job.folder.child(before.job.product.name), done.states, cut, own)
    documents = FirstPass(folder.child(before.job.product.name), before.states, parts, schema)
    scratch = folder.child(SCRATCH)
    return find_removal(
        documents, dedup.settings, scratch, work.out, executor, reference=reference, audit=_audit(number), say=say
    )


def _audit(number: int) -> str:
    """Name of the table of a deduplication: the first one's, the second one's …"""
    return AUDIT if number == 0 else AUDIT.replace(".", f"-{number + 1}.")


def _check_guards(
    steps: Sequence[Step | GuardedStep],
    dedup: DedupSettings | None,
    removal: Removal | None,
    folder: Folder,
    states: Sequence[dict[str, Any]],
) -> None:
    """Check the steps of a pass; `removal` is of the deduplication that began it, whose units are only cut there."""
    if removal:
        removal.check(states)
    checks = [(0, dedup.max_removed, "dedup")] if dedup and dedup.level else []
    for position, item in enumerate(steps, 1 if removal else 0):
        if isinstance(item, GuardedStep):
            checks.append((position, item.max_removed, item.step.stage.name))
    for position, max_removed, name in checks:
        check_removed(states, position, max_removed, name, folder)


@contextmanager
def _full_disk_explained(out: Folder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{out}: the disk is full ({os.strerror(error.errno)}). What is finished is kept: free some space, and the "
            f"same command goes on"
        ) from None


def _describe_files(groups: Sequence[Files]) -> str:
    what = [
        [[[item.name, item.source, item.size, item.modified] for item in files.inputs], list(files.columns)]
        for files in groups
    ]
    return xxhash.xxh3_128_hexdigest(orjson.dumps(what))


def _source_report(first: Sequence[dict[str, Any]], last: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    sources: dict[str, dict[str, Any]] = {}
    for states, names in (
        (first, ("rows", "documents", "bytes", "empty", "malformed")),
        (last, ("kept_documents", "kept_bytes")),
    ):
        for state in states:
            entry = sources.setdefault(state["source"], {"name": state["source"]})
            for name in names:
                entry[name] = entry.get(name, 0) + state[name]
    return list(sources.values())
