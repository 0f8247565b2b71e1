"""The arithmetic of the report's histograms: bins, thresholds and ticks to places in a picture.

A count lies on a log2(1 + value) axis, a share or score on a plain one. The axis shows the bins that hold something and
the thresholds, not the empty rest. Heights grow with the square root of a bin's share of the documents, so that a thin
tail beside a tall peak, where thresholds mostly are, can still be seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH, HEIGHT = 380, 182
LEFT, RIGHT, TOP, BOTTOM = 46.0, 370.0, 32.0, 154.0
CHARACTER = 7.0  # width of one at the font size of the pictures, roughly
HEIGHT_TICKS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


def label(value: float, unit: str) -> str:
    """A place on an axis for people: '30 %' of a share, '100 K' of a count, '0.65' of a score."""
    if unit == "share":
        return f"{100 * value:.6g} %"
    if unit == "count":
        for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def histogram_picture(histogram: Mapping[str, Any], names: tuple[str, str] = ("min", "max")) -> dict[str, Any] | None:
    """Places and texts of everything in the picture of one histogram; None where it counted nothing.

    Args:
        histogram: `unit`, `low`, `high`, `counts` [n], `edges` [n + 1], as in report.json.
        names: what the lower and upper threshold are called.

    Returns:
        `bars`, `shades`, `thresholds`, `x_ticks`, `y_ticks`, `crop` (empty height above), `documents`, and `outside`:
        at least and at most which share of the documents lies beyond the thresholds, None without any. A bin that a
        threshold cuts is drawn on both sides as `uncertain`: how its documents divide is not known.
    """
    unit, low, high = histogram["unit"], _number(histogram["low"]), _number(histogram["high"])
    total = sum(histogram["counts"])
    if not total:
        return None
    bins, whole = _bins(histogram["edges"], histogram["counts"], unit)
    named = zip(names, (low, high), strict=True)
    texts = [f"{name} {label(value, unit)}" for name, value in named if value is not None]
    if whole:  # a bound itself is allowed: what goes begins at the next number
        low = None if low is None else float(math.ceil(low))
        high = None if high is None else math.floor(high) + 1.0
    limits = [value for value in (low, high) if value is not None]
    first, last = _extent(bins, limits, unit)
    start, stop = _along(first, unit), _along(last, unit)

    def place(value: float) -> float:
        inside = min(max(_along(value, unit), start), stop)
        return LEFT + (RIGHT - LEFT) * (inside - start) / (stop - start)

    top = max(count for _, _, count in bins) / total

    def height(share: float) -> float:
        return (BOTTOM - TOP) * math.sqrt(share / top)

    bars, least, most = [], 0.0, 0.0
    for lower, upper, count in bins:
        if not count:
            continue
        x, end = place(lower), place(upper)
        cuts = sorted({x, end} | {place(limit) for limit in limits if lower < limit < upper})
        share = count / total
        uncertain = len(cuts) > 2
        for begin, finish in itertools.pairwise(cuts):
            middle = (begin + finish) / 2
            removed = (low is not None and middle < place(low)) or (high is not None and middle > place(high))
            least += share if removed and not uncertain else 0.0
            gap = min(0.8, 0.2 * (finish - begin)) if finish == end else 0.0
            tall = max(height(share), 1.0)  # a bin with one document can be seen
            note = f"{_span(lower, upper, histogram['edges'][-1], unit, whole)}: {count:,} = {100 * share:.3g} %"
            bars.append({"x": begin, "width": finish - begin - gap, "y": BOTTOM - tall, "height": tall} | {
                "removed": removed, "uncertain": uncertain, "note": note
            })  # fmt: skip
        most += share if uncertain or bars[-1]["removed"] else 0.0
    lines = _thresholds(texts, [place(limit) for limit in limits])
    shades = []
    if low is not None and place(low) > LEFT:
        shades.append({"x": LEFT, "width": place(low) - LEFT})
    if high is not None and place(high) < RIGHT:
        shades.append({"x": place(high), "width": RIGHT - place(high)})
    return {
        "bars": bars,
        "shades": shades,
        "thresholds": lines,
        "x_ticks": _x_ticks(first, last, unit, place),
        "y_ticks": _y_ticks(top, height),
        "outside": (least, most) if limits else None,
        "documents": total,
        "crop": TOP - 8 if not limits else 13 if all(line["text_y"] > TOP - 10 for line in lines) else 0,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _along(value: float, unit: str) -> float:
    return math.log2(1 + max(value, 0.0)) if unit == "count" else value


def _bins(edges: list[float], counts: list[int], unit: str) -> tuple[list[tuple[float, float, int]], bool]:
    """(lower edge, upper edge, count) of each bin, and whether the values are whole numbers, as far as bins can tell.

    Bins of a count are narrower than 1 at first, so that some can hold no whole number. Where just these are empty, a
    bin goes from its first whole number to the first one of the next.
    """
    bins = list(zip(edges, edges[1:], counts, strict=False))
    first = [math.ceil(lower - 1e-9) for lower, *_ in bins]
    holds = [start < upper - 1e-9 for start, (_, upper, _) in zip(first, bins, strict=True)]
    if unit != "count" or any(count and not can for (*_, count), can in zip(bins, holds, strict=True)):
        return bins, False
    starts = [(float(start), count) for start, can, (*_, count) in zip(first, holds, bins, strict=True) if can]
    ends = [*(start for start, _ in starts[1:]), edges[-1]]
    return [(start, end, count) for (start, count), end in zip(starts, ends, strict=True)], True


def _extent(bins: list[tuple[float, float, int]], limits: Iterable[float], unit: str) -> tuple[float, float]:
    """First and last value of the axis: bins that hold something and thresholds, with some room around them."""
    used = [number for number, (*_, count) in enumerate(bins) if count]
    first, last = bins[max(used[0] - 1, 0)][0], bins[used[-1]][1]
    for limit in limits:
        within = [number for number, (lower, upper, _) in enumerate(bins) if lower <= limit < upper]
        around = within[0] if within else 0 if limit < bins[0][0] else len(bins) - 1
        first = min(first, limit, bins[max(around - 2, 0)][0])
        last = max(last, limit, bins[min(around + 2, len(bins) - 1)][1])
    if unit == "count":
        return first, max(last, 2 * first + 3)
    if last - first < 0.1:
        first = max(0.0, min(first, last - 0.1))
        last = first + 0.1
    if last > 0.75:
        last = max(last, 1.0)
    return (min(first, 0.0) if first < 0.25 else first), last


def _span(lower: float, upper: float, end: float, unit: str, whole: bool) -> str:
    """What a bin holds, in words; the last one also what lies beyond it."""
    if upper >= end:
        return f"{label(lower, unit)} and more"
    last = upper - 1 if whole else upper
    return label(lower, unit) if last == lower else f"{label(lower, unit)} to {label(last, unit)}"


def _thresholds(texts: list[str], places: list[float]) -> list[dict[str, Any]]:
    """Lines with their texts above the picture, in two rows where one is too narrow."""
    found: list[dict[str, Any]] = []
    for text, x in zip(texts, places, strict=True):
        half = CHARACTER * len(text) / 2
        middle = min(max(x, LEFT + half), RIGHT - half)
        if found and middle - half < found[-1]["text_x"] + found[-1]["half"] + 8:
            found[-1]["text_y"] = TOP - 19
        found.append({"x": x, "text": text, "text_x": middle, "text_y": TOP - 6, "half": half})
    return found


def _x_ticks(first: float, last: float, unit: str, place: Any) -> list[dict[str, Any]]:
    if unit == "count":
        digits = (1, 2, 5) if math.log10((last + 1) / (first + 1)) < 2 else (1,)
        values = [0.0] + [float(digit * 10**power) for power in range(13) for digit in digits]
        if math.log10((last + 1) / (first + 1)) < 1:
            values = [value for value in _even(first, last, 8) if value == int(value)]
    else:
        values = _even(first, last, 5)
    ticks: list[dict[str, Any]] = []
    for value in values:
        if not first - 1e-9 <= value <= last + 1e-9:
            continue
        x, text = place(value), label(value, unit)
        half = CHARACTER * len(text) / 2
        middle = min(x, WIDTH - 2 - half)
        if not ticks or middle - half > ticks[-1]["text_x"] + ticks[-1]["half"] + 8:
            ticks.append({"x": x, "text": text, "text_x": middle, "half": half})
    return ticks


def _even(first: float, last: float, number: int) -> list[float]:
    """Round numbers, about so many."""
    raw = (last - first) / number
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * digit for digit in (1, 2, 2.5, 5, 10) if size * digit >= raw - 1e-12)
    return [round(place * step, 10) for place in range(math.ceil(first / step - 1e-9), int(last / step + 1e-9) + 1)]


def _y_ticks(top: float, height: Any) -> list[dict[str, Any]]:
    ticks: list[dict[str, Any]] = [{"y": BOTTOM, "text": "0"}]
    for share in reversed([tick for tick in HEIGHT_TICKS if tick <= top]):
        y = BOTTOM - height(share)
        if all(abs(y - tick["y"]) >= 22 for tick in ticks):
            ticks.append({"y": y, "text": label(share, "share")})
    return ticks
