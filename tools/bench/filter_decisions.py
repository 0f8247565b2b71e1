"""Decisions of the filters beside datatrove's on the same documents, and for each difference the rule and both values.

Gopher quality and repetition see the documents; C4 too, with and without its rule on line ends; FineWeb's rules see
what C4's cleaning (without that rule) left, each side its own. datatrove may stand in a Python of its own.

    python -m tools.bench filter-decisions
    python -m tools.bench filter-decisions --data web.jsonl.zst --datatrove-python /tmp/datatrove/bin/python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILTERS = ("gopher_quality", "gopher_repetition", "c4_paper", "c4_fineweb", "fineweb_quality")
REASONS = {  # datatrove's reason: our rule
    "gopher_short_doc": "word_count",
    "gopher_long_doc": "word_count",
    "gopher_below_avg_threshold": "mean_word_length",
    "gopher_above_avg_threshold": "mean_word_length",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "alphabetic_words",
    "gopher_enough_stop_words": "stop_words",
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    **{f"top_{n}_gram": f"top_{n}gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}gram" for n in range(5, 11)},
    "lorem_ipsum": "lorem_ipsum",
    "curly_bracket": "curly_brackets",
    "too_few_sentences": "sentences",
    "line_punct_ratio": "terminal_lines",
    "empty": "terminal_lines",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_line_characters",
    "list_ratio": "newlines",
}
OURS = """
import json, sys
import pyarrow as pa
from prep.filters.presets import build
from prep.filters.rules import CleanStage
from prep.stages import Tally

texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
ids = pa.array([str(number) for number in range(len(texts))])
batch = pa.RecordBatch.from_arrays([ids, pa.array(texts), pa.repeat("x", len(texts))], names=["id", "text", "source"])
answers = [{} for _ in texts]


def run(name, stage, batch):
    tally = Tally(stage.name)
    kept = stage(batch, tally)
    cleaned, values = kept.column("text").to_pylist(), None
    if isinstance(stage, CleanStage):
        _, values, _ = stage.clean(batch.column("text"))
    else:
        values = stage.measure(batch)
    for row, number in enumerate(batch.column("id").to_pylist()):
        here = {rule.partition(".")[2]: float(column[row]) for rule, column in values.items()}
        answers[int(number)][name] = {"values": here, "reason": None, "text": None}
    for number, text in zip(kept.column("id").to_pylist(), cleaned):
        answers[int(number)][name]["text"] = text if isinstance(stage, CleanStage) else None
    for rejected in tally.rejected:
        for number, rule in zip(rejected.column("id").to_pylist(), rejected.column("rule").to_pylist()):
            answers[int(number)][name]["reason"] = rule.partition(".")[2]
    return kept


run("gopher_quality", build({"preset": "gopher_quality"}, "")[0], batch)
run("gopher_repetition", build({"preset": "gopher_repetition"}, "")[0], batch)
run("c4_paper", build({"preset": "c4_paper"}, "")[0], batch)
_, c4, quality = build({"preset": "fineweb"}, "")
run("fineweb_quality", quality, run("c4_fineweb", c4, batch))
with open(sys.argv[2], "w") as file:
    json.dump(answers, file)
"""


class Difference(NamedTuple):
    """A document on which the two do not agree: rule and value of whoever removed it, and the other's value."""

    document: int
    rule: str
    by: str
    ours: float | None
    theirs: float | None


def main() -> None:
    """Compare on C4 and on books, and print the table and every difference."""
    if sys.argv[1:2] == ["peer"]:
        return peer(Path(sys.argv[2]), Path(sys.argv[3]))
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench filter-decisions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--datatrove-python", default=sys.executable, help="a Python in which datatrove is installed")
    parser.add_argument("--data", type=Path, nargs="*", help="files of rows with a key `text` (.jsonl, .jsonl.zst)")
    parser.add_argument("--documents", type=int, default=2000, help="documents from each file")
    parser.add_argument("--show", type=int, default=1000, help="differences to print for each file")
    options = parser.parse_args()
    if options.datatrove_python == sys.executable and importlib.util.find_spec("datatrove") is None:
        raise UserError("datatrove is not installed: pip install -c constraints.txt -e '.[bench]'")
    for path in options.data or [SHARED / "c4-300.jsonl", SHARED / "books.jsonl.zst"]:
        if not path.is_file():
            raise UserError(f"{path}: no such file; name others with --data")
        texts = read(path, options.documents)
        with tempfile.TemporaryDirectory(prefix="bench-filters-") as name:
            rows, ours, theirs = (Path(name) / file for file in ("rows.jsonl", "ours.json", "theirs.json"))
            rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            call([sys.executable, "-c", OURS, str(rows), str(ours)])
            call([options.datatrove_python, "-m", "tools.bench.filter_decisions", "peer", str(rows), str(theirs)])
            report(path.name, json.loads(ours.read_text()), json.loads(theirs.read_text()), options.show)


def call(command: list[str]) -> None:
    """Run a process in the repository."""
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"{command[0]}: the process failed; its message is above")


def read(path: Path, number: int) -> list[str]:
    """The first texts of a file."""
    if path.suffix == ".zst":
        import io

        import zstandard

        with path.open("rb") as file:
            lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
            return [json.loads(line)["text"] for line, _ in zip(lines, range(number), strict=False)]
    with path.open(encoding="utf-8") as rows:
        return [json.loads(line)["text"] for line, _ in zip(rows, range(number), strict=False)]


def report(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], show: int) -> None:
    """Print for each filter how many documents both keep and remove, and the differences."""
    print(f"{name}, {len(ours)} documents")
    print(f"  {'':20}{'seen':>7}{'agree':>7}{'both remove':>13}{'only we':>9}{'only they':>11}{'same text':>11}")
    differences: dict[str, list[Difference]] = {}
    for filter_name in FILTERS:
        pairs = [
            (number, mine[filter_name], other[filter_name])
            for number, (mine, other) in enumerate(zip(ours, theirs, strict=True))
            if filter_name in mine and filter_name in other
        ]
        counts = Counter((bool(mine["reason"]), bool(other["reason"])) for _, mine, other in pairs)
        kept = [
            (mine["text"], other.get("text")) for _, mine, other in pairs if not (mine["reason"] or other["reason"])
        ]
        same = f"{sum(a == b for a, b in kept)}/{len(kept)}" if filter_name.startswith("c4") else ""
        agree = counts[True, True] + counts[False, False]
        print(
            f"  {filter_name:20}{len(pairs):>7}{agree:>7}{counts[True, True]:>13}{counts[True, False]:>9}"
            f"{counts[False, True]:>11}{same:>11}"
        )
        differences[filter_name] = [
            explain(number, mine, other)
            for number, mine, other in pairs
            if bool(mine["reason"]) != bool(other["reason"])
        ]
    for filter_name, found in differences.items():
        for difference in found[:show]:
            print(
                f"  {filter_name}: document {difference.document}, removed by {difference.by}: {difference.rule} "
                f"ours {number_text(difference.ours)}, theirs {number_text(difference.theirs)}"
            )


def number_text(value: float | None) -> str:
    """A value for the table."""
    return "-" if value is None else f"{value:.4g}"


def explain(number: int, mine: dict[str, Any], other: dict[str, Any]) -> Difference:
    """The rule that one side broke, with the values of both."""
    rule = mine["reason"] or REASONS[other["reason"]]
    by = "us" if mine["reason"] else "datatrove"
    return Difference(number, rule, by, mine["values"].get(rule), other["values"].get(rule))


def peer(source: Path, out: Path) -> None:
    """In datatrove's Python: its decisions, its cleaned texts, and the values behind the decisions."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    filters = {
        "gopher_quality": GopherQualityFilter(),
        "gopher_repetition": GopherRepetitionFilter(),
        "c4_paper": C4QualityFilter(),
        "c4_fineweb": C4QualityFilter(filter_no_terminal_punct=False),
    }
    quality = FineWebQualityFilter()
    answers = []
    for line in source.read_text(encoding="utf-8").split("\n")[:-1]:
        text = json.loads(line)["text"]
        answer: dict[str, Any] = {}
        for name, one in filters.items():
            document = Document(text=text, id="0")
            reason = decide(one, document)
            answer[name] = {"reason": reason, "values": peer_values(name, text), "text": document.text}
            if name == "c4_fineweb" and reason is None:
                cleaned = document.text
                reason = decide(quality, document)
                answer["fineweb_quality"] = {"reason": reason, "values": peer_values("fineweb_quality", cleaned)}
        answers.append(answer)
    out.write_text(json.dumps(answers))


def decide(one: Any, document: Any) -> str | None:
    """Why a filter of datatrove removes a document, or None."""
    result = one.filter(document)
    return result[1] if isinstance(result, tuple) else None if result else "removed"


def peer_values(name: str, text: str) -> dict[str, float]:
    """The numbers behind datatrove's decisions, with its words and its helpers."""
    import re

    from datatrove.pipeline.filters import gopher_repetition_filter as repetition
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION, split_into_sentences, split_into_words

    if name.startswith("c4"):
        lines = [line.strip() for line in text.splitlines()]
        long = [line for line in lines if len(line.split()) >= 3]
        return {"sentences": sum(len(split_into_sentences(line, "eng")) for line in long)}
    words = split_into_words(text, "eng")
    if name == "fineweb_quality":
        lines = [line for line in text.split("\n") if line.strip()]
        return {
            "terminal_lines": sum(line.endswith(tuple(TERMINAL_PUNCTUATION)) for line in lines) / len(lines),
            "short_lines": sum(len(line) <= 30 for line in lines) / len(lines),
            "duplicate_line_characters": repetition.find_duplicates(lines)[1] / len(text.replace("\n", "")),
            "newlines": text.count("\n") / len(words),
        }
    if name == "gopher_quality":
        plain = [word for word in words if any(letter not in PUNCTUATION_SET for letter in word)]
        return {
            "word_count": len(plain),
            "mean_word_length": sum(map(len, plain)) / max(len(plain), 1),
            "hashes": text.count("#") / len(words),
            "ellipses": (text.count("...") + text.count("…")) / len(words),
            "alphabetic_words": sum(any(map(str.isalpha, word)) for word in words) / len(words),
            "stop_words": len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(words)),
        }
    found: dict[str, float] = {}
    for key, parts in (
        ("paragraph", re.split(r"\n{2,}", text.strip())),
        ("line", re.split(r"\n+", text)),
    ):
        copies, characters = repetition.find_duplicates(parts)
        found |= {
            f"duplicate_{key}s": copies / len(parts),
            f"duplicate_{key}_characters": characters / len(text),
        }
    for n in (2, 3, 4):
        grams = repetition.get_n_grams(words, n)
        found[f"top_{n}gram"] = repetition.find_top_duplicate(grams) / len(text) if grams else 0.0
    for n in range(5, 11):
        found[f"duplicate_{n}gram"] = repetition.find_all_duplicate(words, n) / len(text)
    return found


if __name__ == "__main__":
    main()
