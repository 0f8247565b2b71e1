"""Documents of a stage's folder in the terminal: those that stayed, or those that were removed and why.

The choice depends on the folder and the seed alone. It is spread evenly over the folder, and little is read for it: of
Parquet parts the counts of rows, then the row groups of the chosen documents. Only a wanted rule or source makes a
scan, of just these columns. Parts in JSON Lines have no such counts: of them, as many are read as documents are wanted.

What was removed is looked for in all passes: of a recipe in `before-dedup/rejected` as well as in `documents/rejected`,
of a deduplication in `scratch/rejected` and `rejected`. Then each document's header names its folder.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prep.part_writer import find_parts, read_metadata, read_part
from prep.report import compared
from prep.stages import REASON_COLUMNS
from prep.storage import Folder
from shards.errors import UserError, unknown_name
from shards.pages import visible

READERS = 8  # parts looked at at a time: on object storage each is a few round trips
VALUE_CHARACTERS = 100  # of another column's value in the header of a document


class Rows(NamedTuple):
    """Rows of one part that are read together: `number` of its group `group`."""

    part: str
    group: int
    number: int


def show(
    folder: str,
    *,
    rejected: bool = False,
    rule: str | None = None,
    number: int = 5,
    seed: int = 0,
    source: str | None = None,
    characters: int | None = 1000,
) -> None:
    """Print documents of a stage's folder.

    Args:
        folder: path or address of the folder.
        rejected: those that were removed instead of those that stayed; without a rule, the rules are counted first.
        rule: only those that this rule removed (and so `rejected`).
        number: how many.
        seed: other seeds choose other documents.
        source: only those of this source.
        characters: where a text is cut; None shows all of it.

    Raises:
        UserError: if this is no stage's folder, a part is damaged, or no document has the rule or source.
    """
    place = Folder(folder)
    console = Console()
    rejected = rejected or rule is not None
    *before, own = _passes(place)
    names = _parts(place, own)
    removed_names = [name for below in (*before, own) for name in _parts(place, f"{below}rejected/")]
    if not (names or removed_names or place.exists("manifest.json")):
        raise UserError(
            f"{folder}: not the folder of a stage: that is what minigpt-prep filter, dedup, decontaminate and run "
            "write, with part-00000.parquet (or .jsonl.zst), rejected/ and manifest.json in it"
        )
    if rejected:
        names = removed_names
    if rejected and rule is None and names:
        rules = _rules(place, names, source)
        if rules.row_count:
            console.print(rules, "")
    wanted = {name: value for name, value in (("rule", rule), ("source", source)) if value is not None}
    rows = _look(place, names, wanted, number, seed)
    if not any(found.number for found in rows):
        _explain_nothing(place, names, wanted)
        what = "no document was rejected" if rejected else "no document is left in it"
        console.print(Text(f"{visible(folder)}: {what}"), soft_wrap=True)
        return
    for count, (part, document) in enumerate(_take(place, rows, wanted, number, seed), 1):
        below = part.rpartition("/")[0] if before or own else ""
        for text in _document(document, count, characters, below):
            console.print(text, soft_wrap=True)


def choose(total: int, number: int, seed: int) -> list[int]:
    """Numbers below `total` in order, one from each of `number` stretches of equal length; all if there are no more."""
    if number >= total:
        return list(range(total))
    draw = random.Random(seed)
    borders = [total * place // number for place in range(number + 1)]
    return [draw.randrange(start, stop) for start, stop in pairwise(borders)]


def _passes(place: Folder) -> list[str]:
    """Where below it the passes lie that have rejected documents: "scratch/" and "" for a stage; last what stays."""
    own, before = "", "scratch"
    if any(_is_pass(place, name) for name in ("documents", "before-dedup")):  # a recipe's
        own, before = "documents/", "before-dedup"
    earlier: list[str] = []
    while _is_pass(place, name := before + (f"-{len(earlier) + 1}" if earlier else "")):
        earlier.append(f"{name}/")
    return [*earlier, own]


def _is_pass(place: Folder, name: str) -> bool:
    try:
        return bool(place.child(name).child("state").names())
    except NotADirectoryError:
        return False


def _parts(place: Folder, below: str) -> list[str]:
    try:
        found = find_parts(place.child(below.removesuffix("/")) if below else place)
    except NotADirectoryError:
        return []
    return [below + name for name in found]


def _matching(batch: pa.RecordBatch, wanted: Mapping[str, str]) -> pa.RecordBatch:
    for column, value in wanted.items():
        batch = batch.filter(pc.equal(batch.column(column), value))
    return batch


def _may_match(group: Any, wanted: Mapping[str, str]) -> bool:
    """Whether a row group's statistics leave room for the wanted values."""
    for index in range(group.num_columns):
        column = group.column(index)
        value = wanted.get(column.path_in_schema)
        if value is not None and column.is_stats_set and (found := column.statistics).has_min_max:
            low, high = found.min, found.max
            # Long values may stand cut in the statistics, the upper one then raised: the borders still hold.
            if isinstance(low, str) and isinstance(high, str) and not low.encode() <= value.encode() <= high.encode():
                return False
    return True


def _look_at_part(folder: Folder, name: str, wanted: Mapping[str, str]) -> list[Rows]:
    columns = list(wanted) or ["id"]
    metadata = read_metadata(folder, name)
    if metadata is None:
        batches = read_part(folder, name, columns)
        return [Rows(name, number, _matching(batch, wanted).num_rows) for number, batch in enumerate(batches)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if not wanted:
        return [Rows(name, number, group.num_rows) for number, group in enumerate(groups)]
    possible = [number for number, group in enumerate(groups) if group.num_rows and _may_match(group, wanted)]
    found = zip(possible, read_part(folder, name, columns, groups=possible), strict=True)
    return [Rows(name, number, _matching(batch, wanted).num_rows) for number, batch in found]


def _look(folder: Folder, names: Sequence[str], wanted: Mapping[str, str], number: int, seed: int) -> list[Rows]:
    """Where how many of the wanted rows lie."""
    if not wanted and names and not names[0].endswith(".parquet"):
        names = [names[place] for place in choose(len(names), number, seed)]
    with ThreadPoolExecutor(READERS) as pool:
        return [rows for found in pool.map(lambda name: _look_at_part(folder, name, wanted), names) for rows in found]


def _take(
    folder: Folder, rows: Sequence[Rows], wanted: Mapping[str, str], number: int, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chosen documents with their parts, in the folder's order; one group is in memory at a time."""
    chosen = choose(sum(found.number for found in rows), number, seed)
    start = 0
    for found in rows:
        places = [place - start for place in chosen if start <= place < start + found.number]
        start += found.number
        for batch in read_part(folder, found.part, groups=[found.group]) if places else ():
            for row in _matching(batch, wanted).take(pa.array(places)).to_pylist():
                yield found.part, row


def _values(folder: Folder, names: Sequence[str], columns: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How many rows have which values in some columns."""

    def count(name: str) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for batch in read_part(folder, name, columns):
            table = pa.Table.from_batches([batch]).group_by(list(columns)).aggregate([([], "count_all")])
            for row in table.to_pylist():
                found[tuple(row[column] for column in columns)] += row["count_all"]
        return found

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(count, names), Counter())


def _rules(folder: Folder, names: Sequence[str], source: str | None) -> Table:
    """How many documents each rule removed, the most first."""
    columns = ["stage", "rule", "source"]
    found: Counter[tuple[str, str]] = Counter()
    for (stage, rule, of), number in _values(folder, names, columns).items():
        if source in (None, of):
            found[stage, rule] += number
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("stage", "rule"):
        table.add_column(column, overflow="fold")
    table.add_column("rejected", justify="right", no_wrap=True)
    for (stage, rule), number in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(Text(visible(stage)), Text(visible(rule)), f"{number:,}")
    return table


def _explain_nothing(folder: Folder, names: Sequence[str], wanted: Mapping[str, str]) -> None:
    """If nothing has the wanted values although there are rows: say what there is."""
    for column, value in wanted.items():
        known = {str(values[0]) for values in _values(folder, names, [column])}
        if known and value not in known:
            raise UserError(f"{folder.uri}: {unknown_name(column, value, known)}")
    if len(wanted) > 1 and names:
        raise UserError(f"{folder.uri}: rule '{wanted['rule']}' removed nothing of source '{wanted['source']}'")


def _document(row: Mapping[str, Any], count: int, characters: int | None, below: str) -> Iterator[Text]:
    """A header with the folder that it lies in, why it was removed if it was, its other columns, its text."""
    text = row["text"]
    header = Text(f"── {count} ", style="dim").append(visible(str(row["id"])), style="bold default")
    place = f" · in {visible(below)}" if below else ""
    yield header.append(f" · {visible(str(row['source']))} · {len(text):,} characters{place}", style="default")
    if row.get("rule") is not None:
        parts = [visible(f"{row['rule']}"), compared(row["value"], row["threshold"])]
        parts.append(visible(row["detail"] or ""))
        if row["keeper"] is not None:
            parts.append(f"duplicate of {visible(row['keeper'])}")
        if row["similarity"] is not None:
            parts.append(f"similarity {row['similarity']:.3f}")
        yield Text("   " + " · ".join(part for part in parts if part), style="yellow")
    known = {"id", "text", "source", *REASON_COLUMNS.names}
    if others := {name: value for name, value in row.items() if name not in known and value is not None}:
        yield Text("   " + "  ".join(f"{visible(name)}={_short(value)}" for name, value in others.items()), style="dim")
    cut = text if characters is None else text[:characters]
    shown = Text(visible(cut))
    if len(cut) < len(text):
        shown.append(f" … {len(text) - len(cut):,} more characters", style="dim")
    yield shown
    yield Text("")


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(visible(str(value)).split())
    return text if len(text) <= VALUE_CHARACTERS else text[:VALUE_CHARACTERS] + "…"
