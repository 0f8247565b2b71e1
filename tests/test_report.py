"""The report's page and terminal tables, from reports with everything, with nothing, and with hostile texts."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from prep.report import compared, duration, find_warnings, funnel, funnel_table, percent, render, size
from prep.report_pictures import BOTTOM, LEFT, RIGHT, TOP, WIDTH, histogram_picture
from prep.stages import Tally
from shards.pages import HIDDEN, visible

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = (
    "<script>alert(1)</script>\x00\x1b[31m</pre></details>\u202egnp.exe\ud800 é漢字🦊 e\u0301"
    + "\u0336" * 9
    + "\n\n&amp;"
)
EXCERPT = (
    "Cookie policy | Terms | Contact us\nClick here to subscribe >>>\n\nCopyright 2019. All rights reserved. "
    "This site uses cookies to give you the best experience. " * 3
)


def drawn(name: str, values: Any, unit: Any, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A histogram as report.json holds it."""
    tally = Tally("stage")
    tally.histogram(name, np.asarray(values, float), unit=unit, low=low, high=high)
    histogram = tally.histograms[name]
    return {"name": name, **vars(histogram), "edges": histogram.edges()}


def sample(rule: str, value: float | None = None, threshold: float | None = None, **more: Any) -> dict[str, Any]:
    fixed = {"id": "web/CC-MAIN-2019-35.jsonl.zst:48213", "source": "web", "detail": None, "keeper": None}
    found = {"rule": rule, "value": value, "threshold": threshold, "similarity": None, "excerpt": EXCERPT}
    return fixed | found | more


def stage(name: str, came: tuple[int, int], rules: dict[str, tuple[int, int]], **more: Any) -> dict[str, Any]:
    left = tuple(number - sum(removed[i] for removed in rules.values()) for i, number in enumerate(came))
    return {
        "name": name,
        "documents_in": came[0],
        "bytes_in": came[1],
        "documents_out": left[0],
        "bytes_out": left[1],
        "rules": [{"name": rule, "documents": n, "bytes": b} for rule, (n, b) in rules.items()],
        "counts": {},
        "histograms": [],
        "samples": [],
    } | more


def full_report() -> dict[str, Any]:
    """What a run over two sources might leave, every section filled."""
    rng = np.random.default_rng(0)
    words = np.floor(np.exp(rng.normal(6, 1.4, 20_000)))
    first = stage(
        "language",
        (1_203_447, 4_218_330_112),
        {"language.score": (214_602, 611_220_400)},
        histograms=[drawn("language.score", 1 - rng.beta(0.5, 4, 20_000), "score", low=0.65)],
        samples=[sample("language.score", 0.6499, 0.65, detail="de", excerpt="Übergrößenträger für Straßenbahnen")],
    )
    rules = {
        "gopher_quality.word_count": (51_020, 9_220_100),
        "gopher_quality.mean_word_length": (6_401, 20_310_000),
        "gopher_quality.symbols_to_words": (3, 18_211),
        "gopher_quality.bullet_lines": (0, 0),
        "gopher_quality.alphabetic_words": (88_230, 301_220_987),
        "gopher_quality.stop_words": (40_112, 33_018_001),
    }
    second = stage(
        "gopher_quality",
        (988_845, 3_607_109_712),
        rules,
        histograms=[
            drawn("word_count", words, "count", low=50, high=100_000),
            drawn("mean_word_length", rng.normal(4.8, 0.7, 20_000), "count", low=3, high=10),
            drawn("symbols_to_words", rng.exponential(0.01, 20_000), "share", high=0.1),
            drawn("bullet_lines", np.zeros(20_000), "share", high=0.9),
            drawn("alphabetic_words", 1 - rng.beta(1.3, 9, 20_000), "share", low=0.8),
            drawn("stop_words", rng.poisson(4, 20_000), "count", low=2),
        ],
        samples=[sample("gopher_quality.word_count", number, 50.0) for number in (31, 12, 49)]
        + [sample("gopher_quality.symbols_to_words", 0.10002, 0.1)],
    )
    left = (second["documents_out"], second["bytes_out"])
    third = stage("mask", left, {}, counts={"masked.email": 31_022, "masked.ip": 801, "lines.javascript": 120_331})
    third["bytes_out"] -= 1_200_331
    dedup = stage(
        "dedup",
        (left[0], third["bytes_out"]),
        {"exact": (31_002, 90_012_332), "minhash": (120_331, 320_330_121)},
        samples=[sample("minhash", 0.8732, 0.8, keeper="web/CC-MAIN-2019-30.jsonl.zst:7", similarity=0.8732)],
    )
    clusters = {"2": 30_120, "3": 9_801, "4": 2_001, "5": 822, "6": 201, "11": 30, "40": 12, "2048": 1}
    edges = [number / 50 for number in range(51)]
    counts = [0] * 25 + [int(900 * math.exp(-((x - 0.6) ** 2) / 0.01) + 1200 * x**12) for x in edges[25:50]]
    return {
        "title": "fineweb",
        "command": "minigpt-prep run configs/data/recipes/fineweb.yaml --workers 2",
        "config": {"stages": [{"filter": "gopher"}], "max_removed": 0.5},
        "unicode": "14.0.0",
        "seconds": 192.4,
        "text_bytes": 4_218_330_112,
        "workers": 2,
        "sources": [
            source("web", 1_200_012, 1_199_871, 4_200_330_112, 120, 21, 648_269, 2_800_330_112),
            source("books", 3_576, 3_576, 18_000_000, 0, 0, 3_477, 17_900_000),
        ],
        "broken": ["data/web/CC-MAIN-2019-35.jsonl.gz: ends in the middle (row 48,213 is the last)"],
        "stages": [first, second, third, dedup],
        "dedup": [
            {
                "method": "minhash",
                "threshold": 0.8,
                "bands": 18,
                "rows": 7,
                "documents": left[0],
                "removed": 151_333,
                "candidates": 402_118,
                "verified": 171_002,
                "clusters": clusters,
                "similarity": {"edges": edges, "counts": counts},
            }
        ],
        "decontamination": [
            {"benchmark": "gsm8k", "items": 1319, "items_found": 12, "documents": 31, "bytes": 120_331},
            {"benchmark": "mmlu", "items": 14_042, "items_found": 0, "documents": 0, "bytes": 0},
        ],
        "tokens": [
            {"name": "web", "documents": 648_269, "tokens": 612_330_112, "bytes": 2.8e9, "bytes_per_token": 4.573},
            {"name": "books", "documents": 3_477, "tokens": 4_012_331, "bytes": 1.79e7, "bytes_per_token": None},
        ],
    }


def source(name: str, rows: int, documents: int, size: int, empty: int, bad: int, kept: int, kept_bytes: int) -> Any:
    return {
        "name": name,
        "rows": rows,
        "documents": documents,
        "bytes": size,
        "empty": empty,
        "malformed": bad,
        "kept_documents": kept,
        "kept_bytes": kept_bytes,
    }


def empty_report() -> dict[str, Any]:
    fixed = {"title": "filter", "command": "minigpt-prep filter x", "config": {}, "unicode": "14.0.0", "workers": 1}
    lists: dict[str, Any] = {"sources": [], "broken": [], "stages": []}
    nothing = {"dedup": None, "decontamination": None, "tokens": None}
    return {**fixed, "seconds": 0.0, "text_bytes": 0, **lists, **nothing}


class Page(HTMLParser):
    """Balanced tags, and all text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.addresses: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def terminal(report: dict[str, Any], width: int = 100, **options: Any) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        for part in funnel_table(report, **options):
            console.print(part)
    return capture.get()


def test_the_page_holds_every_section_and_rule():
    report = full_report()
    content = render(report)
    page = Page(content)
    assert page.addresses == []
    assert not re.search(r"url\(|@import|https?:", content)
    for stage_ in report["stages"]:
        assert stage_["name"] in page.text
        assert all(f'title="{rule["name"]}"' in content for rule in stage_["rules"])
        assert all(rule["name"].split(".")[-1] in page.text for rule in stage_["rules"])
        assert all(histogram["name"] in page.text for histogram in stage_["histograms"])
        assert all(name in page.text for name in stage_["counts"])
    for expected in (
        report["command"],
        "left of 1.20 M · 54.2 %",
        "left of 4.22 GB",
        "3 min 12 s",
        "21.9 MB/s · 2 workers",
        "31 < 50",
        "0.10002 > 0.1",
        "0.6499 < 0.65",
        "duplicate of web/CC-MAIN-2019-30.jsonl.zst:7, similarity 0.873",
        "ends in the middle",
        "21 of 1,200,012 rows (< 0.1 %) are malformed",
        "gsm8k",
        "33–64 documents",
        "1,025+ documents",
        "max 100 K",
        "min 80 %",
        "616 M",
    ):
        assert expected in page.text, expected
    assert page.seen["details"] == 5  # four rules with samples, the configuration
    assert page.seen["svg"] == 8
    assert "None" not in page.text
    assert "nan" not in page.text


def test_the_page_of_nothing_is_a_page():
    page = Page(render(empty_report()))
    assert "svg" not in page.seen
    assert page.seen["section"] == 6  # three cards, the funnel, its table, the configuration
    report = empty_report()
    report["stages"] = [stage("filter", (0, 0), {"filter.rule": (0, 0)}, histograms=[drawn("x", [], "count", low=1)])]
    report["dedup"] = [dict.fromkeys(full_report()["dedup"][0]) | {"method": "exact"}]
    report["sources"] = [source("web", 0, 0, 0, 0, 0, 0, 0)]
    page = Page(render(report))
    assert "rule" in page.text
    assert "svg" not in page.seen
    assert "None" not in page.text


def test_the_page_shows_each_of_two_deduplications():
    report = full_report()
    exact = dict.fromkeys(report["dedup"][0]) | {"method": "exact", "threshold": 1.0, "clusters": {"2": 7}}
    lines = dict.fromkeys(report["dedup"][0]) | {"method": "line", "threshold": 0.5, "documents": 90, "removed": 3}
    report["dedup"] = [exact, *report["dedup"], lines]
    report["stages"].insert(0, stage("dedup", (9, 9), {"exact": (7, 7)}, samples=[sample("exact", 1.0, None)]))
    report["stages"][-1]["samples"].append(sample("exact", 1.0, None))
    page = Page(render(report))
    for expected in (
        "exact",
        "minhash",
        "line",
        "3.3 %",
        "Clusters of deduplication 1 by size",
        "candidates of dedupl",
    ):
        assert expected in page.text, expected
    assert "deduplication 3" not in page.text  # it has no clusters
    assert page.seen["details"] == 7  # the samples of both stages apart
    assert "None" not in page.text


def poisoned(value: Any, key: str = "") -> Any:
    """The report with hostile text in place of each string but units and sizes of clusters."""
    if isinstance(value, dict):
        return {key: poisoned(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return HOSTILE if isinstance(value, str) and key != "unit" else value


def test_hostile_texts_stay_texts():
    report = full_report()
    report["stages"][2]["counts"] = {HOSTILE: 1}
    content = render(poisoned(report))
    content.encode()  # no lone surrogate is left
    page = Page(content)
    assert page.seen.keys() == Page(render(report)).seen.keys()  # no tag that is not the page's own
    assert "<script>" in page.text
    assert not HIDDEN.search(content)
    assert "␀␛[31m" in page.text
    assert "⟨202E⟩gnp.exe⟨D800⟩ é漢字🦊" in page.text
    printed = terminal(poisoned(report), rejects=True)
    assert not HIDDEN.search(printed)
    assert "<script>alert(1)" in printed


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters()))
def test_any_text_can_be_shown(text):
    shown = visible(text)
    assert not HIDDEN.search(shown)
    assert shown.isprintable() or set(shown) & set("\t\n") or not text.isprintable()
    report = empty_report()
    report["stages"] = [stage("x", (2, 9), {"r": (1, 4)}, samples=[sample("r", excerpt=text)])]
    page = Page(render(report))
    assert shown.strip() in page.text


def test_funnel_adds_up():
    rows = funnel(full_report())
    assert [row["name"] for row in rows] == ["read", "language", "gopher_quality", "mask", "dedup"]
    assert rows[0]["before"] - rows[0]["left"] == 120 + 21
    assert [rule["name"] for rule in rows[0]["rules"]] == ["malformed", "empty"]
    for row in rows:
        assert row["left"] == (row["rules"][-1]["left"] if row["rules"] else row["before"])
    assert all(before["left"] == after["before"] for before, after in pairwise(rows))


def test_warnings_name_the_filter_that_takes_nearly_all():
    report = empty_report()
    report["stages"] = [stage("language", (1000, 9000), {"language.score": (940, 1), "language.unknown": (10, 1)})]
    (line,) = find_warnings(report)
    assert line.startswith("language removed 95.0 % of the 1,000 documents that reached it, most of them by")
    assert "language.score (940)" in line
    report["stages"] = [stage("language", (1000, 9000), {"language.score": (949, 1)})]
    assert find_warnings(report) == []
    report["sources"] = [source("web", 10, 10, 99, 0, 0, 0, 0)]
    assert find_warnings(report) == ["web: none of its 10 documents is left"]


def test_terminal_table():
    printed = terminal(full_report())
    assert re.search(r"^read +1\.20 M +> 99\.9 % +4\.22 GB *$", printed, re.M)
    assert re.search(r"^  gopher_quality\.word_count +−51\.0 K +4\.2 % +−9\.22 MB *$", printed, re.M)
    assert re.search(r"^  gopher_quality\.bullet_lines +0 +0\.0 % +0 *$", printed, re.M)
    assert re.search(r"^dedup +652 K +54\.2 % ", printed, re.M)
    assert "warning: broken: data/web" in printed
    assert "Cookie" not in printed
    assert "Estimate" not in printed


def test_terminal_rejects_and_projection():
    report = full_report()
    report["stages"][1]["samples"].append(sample("gopher_quality.word_count", 7, 50))
    printed = terminal(report, width=240, rejects=True, projection={"documents": 3.2e9, "bytes": 1.1e13})
    assert re.findall(r"(\d+) < 50", printed) == ["31", "12", "49"]
    assert "  web/CC-MAIN-2019-35.jsonl.zst:48213 · web · 0.6499 < 0.65 · de\n    Übergrößen" in printed
    assert "Cookie policy | Terms | Contact us Click here" in printed  # on one line
    assert "Estimate for the whole input, from this sample of 1,203,447 documents: about 3.20 B documents" in printed
    assert "11.0 TB of text" in printed


@pytest.mark.parametrize(
    ("value", "threshold", "text"),
    [
        (31, 50, "31 < 50"),
        (120_345, 100_000, "120,345 > 100,000"),
        (0.79999, 0.8, "0.79999 < 0.8"),
        (0.3000001, 0.3, "0.3000001 > 0.3"),
        (1234.56, 1000, "1,234.6 > 1,000"),
        (2.0, 2.0, "2 = 2"),
        (0.5, None, "0.5"),
        (None, None, ""),
        (float("nan"), 0.5, "0.5"),
    ],
)
def test_values_beside_thresholds(value, threshold, text):
    assert compared(value, threshold) == text


def test_human_numbers():
    assert [size(n) for n in (0, 831, 4200, 1.5e9, 2e12)] == ["0 B", "831 B", "4.20 kB", "1.50 GB", "2.00 TB"]
    assert [percent(*n) for n in ((1, 0), (0, 9), (1, 10**6), (999_999, 10**6), (1, 1))] == [
        "–",
        "0.0 %",
        "< 0.1 %",
        "> 99.9 %",
        "100.0 %",
    ]
    assert [duration(s) for s in (0.04, 59.96, 192.4, 7500)] == ["0.0 s", "1 min 00 s", "3 min 12 s", "2 h 05 min"]


UNITS = st.sampled_from(["share", "count", "score"])
LIMIT = st.none() | (st.floats(0, 1) | st.floats(0, 1e6)).map(lambda bound: round(bound, 6))  # nobody bounds finer


@settings(deadline=None)
@given(UNITS, st.lists(st.floats(0, 1) | st.floats(0, 1e9) | st.integers(0, 50), min_size=1), LIMIT, LIMIT)
def test_any_histogram_stays_inside_its_picture(unit, values, low, high):
    if low is not None and high is not None and low > high:
        low, high = high, low
    picture = histogram_picture(drawn("x", values, unit, low, high))
    assert picture is not None
    bars = picture["bars"]
    assert all(bar["x"] >= LEFT - 0.01 and bar["x"] + bar["width"] <= RIGHT + 0.01 for bar in bars)
    assert all(bar["width"] > 0 for bar in bars)
    assert all(bar["y"] >= TOP - 0.01 and bar["y"] + bar["height"] == pytest.approx(BOTTOM) for bar in bars)
    assert all(before["x"] + before["width"] <= after["x"] + 0.01 for before, after in pairwise(bars))
    for texts in (picture["x_ticks"], picture["thresholds"]):
        assert all(t["text_x"] - t["half"] >= 0 and t["text_x"] + t["half"] <= WIDTH for t in texts)
        for before, after in pairwise(texts):
            apart = before["text_x"] + before["half"] < after["text_x"] - after["half"]
            assert apart or before.get("text_y") != after.get("text_y")
    assert len(picture["x_ticks"]) >= 2
    if low is high is None:
        assert picture["outside"] is None
        return
    outside = sum((low is not None and value < low) or (high is not None and value > high) for value in values)
    least, most = picture["outside"]
    at_bounds = sum(value in (low, high) for value in values)  # may stand at the border of a bin
    if max(values) <= 1 if unit != "count" else all(value == int(value) for value in values):
        assert least - 1e-9 <= (outside + at_bounds) / len(values)
        assert outside / len(values) <= most + 1e-9


def test_whole_numbers_fall_on_the_right_side():
    values = [0] * 5 + [1] * 4 + [2] * 3 + [3] * 2 + [9] * 6
    picture = histogram_picture(drawn("stop_words", values, "count", low=2))
    assert picture["outside"] == pytest.approx((9 / 20, 9 / 20))
    assert [bar["removed"] for bar in picture["bars"]] == [True, True, False, False, False]
    assert [bar["note"].split(":")[0] for bar in picture["bars"]][:4] == ["0", "1", "2", "3"]
    picture = histogram_picture(drawn("stop_words", values, "count", high=2))  # 2 itself is allowed
    assert picture["outside"] == pytest.approx((8 / 20, 8 / 20))
    assert [line["text"] for line in picture["thresholds"]] == ["max 2"]


def test_a_threshold_inside_a_bin_cuts_it():
    picture = histogram_picture(drawn("score", [0.651] * 10, "score", low=0.65))
    (gone, kept) = picture["bars"]
    assert (gone["removed"], kept["removed"]) == (True, False)
    assert picture["outside"] == (0, 1)
    assert all(bar["uncertain"] for bar in picture["bars"])
    (line,) = picture["thresholds"]
    assert line["x"] == pytest.approx(kept["x"])
    assert picture["shades"][0]["width"] == pytest.approx(line["x"] - LEFT)


def test_values_beyond_the_bins_are_told():
    picture = histogram_picture(drawn("symbols", [0.1, 3.0], "share"))
    assert picture["bars"][-1]["note"] == "98 % and more: 1 = 50 %"
