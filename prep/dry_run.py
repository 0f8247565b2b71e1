"""What stages would do, and what a deduplication would need, from a sample: nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa

from prep.dedup.explain import explain
from prep.dedup.passes import UnitHashes
from prep.dedup.settings import DedupSettings
from prep.documents import BrokenInput, Input
from prep.executors import count_cores
from prep.parts import Files, conform
from prep.pipeline import DedupStep, GuardedStep, stage_report, union_schema
from prep.sources import read_blocks
from prep.stages import NOTHING_ADDED, Step, Tally, run_steps, text_bytes

SAMPLE = 1_000  # documents of each source from which the size of the whole is estimated
FILES = 8  # of each source, evenly spread; the sample is taken from their beginnings


def dry_run(
    groups: Sequence[Files], steps: Sequence[Step | GuardedStep | DedupStep], number: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the stages over `number` documents of each source, deduplications left out.

    Returns:
        The report, as for a run, and `documents` and `bytes` that the whole input would leave: what each source keeps
        of its sample, times its size on the disk over that of the sample.
    """
    plain = [step.step if isinstance(step, GuardedStep) else step for step in steps if not isinstance(step, DedupStep)]
    schema = union_schema([files.schema for files in groups])
    tallies = [Tally(step.stage.name) for step in plain]
    sources: list[dict[str, Any]] = []
    projection = {"documents": 0.0, "bytes": 0.0}
    for files in groups:
        for source, run in groupby(files.inputs, key=lambda item: item.source):
            inputs = list(run)
            entry = dict.fromkeys(
                ("rows", "documents", "bytes", "empty", "malformed", "kept_documents", "kept_bytes"), 0
            )
            sources.append({"name": source, **entry})
            wanted = number if inputs[0].kind == "text" else FILES  # a text file is one document
            chosen = [inputs[position * len(inputs) // wanted] for position in range(wanted)]
            chosen = chosen if len(inputs) > wanted else inputs
            stored = 0.0
            for item in chosen:
                stored += _sample(item, files, schema, plain, tallies, -(-number // len(chosen)), sources[-1])
            total = sum(item.size for item in inputs)
            for name in projection:
                projection[name] += sources[-1][f"kept_{name}"] * total / max(stored, 1)
    report = {
        "stages": [stage_report(tally) for tally in tallies],
        "sources": sources,
        "text_bytes": sum(source["bytes"] for source in sources),
        "broken": [],
        "dedup": None,
        "decontamination": None,
        "tokens": None,
    }
    return report, projection


def explain_dedup(groups: Sequence[Files], step: Step | GuardedStep | DedupStep, workers: int) -> str:
    """What a deduplication of these inputs (or of any, if there are none) finds and needs.

    Args:
        groups: the inputs.
        step: the deduplication; documents of its reference count too.
        workers: processes; 0: one per core.
    """
    assert isinstance(step, DedupStep)
    settings, documents, units = step.settings, 0.0, 0.0
    for files in (*groups, *step.reference) if groups else ():
        counting = [Step(_CountUnits(settings))] if settings.level else []
        report, projection = dry_run([files], counting, SAMPLE)
        sampled = sum(source["kept_documents"] for source in report["sources"])
        documents += projection["documents"]
        for stage in report["stages"]:
            units += stage["counts"].get("units", 0) * projection["documents"] / max(sampled, 1)
    number = units if settings.level else documents
    return explain(settings, number=_about(number) if groups else None, workers=workers or count_cores())


@dataclass(frozen=True)
class _CountUnits:
    """Stage that counts the paragraphs or lines that a deduplication looks at."""

    settings: DedupSettings
    name: str = "units"
    adds: pa.Schema = NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Options."""
        return self.settings.describe()

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """All documents."""
        tally.count("units", len(UnitHashes(self.settings)(batch)["hashes"]))
        return batch


def _about(number: float) -> int:
    """In three digits: an estimate is not known better."""
    return int(float(f"{number:.3g}"))


def _sample(
    item: Input,
    files: Files,
    schema: Any,
    steps: Sequence[Step],
    tallies: Sequence[Tally],
    number: int,
    entry: dict[str, Any],
) -> float:
    """Run the first documents of a file through the stages; about how many bytes of the file they are."""
    seen = consumed = 0
    for block in read_blocks([item], files.columns, schema=files.schema):
        try:
            documents = block.load()
        except BrokenInput:
            continue
        batch = documents.batch.slice(0, number - seen)
        share = batch.num_rows / max(documents.batch.num_rows, 1)
        seen += batch.num_rows
        entry["rows"] += documents.rows
        entry["empty"] += documents.empty
        entry["malformed"] += len(documents.rejected)
        entry["documents"] += batch.num_rows
        entry["bytes"] += text_bytes(batch)
        before, consumed = consumed, block.consumed
        kept = run_steps(conform(batch, schema), steps, item.source, tallies)
        for tally in tallies:
            tally.rejected.clear()
        entry["kept_documents"] += kept.num_rows
        entry["kept_bytes"] += text_bytes(kept)
        if seen >= number:
            return before + (consumed - before) * share
    return float(consumed)
