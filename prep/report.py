"""The report of a run for people: one HTML page, and a table for the terminal, from what report.json holds.

Counts in a funnel add up: each document is removed by the first rule that it breaks, each stage sees what the one
before it left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prep.report_pictures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, histogram_picture
from shards.pages import amount, render_page, visible

WARN_SHARE = 0.95  # a filter that removes that much is more likely wrong than right
CLUSTER_SIZES = (2, 3, 4, 5, 9, 17, 33, 65, 129, 257, 513, 1025)  # first size of each bar


def size(number: float) -> str:
    """Bytes in three digits: '831 B', '4.20 GB' (powers of 1,000)."""
    text = amount(number)
    return f"{text} B" if text[-1].isdigit() else text[:-1] + {"K": "kB", "M": "MB", "B": "GB", "T": "TB"}[text[-1]]


def percent(part: float, whole: float) -> str:
    """A share for people; what is not nothing does not read as nothing, what is not all not as all."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "< 0.1 %"
    if 99.95 <= share < 100:
        return "> 99.9 %"
    return f"{share:.1f} %"


def duration(seconds: float) -> str:
    """'12.3 s', '3 min 12 s', '2 h 05 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def compared(value: float | None, threshold: float | None) -> str:
    """What was measured and the bound, with digits enough to tell them apart: '31 < 50', '0.7996 < 0.8'."""
    numbers = [number for number in (value, threshold) if number is not None and math.isfinite(number)]
    if len(numbers) < 2:
        return _digits(numbers[0], 4) if numbers else ""
    for precision in range(4, 18):
        texts = [_digits(number, precision) for number in numbers]
        if texts[0] != texts[1] or numbers[0] == numbers[1]:
            break
    sign = "<" if numbers[0] < numbers[1] else ">" if numbers[0] > numbers[1] else "="
    return f"{texts[0]} {sign} {texts[1]}"


def _digits(number: float, precision: int) -> str:
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    return f"{number:,.1f}" if abs(number) >= 1000 and precision == 4 else f"{number:.{precision}g}"


def _sum(rows: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(row[key] or 0 for row in rows)


def funnel(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is left after each stage, and what each rule removed, from the rows of the input on.

    Returns:
        Per stage `name`, `before` and `left` (documents), `bytes_before` and `bytes_left`, and `rules`, each with
        `name`, `short` (without the stage's name), `removed`, `bytes` and `left` behind it. The first stage is 'read':
        bytes of rows that are no documents are not known (None).
    """
    sources, stages = report["sources"], report["stages"]
    read = _sum(sources, "documents") if sources else stages[0]["documents_in"] if stages else 0
    read_bytes = _sum(sources, "bytes") if sources else stages[0]["bytes_in"] if stages else 0
    rows = max(_sum(sources, "rows"), read)
    result = [{"name": "read", "before": rows, "left": read, "bytes_before": read_bytes, "bytes_left": read_bytes}]
    first = [(name, _sum(sources, name), None) for name in ("malformed", "empty")]
    result[0]["rules"] = _waterfall("read", rows, [rule for rule in first if rule[1]])
    for stage in stages:
        removed = [(rule["name"], rule["documents"], rule["bytes"]) for rule in stage["rules"]]
        result.append(
            {
                "name": stage["name"],
                "before": stage["documents_in"],
                "left": stage["documents_out"],
                "bytes_before": stage["bytes_in"],
                "bytes_left": stage["bytes_out"],
                "rules": _waterfall(stage["name"], stage["documents_in"], removed),
            }
        )
    return result


def _waterfall(stage: str, left: int, rules: list[tuple[str, int, int | None]]) -> list[dict[str, Any]]:
    result = []
    for name, removed, size_removed in rules:
        left -= removed
        short = name.removeprefix(f"{stage}.")
        result.append({"name": name, "short": short, "removed": removed, "bytes": size_removed, "left": left})
    return result


def find_warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must not miss: broken files, bad rows, filters that removed nearly all, nothing left."""
    lines = [f"broken: {message}" for message in report["broken"]]
    if repeated := describe_repeated(report.get("repeated_ids")):
        lines.append(repeated)
    for source in report["sources"]:
        if source["malformed"]:
            lines.append(
                f"{source['name']}: {source['malformed']:,} of {source['rows']:,} rows "
                f"({percent(source['malformed'], source['rows'])}) are malformed; rejected/ holds them with file, row "
                "and reason (rule 'malformed')"
            )
        if source["documents"] and not source["kept_documents"]:
            lines.append(f"{source['name']}: none of its {source['documents']:,} documents is left")
    for stage in report["stages"]:
        came, removed = stage["documents_in"], stage["documents_in"] - stage["documents_out"]
        if came and removed >= WARN_SHARE * came:
            most = max(stage["rules"], key=lambda rule: rule["documents"], default=None)
            by = f", most of them by {most['name']} ({most['documents']:,})" if most and most["documents"] else ""
            lines.append(
                f"{stage['name']} removed {percent(removed, came)} of the {came:,} documents that reached it{by}: "
                "look at its rejects before you trust it"
            )
    return lines


def describe_repeated(repeated: Mapping[str, Any] | None) -> str | None:
    """A line about ids that come more than once (see `prep.repeated_ids.count_repeated`), if there are any."""
    numbers = []
    if repeated and repeated["within"]:
        numbers.append(f"{repeated['within']:,} within one part of the input")
    if repeated and repeated["across"]:
        number = f"{repeated['across']:,}" if repeated["exact"] else f"about {amount(repeated['across'])}"
        numbers.append(f"{number} in several parts")
    if not numbers:
        return None
    return (
        f"ids that come more than once: {', '.join(numbers)}; what was removed is named by id (choose another column "
        "with --id-column, or id_column of a source)"
    )


def _cluster_bars(clusters: Mapping[str, int]) -> list[dict[str, Any]]:
    """Clusters by size, large sizes in octaves: label, number of clusters, documents in them."""
    bars: dict[int, list[int]] = {}
    for text, number in clusters.items():
        members = int(text)
        place = max(start for start in CLUSTER_SIZES if start <= max(members, 2))
        entry = bars.setdefault(place, [0, 0])
        entry[0] += number
        entry[1] += number * members
    ends = dict(zip(CLUSTER_SIZES, [*(start - 1 for start in CLUSTER_SIZES[1:]), None], strict=True))
    result = []
    for start, (number, documents) in sorted(bars.items()):
        end = ends[start]
        name = f"{start:,}+" if end is None else f"{start}" if end == start else f"{start}–{end}"
        result.append({"label": name, "clusters": number, "documents": documents})
    return result


def _dedup_pictures(dedup: Mapping[str, Any]) -> dict[str, Any]:
    """A deduplication and its pictures: bars of clusters by size, a histogram of similarities."""
    similarity = None
    if dedup.get("similarity"):
        bins = {"unit": "score", "low": None, "high": dedup["threshold"], **dedup["similarity"]}
        similarity = histogram_picture(bins, names=("", "threshold"))
    return {"dedup": dedup, "clusters": _cluster_bars(dedup.get("clusters") or {}), "similarity": similarity}


def _pictures(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": histogram["name"], "picture": picture}
        for histogram in stage["histograms"]
        if (picture := histogram_picture(histogram))
    ]


def render(report: Mapping[str, Any]) -> str:
    """The report as one self-contained HTML page.

    Args:
        report: what report.json holds. All its texts may be hostile: they are escaped, and what cannot be seen is
            written out.
    """
    rows = funnel(report)
    samples: dict[tuple[int, str], list[Mapping[str, Any]]] = {}  # two stages may have one name
    for place, stage in enumerate(report["stages"]):
        for sample in stage["samples"]:
            samples.setdefault((place, sample["rule"]), []).append(sample)
    removed = [{rule["name"]: rule["documents"] for rule in stage["rules"]} for stage in report["stages"]]
    seconds = report["seconds"] or 0.0
    values = {
        "report": report,
        "funnel": rows,
        "before": rows[0]["before"],
        "read": rows[0]["left"],
        "left": rows[-1]["left"],
        "bytes_read": rows[0]["bytes_left"],
        "bytes_left": rows[-1]["bytes_left"],
        "rate": f"{report['text_bytes'] / seconds / 1e6:,.3g} MB/s" if seconds > 0 else None,
        "warnings": find_warnings(report),
        "pictures": [(stage["name"], found) for stage in report["stages"] if (found := _pictures(stage))],
        "samples": [
            {
                "stage": report["stages"][place]["name"],
                "rule": rule,
                "samples": found,
                "removed": removed[place].get(rule),
            }
            for (place, rule), found in samples.items()
        ],
        "counts": [(stage["name"], stage["counts"]) for stage in report["stages"] if stage["counts"]],
        "dedups": [_dedup_pictures(dedup) for dedup in report["dedup"] or []],
        "config": json.dumps(report["config"], indent=2, ensure_ascii=False, default=str),
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "percent": percent,
        "compared": compared,
    }
    filters = {"amount": amount, "size": size, "duration": duration}
    return render_page(Path(__file__).parent / "report.html", values, filters)


def funnel_table(
    report: Mapping[str, Any], *, rejects: bool = False, projection: Mapping[str, float] | None = None
) -> list[Text | Table]:
    """The funnel for the terminal: what is left after each stage and what each rule removed.

    Args:
        report: what report.json holds.
        rejects: show up to three rejected documents of each rule below the table.
        projection: `documents` and `bytes` that the whole input would leave, estimated from a sample of it.
    """
    rows = funnel(report)
    all_rows = rows[0]["before"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage, rule", overflow="fold")
    for column in ("documents", "share", "text"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in rows:
        share = percent(stage["left"], all_rows)
        table.add_row(
            Text(visible(stage["name"])), amount(stage["left"]), share, size(stage["bytes_left"]), style="bold"
        )
        for rule in stage["rules"]:
            lost = "–" if rule["bytes"] is None else _minus(rule["bytes"], size)
            numbers = (_minus(rule["removed"], amount), percent(rule["removed"], all_rows), lost)
            table.add_row(Text("  " + visible(rule["name"])), *numbers, style="dim")
    result: list[Text | Table] = [table]
    result += [Text(f"warning: {visible(line)}", style="yellow") for line in find_warnings(report)]
    for stage in report["stages"] if rejects else []:
        seen: dict[str, int] = {}
        for sample in stage["samples"]:
            rule = sample["rule"]
            seen[rule] = seen.get(rule, 0) + 1
            if seen[rule] == 1:
                result.append(Text(f"\n{visible(stage['name'])}: {visible(rule)}", style="bold"))
            if seen[rule] <= 3:
                result.append(_reject_lines(sample))
    if projection:
        result.append(
            Text(
                f"\nEstimate for the whole input, from this sample of {rows[0]['left']:,} documents: about "
                f"{amount(projection['documents'])} documents, {size(projection['bytes'])} of text are left.",
                style="bold",
            )
        )
    return result


def _minus(number: int, shown: Any) -> str:
    return f"−{shown(number)}" if number else "0"


def _reject_lines(sample: Mapping[str, Any]) -> Text:
    parts = [visible(str(sample["id"])), visible(str(sample["source"]))]
    if measured := compared(sample["value"], sample["threshold"]):
        parts.append(measured)
    if sample["detail"]:
        parts.append(visible(str(sample["detail"])))
    excerpt = " ".join(visible(sample["excerpt"] or "").split())
    text = Text("  " + " · ".join(parts) + "\n", style="cyan")
    return text.append("    " + (excerpt if len(excerpt) <= 160 else excerpt[:160] + " …"), style="default")
