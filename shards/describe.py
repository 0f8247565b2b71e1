"""A mixture plan for people: what each source gives over the run, and what any sample holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from shards.errors import UserError
from shards.mixture import MixturePlan
from shards.pages import amount, render_page
from shards.phases import WEIGHT_SUM

# Up to 4 epochs, repeated tokens are worth nearly as much as new ones; then their value decays
# (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264, figure 1).
GOOD_EPOCHS = 4


def summarize(plan: MixturePlan) -> dict[str, Any]:
    """What the plan does over its length, ready for JSON.

    Shares are fractions of the samples: `share` is asked for, `realised` is exact. `epochs` counts passes over a
    source's windows up to the end of the phase, or of the run. In a plan without data (`plan_only`) sizes are those
    that the mixture expects; they and the epochs are null where it does not say.
    """
    unknown = {source.name for source in plan.config.sources if plan.without_data and source.tokens is None}
    total, length = plan.length(), plan.seq_len
    started = [phase for phase in plan.phases if phase.start < total]
    borders = [phase.start for phase in started] + [total]
    counts = [plan.counts(border) for border in borders]
    phases: list[dict[str, Any]] = []
    for number, phase in enumerate(started):
        samples = borders[number + 1] - phase.start
        sources = []
        for index, source in enumerate(plan.sources):
            drawn = counts[number + 1][index] - counts[number][index]
            sources.append(
                {
                    "name": source.name,
                    "share": phase.weights[index] / WEIGHT_SUM,
                    "realised": drawn / samples,
                    "samples": drawn,
                    "tokens": drawn * length,
                    "epochs": None if source.name in unknown else counts[number + 1][index] / source.windows,
                }
            )
        phases.append(
            {
                "from_sample": phase.start,
                "from_tokens": phase.start * length,
                "samples": samples,
                "tokens": samples * length,
                "block": phase.block,
                "sources": sources,
            }
        )
    sources = []
    for index, (source, given) in enumerate(zip(plan.sources, plan.config.sources, strict=True)):
        drawn = counts[-1][index]
        sources.append(
            {
                "name": source.name,
                "path": str(source.dataset.path),
                "tokens": None if source.name in unknown else source.dataset.tokens,
                "documents": None if plan.without_data else source.dataset.documents,
                "windows": None if source.name in unknown else source.windows,
                "weight": given.weight,
                "share": sum(p["samples"] * p["sources"][index]["share"] for p in phases) / total,
                "realised": drawn / total,
                "samples": drawn,
                "tokens_drawn": drawn * length,
                "epochs": None if source.name in unknown else drawn / source.windows,
                "max_epochs": given.max_epochs,
            }
        )
    return {
        "name": plan.config.name,
        "plan_only": plan.without_data,
        "seed": plan.config.seed,
        "seq_len": length,
        "total_samples": total,
        "total_tokens": total * length,
        "total_is": "given" if plan.total_samples is not None else "the first source's end",
        "vocab_size": None if plan.without_data else plan.vocab_size,
        "tokenizer_hash": None if plan.without_data else plan.tokenizer_hash,
        "sources": sources,
        "phases": phases,
        "warnings": _warnings(plan, total, sources),
    }


def _warnings(plan: MixturePlan, total: int, sources: list[dict[str, Any]]) -> list[str]:
    lines = []
    unknown = [f"'{source['name']}'" for source in sources if source["epochs"] is None]
    if unknown:
        lines.append(f"of unknown size: {', '.join(unknown)}; give `tokens` to count their epochs and check max_epochs")
    often = [
        f"'{source['name']}' {source['epochs']:.1f} times"
        for source in sources
        if source["epochs"] is not None and source["epochs"] > GOOD_EPOCHS
    ]
    if often:
        lines.append(
            f"read {', '.join(often)}: beyond {GOOD_EPOCHS} epochs repeated tokens are worth less and less "
            "(Muennighoff et al. 2023, arXiv 2305.16264)"
        )
    unused = [f"'{source['name']}'" for source in sources if not source["samples"]]
    if unused:
        lines.append(f"never drawn: {', '.join(unused)}")
    for phase in plan.phases:
        if phase.start >= total:
            lines.append(
                f"the phase from sample {phase.start:,} never begins: the run ends at {total:,} "
                "(phases start on block borders)"
            )
        elif phase.block > total and len(sources) > 1:
            lines.append(
                f"the rarest source of the phase from sample {phase.start:,} comes about once in {phase.block:,} "
                "samples, more than the whole run"
            )
    missing = len(plan.config.phases) + 1 - len(plan.phases)
    if missing:
        lines.append(f"{missing} phase(s) have no samples: the next one starts at the same block border")
    return lines


def tables(summary: dict[str, Any]) -> list[Text | Table]:
    """A title and a table for the sources over the whole run and, where there are several, for each phase."""
    total = f"{amount(summary['total_tokens'])} tokens = {summary['total_samples']:,} windows of {summary['seq_len']:,}"
    end = "" if summary["total_is"] == "given" else f" (up to {summary['total_is']})"
    size = "expected" if summary["plan_only"] else "tokens"
    whole = _table(["source", size, "windows", "weight", "asked", "realised", "drawn", "epochs", "max"])
    for source in summary["sources"]:
        whole.add_row(
            source["name"],
            amount(source["tokens"]),
            amount(source["windows"]),
            "–" if source["weight"] is None else f"{source['weight']:g}",
            f"{source['share']:.3%}",
            f"{source['realised']:.3%}",
            amount(source["tokens_drawn"]),
            _epochs(source["epochs"]),
            "–" if source["max_epochs"] is None else f"{source['max_epochs']:g}",
        )
    title = f"{summary['name']}: {total}{end}, seed {summary['seed']}"
    result: list[Text | Table] = [Text(title, style="bold"), whole]
    if summary["plan_only"]:
        result.insert(1, Text("plan without data: no dataset was opened, sizes are the ones the file expects"))
    for number, phase in enumerate(summary["phases"] if len(summary["phases"]) > 1 else []):
        title = (
            f"phase {number}: {amount(phase['tokens'])} tokens from {amount(phase['from_tokens'])} on "
            f"(sample {phase['from_sample']:,}), blocks of {phase['block']:,}"
        )
        table = _table(["source", "asked", "realised", "drawn", "epochs by its end"])
        for source in phase["sources"]:
            table.add_row(
                source["name"],
                f"{source['share']:.3%}",
                f"{source['realised']:.3%}",
                amount(source["tokens"]),
                _epochs(source["epochs"]),
            )
        result += [Text(title, style="bold"), table]
    return result


def _epochs(number: float | None) -> str:
    if number is None:
        return "–"
    return f"[yellow]{number:.2f}[/]" if number > GOOD_EPOCHS else f"{number:.2f}"


def _table(columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def explain(plan: MixturePlan, samples: range) -> list[dict[str, Any]]:
    """Where samples come from: source, epoch, window, shard, token range and documents, ready for JSON.

    `start` and `stop` are stream positions of the seq_len + 1 tokens; documents are those that overlap them, with the
    part of them that lies inside.
    """
    found = plan.locate(np.array(samples))
    result = []
    for row, sample in enumerate(samples):
        source = plan.sources[found.source[row]]
        start = int(found.start[row])
        stop = start + plan.seq_len + 1
        shard, offset = divmod(start, source.dataset.shard_tokens)
        result.append(
            {
                "sample": sample,
                "source": source.name,
                "epoch": int(found.epoch[row]),
                "window": int(found.window[row]),
                "path": str(source.dataset.path),
                "shard": shard,
                "offset": offset,
                "start": start,
                "stop": stop,
                "documents": [
                    {
                        "id": document.id,
                        "source": document.source,
                        "start": max(start, document.start),
                        "stop": min(stop, document.stop),
                        "whole": start <= document.start and document.stop <= stop,
                    }
                    for document in source.dataset.documents_between(start, stop)
                ],
            }
        )
    return result


def decode(plan: MixturePlan, explained: dict[str, Any]) -> list[str]:
    """Text of each document part of an explained sample, control tokens included."""
    from tokenizers import Tokenizer

    dataset = next(source.dataset for source in plan.sources if source.name == explained["source"])
    try:
        tokenizer = Tokenizer.from_str(dataset.tokenizer_json().decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{dataset.path}/tokenizer.json: cannot be loaded ({error}); copy it again") from None
    return [
        tokenizer.decode(dataset.read(part["start"], part["stop"]).tolist(), skip_special_tokens=False)
        for part in explained["documents"]
    ]


def page(summary: dict[str, Any]) -> str:
    """The summary as one self-contained HTML page with pictures of shares and epochs."""
    widest = max([source["epochs"] or 0.0 for source in summary["sources"]] + [1.0])
    values = summary | {"widest": max(1.2, 1.05 * widest), "good_epochs": GOOD_EPOCHS}
    filters = {"amount": amount, "epochs": lambda number: "–" if number is None else f"{number:.2f}"}
    return render_page(Path(__file__).parent / "inspect.html", values, filters)
