"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#bbbbbb")  # Paul Tol's "bright", without its blue


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the losses over the tokens seen, from the rows of `metrics.jsonl`, into a PNG.

    Training as one curve and, where it has several sources, thin ones for each; validation with dots. A source and the
    validation set of its name have the same colour.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    sources = _names(rows, "sources")
    names = sorted({*sources, *_names(rows, "val")})
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    for name in sources if len(sources) > 1 else []:
        axes.plot(
            *_points(rows, "sources", name), color=colours[name], linewidth=0.6, alpha=0.8, label=f"training: {name}"
        )
    axes.plot(*_points(rows, "loss"), color="#4477aa", linewidth=1.2, label="training")
    for name in _names(rows, "val"):
        label = f"validation: {name}"
        axes.plot(*_points(rows, "val", name), "o-", color=colours[name], markersize=3, linewidth=1, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(axes.lines) // 10)
    figure.savefig(path)


def _names(rows: list[dict[str, Any]], key: str) -> list[str]:
    return sorted({name for row in rows for name in row.get(key, ())})


def _points(rows: list[dict[str, Any]], key: str, name: str | None = None) -> tuple[list[float], list[float]]:
    """Tokens and losses of the rows that have one: `row["loss"]`, or `row[key][name]["loss"]`.

    A source that a row had no token of has a null there; a rare one would otherwise fall apart into invisible dots.
    """
    if name is None:
        found = [(row["tokens"], row[key]) for row in rows if key in row]
    else:
        found = [(row["tokens"], row[key][name].get("loss")) for row in rows if name in row.get(key, ())]
    return [tokens for tokens, loss in found if loss is not None], [loss for _, loss in found if loss is not None]
