"""A stage's output folder: a pass over parts that leaves documents, rejects and states, and the manifest at its end.

`manifest.json` is written last and says what the folder holds; a folder with one is complete. While a pass runs there
is none. Running it again works through the parts whose state does not fit: after a kill those that were not finished,
after a changed option all that depend on it, after a change of the input the parts in which it lies and, where it moves
the borders of those behind it, these too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson
import xxhash

from prep.characters import UNICODE_VERSION
from prep.documents import too_many_bad
from prep.executors import Executor
from prep.part_writer import FORMATS
from prep.parts import REJECTED, Job, Part, part_name, read_state, read_tallies, run_part
from prep.progress import Progress
from prep.stage_manifest import KIND, MANIFEST, MARK, STATE, VERSION, is_stage_folder, read_manifest
from prep.stages import Tally
from prep.storage import Folder
from shards.errors import UserError
from shards.format import MANIFEST as DATASET_MANIFEST

GUARD_DOCUMENTS = 1_000


class Done(NamedTuple):
    """A pass that is done.

    Attributes:
        states: of its parts, in order, without their tallies.
        made_from: hash of all that the folder was made from.
        up_to_date: whether it was done before, and nothing was written.
    """

    states: list[dict[str, Any]]
    made_from: str
    up_to_date: bool


@dataclass(frozen=True)
class Limits:
    """When a pass stops: share of bad rows, broken files (unless it is to keep going)."""

    max_bad_rows: float = 0.001
    keep_going: bool = False


def run_pass(
    title: str,
    job: Job,
    parts: Callable[[], Iterator[Part]],
    executor: Executor,
    *,
    total: int,
    made_from: str,
    limits: Limits,
    check: Callable[[Sequence[dict[str, Any]]], None] = lambda states: None,
    say: Callable[[str], None] = print,
) -> Done:
    """Work through all parts that are not done, and say what the folder holds.

    Args:
        title: shown with the progress.
        job: what to do.
        parts: cuts the input.
        executor: does it.
        total: bytes of the input, for the progress.
        made_from: hash of the whole input and of what the output depends on besides the job; a folder whose manifest
            has the same is done, and its input is not read again.
        limits: when to stop.
        check: raises where the states say that too much was removed; then the folder is not finished.
        say: takes one-line notices.

    Raises:
        UserError: too many bad rows, or broken files; what is done is kept.
    """
    open_for_writing(job.folder)
    digest = job.digest()
    made_from = xxhash.xxh3_128_hexdigest(f"{digest} {made_from}".encode())
    before = read_manifest(job.folder)
    if before and before["made_from"] == made_from:
        found = [state for number in range(len(before["parts"])) if (state := read_state(job.folder, number))]
        if len(found) == len(before["parts"]) and not any(state["broken"] for state in found):
            check(found)
            say(f"{title}: up to date ({before['documents']:,} documents)")
            return Done(found, made_from, up_to_date=True)
    states: dict[int, dict[str, Any]] = {}
    consumed: dict[int, int] = {}

    def to_do() -> Iterator[Part]:
        for part in parts():
            state = read_state(job.folder, part.number)
            same = state is not None and state["key"] == part.key and state["digest"] == digest
            if state and same and not state["broken"]:  # what was broken may be mended
                states[part.number] = state
                continue
            if not consumed:
                job.folder.remove(MANIFEST, durable=True)  # from here on the folder is not what it says
            # Nor is the part: killed amid it and run with the old options, it would look done.
            job.folder.child(STATE).remove(f"{part_name(part.number)}.json")
            consumed[part.number] = part.consumed
            yield part
            del part

    done_bytes = rows = bad = 0
    with Progress(title, total) as progress:
        for state in executor.map(partial(run_part, job, digest), to_do()):
            states[state["number"]] = state
            done_bytes += state["bytes"]
            progress.update(consumed[state["number"]], done_bytes)
            rows, bad = rows + state["rows"], bad + state["malformed"]
            _check_bad_rows(job.folder, bad, rows, limits.max_bad_rows)
    found = [states[number] for number in sorted(states)]
    if len(consumed) < len(found):
        say(f"{title}: {len(found) - len(consumed):,} of {len(found):,} parts were done before")
    rows, bad = (sum(state[name] for state in found) for name in ("rows", "malformed"))
    _check_bad_rows(job.folder, bad, rows, limits.max_bad_rows)
    _check_whole(job.folder, found, limits.keep_going)
    check(found)
    _remove_others(job, len(found))
    if not job.scratch:
        made = [states[number] for number in consumed]
        job.folder.sync([file for state in made for file in state["files"]])
        job.folder.sync([f"{STATE}/{part_name(state['number'])}.json" for state in made])
    _write_manifest(job, found, made_from)
    return Done(found, made_from, up_to_date=False)


def open_for_writing(folder: Folder) -> None:
    """Mark a folder as a stage's, before anything else is written; refuse one that holds something else.

    Raises:
        UserError: it is a file, or holds a token dataset, or files that no stage has made.
    """
    if folder.local is not None and folder.local.exists() and not folder.local.is_dir():
        raise UserError(f"{folder}: is a file; --out is a folder")
    if folder.exists(DATASET_MANIFEST):
        raise UserError(f"{folder}: holds a token dataset; choose another folder for documents")
    if is_stage_folder(folder):
        return
    names = [*folder.names("part-*"), *folder.names("manifest.json"), *folder.names("report.*")]
    if names:
        raise UserError(
            f"{folder}: holds files that no stage of minigpt-prep has made ({', '.join(names[:3])}); choose another "
            f"--out"
        )
    folder.child(STATE).write(MARK, b"{}\n")


def _write_manifest(job: Job, states: Sequence[dict[str, Any]], made_from: str) -> None:
    """Say what the folder holds; no times of the work and no paths, so the same work gives the same bytes."""
    kept = sum(state["kept_documents"] for state in states)
    if not kept:
        rows = sum(state["rows"] for state in states)
        raise UserError(
            f"{job.folder}: no document is left of {rows:,} rows. See why: minigpt-prep sample {job.folder} --rejected"
        )
    manifest = {
        "kind": KIND,
        "version": VERSION,
        "unicode": UNICODE_VERSION,
        "format": job.format,
        "columns": [[column.name, str(column.type)] for column in job.out_schema()],
        "documents": kept,
        "bytes": sum(state["kept_bytes"] for state in states),
        "parts": [
            {
                "file": f"{part_name(state['number'])}.{job.format}",
                "source": state["source"],
                "documents": state["kept_documents"],
                "bytes": state["kept_bytes"],
            }
            for state in states
        ],
        "made_from": made_from,
        "steps": job.describe()["steps"],
    }
    job.folder.write(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")


def merge_tallies(folder: Folder, parts: int) -> list[Tally]:
    """The tallies of a pass, stage by stage, over all its parts."""
    merged: list[Tally] = []
    for number in range(parts):
        tallies = read_tallies(folder, number)
        if not merged:
            merged = tallies
            continue
        for total, tally in zip(merged, tallies, strict=True):
            total.merge(tally)
    return merged


def check_removed(states: Sequence[dict[str, Any]], stage: int, max_removed: float, what: str, folder: Folder) -> None:
    """Stop where a stage has removed too much of a source.

    Args:
        states: of a pass.
        stage: its position in the pass.
        max_removed: largest share of a source's documents, where it has 1,000 or more.
        what: the stage, in the message.
        folder: where the rejected documents can be seen.

    Raises:
        UserError: with the table of the sources, and the option that allows it.
    """
    sources: dict[str, list[int]] = {}
    for state in states:
        entry = sources.setdefault(state["source"], [0, 0])
        came, stayed = state["flow"][stage]
        entry[0] += came
        entry[1] += came - stayed
    guard(sources, max_removed, what, f"minigpt-prep sample {folder} --rejected")


def guard(sources: dict[str, list[int]], max_removed: float, what: str, look: str) -> None:
    """Stop where a source of [documents, removed] lost too much; as `check_removed`."""
    over = [
        name
        for name, (documents, removed) in sources.items()
        if documents >= GUARD_DOCUMENTS and removed > max_removed * documents
    ]
    if not over:
        return
    width = max(6, *map(len, sources))
    rows = [f"  {'source':<{width}}  {'documents':>13}  {'removed':>13}"]
    for name, (documents, removed) in sources.items():
        mark = "  <-" if name in over else ""
        rows.append(f"  {name:<{width}}  {documents:>13,}  {removed:>13,}  {removed / max(documents, 1):>7.1%}{mark}")
    table = "\n".join(rows)
    needed = max(math.ceil(100 * sources[name][1] / sources[name][0]) / 100 for name in over)
    raise UserError(
        f"{what} removes more than {max_removed:.0%} of the documents of {', '.join(over)}:\n{table}\n"
        f"Look at them first: {look}. If it is right, allow it with --max-removed {needed:g} (in a recipe: "
        f"max_removed: {needed:g} among the stage's settings); what is done is kept"
    )


def _check_bad_rows(folder: Folder, bad: int, rows: int, share: float) -> None:
    if too_many_bad(bad, rows, share):
        raise UserError(
            f"{bad:,} of {rows:,} rows are bad, more than --max-bad-rows {share:g}. See them: "
            f"minigpt-prep sample {folder} --rejected --rule malformed. What is done is kept: run the same command "
            f"with a higher limit (in a recipe: max_bad_rows)"
        )


def _check_whole(folder: Folder, states: Sequence[dict[str, Any]], keep_going: bool) -> None:
    broken = [problem for state in states for problem in state["broken"]]
    if broken and not keep_going:
        problems = "\n  ".join(broken)
        raise UserError(
            f"{len(broken)} part(s) of the input cannot be read:\n  {problems}\n"
            f"The rest is done and kept in {folder}, but it is not finished. To finish it without them, run the same "
            f"command with --keep-going; or mend the files"
        )


def _remove_others(job: Job, parts: int) -> None:
    """Remove what an earlier run with more parts, or in the other format, has left."""
    rejected, state = job.folder.child(REJECTED), job.folder.child(STATE)
    product = [job.folder.child(job.product.name)] if job.product else []
    for folder in (job.folder, rejected, state, *product):
        for name in folder.names("part-*"):
            stem, _, suffix = name.removeprefix("part-").partition(".")
            unwanted = suffix in FORMATS and (suffix != job.format or (folder == job.folder and not job.writes))
            if unwanted or (stem.isdigit() and int(stem) >= parts):
                folder.remove(name)
        folder.remove_unfinished()
