"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_losses(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the tokens seen, from the rows of `metrics.jsonl`, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    training = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    if training:
        axes.plot(*zip(*training, strict=True), color="#4477aa", linewidth=1, label="training")
    evaluations = [row for row in rows if "val" in row]
    names = sorted({name for row in evaluations for name in row["val"]})
    colours = ["#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#bbbbbb"]
    for index, name in enumerate(names):
        values = [(row["tokens"], row["val"][name].get("loss")) for row in evaluations if name in row["val"]]
        label = f"validation: {name}"
        axes.plot(*zip(*values, strict=True), "o-", color=colours[index % 6], markersize=3, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path)
