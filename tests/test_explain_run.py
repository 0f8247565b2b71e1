"""`minigpt-mix explain --run`: the documents of a step are those that the run was served."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from training_runs import SEQ_LEN, train_here, write_experiment, write_sources

from shards.cli import main
from shards.errors import UserError
from shards.loader import WindowLoader
from shards.reader import TokenDataset
from shards.runs import Run

STEPS, BATCH = 12, 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder; the mixture changes its weights half way."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    mixture = {**write_sources(folder / "data"), "phases": [{"from": 0.5, "weights": {"prose": 1.0}}]}
    config = write_experiment(folder, mixture, training={"max_steps": STEPS}, logging={"eval_steps": None})
    status, output = train_here(config)
    assert status == 0, output
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to change."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def mix(*arguments: object, status: int = 0) -> str:
    """What the command prints, run in this process; of a mistake, its message."""
    output, before, found = io.StringIO(), sys.argv, 0
    sys.argv = ["minigpt-mix", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main()
    except SystemExit as stop:
        found = int(stop.code or 0)
    finally:
        sys.argv = before
    assert found == status, output.getvalue()
    return output.getvalue()


def served(run: Path, first: int) -> list[list[list[int]]]:
    """What two ranks get when they draw a step from sample `first` on, window by window."""
    plan = Run.open(run).plan
    options = {"batch_size": 2, "accumulation": 2, "world_size": 2, "next_sample": first, "num_workers": 0}
    loaders = [WindowLoader(plan, rank=rank, stop_sample=10**6, **options) for rank in range(2)]
    batches = [batch for loader in loaders for batch in next(loader)]
    return [
        [*row.tolist(), last.item()] for b in batches for row, last in zip(b.input_ids, b.labels[:, -1], strict=True)
    ]


def tokens_of(window: dict) -> list[int]:
    """The tokens that an explained window's documents hold, read from the data."""
    dataset = TokenDataset(Path(window["path"]))
    return [token for part in window["documents"] for token in dataset.read(part["start"], part["stop"]).tolist()]


@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_the_documents_of_a_step_are_what_the_loader_served(trained, step):
    found = json.loads(mix("explain", "--run", trained, "--step", step, "--json"))
    assert [window["sample"] for window in found] == list(range((step - 1) * BATCH, step * BATCH))
    assert [tokens_of(window) for window in found] == served(trained, (step - 1) * BATCH)
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in logged if row["step"] == step and "next_sample" in row)
    assert row["next_sample"] == found[-1]["sample"] + 1


def test_documents_have_their_own_numbers(trained):
    """By counting the ends of documents in the whole stream."""
    for window in json.loads(mix("explain", "--run", trained, "--step", 3, "--json")):
        dataset = TokenDataset(Path(window["path"]))
        ends = np.flatnonzero(dataset.read(0, dataset.tokens) == dataset.manifest.eos_id) + 1
        first, last = np.searchsorted(ends, [window["start"], window["start"] + SEQ_LEN], side="right")
        names = [f"{window['source']}-{number}" for number in range(first, last + 1)]
        assert [document["id"] for document in window["documents"]] == names


def test_samples_that_rollbacks_skipped_are_left_out(run):
    rollbacks = [{"step": 4, "first_sample": 32, "next_sample": 56}, {"step": 6, "first_sample": 72, "next_sample": 80}]
    (run / "rollbacks.json").write_text(json.dumps(rollbacks))
    (run / "metrics.jsonl").unlink()  # of a run without rollbacks
    opened = Run.open(run)
    assert [opened.step(step).start for step in (1, 4, 5, 6, 7, 12)] == [0, 24, 56, 64, 80, 120]
    found = json.loads(mix("explain", "--run", run, "--step", 5, "--json"))
    assert [tokens_of(window) for window in found] == served(run, 56)


def test_a_log_that_disagrees_is_not_explained_away(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [
        {**row, "next_sample": row["next_sample"] + 24} if row.get("next_sample", 0) > 40 else row for row in rows
    ]
    text = "".join(json.dumps(row) + "\n" for row in changed)
    (run / "metrics.jsonl").write_text(text + '{"step": 12, "next_sam')  # being written
    assert Run.open(run).step(5) == range(32, 40)
    error = mix("explain", "--run", run, "--step", 7, status=2)
    assert "after step 7 the run stood before sample 80, not before 56" in error


def test_changed_data_are_refused(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    sources = config["data"]["config"]["sources"]
    for source in sources:
        shutil.copytree(source["path"], tmp_path / source["name"])
        source["path"] = str(tmp_path / source["name"])
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert Run.open(run).step(2) == range(8, 16)  # the same data elsewhere
    path = tmp_path / "prose" / "dataset.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "fingerprint": "0" * len(manifest["fingerprint"])}))
    error = mix("explain", "--run", run, "--step", 2, status=2)
    assert "not those that the run was trained on" in error
    assert "source 'prose' changed since" in error
    assert mix("explain", "--run", run, "--sample", 2, status=2) == error


def test_another_order_is_refused(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["config"]["seed"] += 1
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="seed changed since"):
        Run.open(run).step(1)


def test_one_source_and_the_text(trained):
    everything = json.loads(mix("explain", "--run", trained, "--step", 2, "--json"))
    code = json.loads(mix("explain", "--run", trained, "--step", 2, "--source", "code", "--json"))
    assert 0 < len(code) < len(everything)
    assert code == [window for window in everything if window["source"] == "code"]
    shown = mix("show", "--run", trained, "--step", 2, "--source", "code")
    assert shown.count("══ sample") == len(code)
    assert "did you mean 'code'" in mix("explain", "--run", trained, "--step", 2, "--source", "cod", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--step", 13], "--step 13: RUN has the steps 1 to 12"),
        (["--run", "RUN", "--step", 0], "has the steps 1 to 12"),
        (["--run", "RUN"], "give --sample G (from 0), or --step N"),
        (["--run", "RUN", "--step", 1, "--seq-len", 8], "the run has its own"),
        (["--run", "RUN/checkpoints", "--step", 1], "no run folder"),
        (["--step", 1], "give MIX.yaml and --seq-len L, or --run DIR"),
    ],
)
def test_mistakes(trained, arguments, message):
    arguments = [str(a).replace("RUN", str(trained)) for a in arguments]
    assert message.replace("RUN", str(trained)) in mix("explain", *arguments, status=2)
