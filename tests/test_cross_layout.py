"""A checkpoint written under one layout is read under every other: the run goes on with the same losses."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from layout_runs import VARIANTS
from training_runs import ROOT, losses, step_folder, train_here, write_experiment, write_sources

from train.checkpoint import weights_sha256

LAYOUTS: dict[str, dict] = {
    "first": {},  # one process
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "hsdp", "dp_shard": 2},
    "tp": {"strategy": "fsdp", "tp": 4},
    "tp+fsdp": {"strategy": "fsdp", "tp": 2},
    "pp+fsdp": {"strategy": "fsdp", "pp": 2},
    "pp+tp": {"strategy": "ddp", "pp": 2, "tp": 2},
}
LEG = 4  # steps between two changes of the layout
# Enough key heads for four ranks.
MODELS = {
    "llama": {**VARIANTS["llama untied"], "num_key_value_heads": 4},
    "deepseek_v3": VARIANTS["deepseek_v3"],
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("data"))


def experiment(folder: Path, mixture: dict, model: str, layout: str, steps: int, **sections: dict) -> Path:
    """An experiment file for one stretch of a run."""
    content: dict[str, dict] = {
        "model": {"type": None},
        "training": {"max_steps": steps, "world_size": 1, "warmup_steps": 0, "gradient_accumulation_steps": 4},
        "checkpointing": {"save_steps": LEG, "save_total_limit": None},
        "logging": {"eval_steps": None},
        "evaluation": {"max_tokens": 64},
    }
    content["training"] |= {"batch_size": 2, "lr_scheduler": "constant"}
    if LAYOUTS[layout]:
        content["parallel"] = LAYOUTS[layout]
    for name, fields in sections.items():
        content[name] = {**content.get(name, {}), **fields}
    path = write_experiment(folder, mixture, **content)
    (folder / "model.yaml").write_text(yaml.safe_dump(MODELS[model]))
    return path


def run_all(paths: list[tuple[str, Path]]) -> None:
    """Train experiments one after the other in one start of four ranks."""
    arguments = [f"first:{path}" if layout == "first" else str(path) for layout, path in paths]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "family_runs.py"), *arguments, "--"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "optimizer"), [("llama", "muon"), pytest.param("deepseek_v3", "adamw", marks=pytest.mark.slow)]
)
def test_a_run_goes_through_all_layouts(mixture, tmp_path, model, optimizer):
    training = {"optimizer": optimizer}
    whole = experiment(tmp_path / "one", mixture, model, "first", LEG * len(LAYOUTS), training=training)
    assert train_here(whole)[0] == 0
    legs = []
    for number, layout in enumerate([*[*LAYOUTS][1:], "first"], start=1):
        folder = tmp_path / f"leg{number}"
        path = experiment(
            folder,
            mixture,
            model,
            layout,
            LEG * number,
            training=training,
            checkpointing={"output_dir": str(tmp_path / "run")},
        )
        legs.append((layout, path))
    run_all(legs)
    expected = losses(tmp_path / "one" / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_reads_what_every_other_wrote(mixture, tmp_path, model):
    whole = experiment(tmp_path / "one", mixture, model, "first", 2 * LEG)
    assert train_here(whole)[0] == 0
    writers = {name: experiment(tmp_path / name, mixture, model, name, LEG) for name in LAYOUTS}
    run_all(list(writers.items()))
    hashes = set()
    readers = []
    for writer, reader in itertools.product(LAYOUTS, LAYOUTS):
        source = step_folder(writers[writer].parent / "run", LEG)
        hashes.add(weights_sha256(source))
        folder = tmp_path / f"{writer} to {reader}"
        checkpoint = {"resume_from_checkpoint": str(source), "output_dir": str(folder / "run")}
        readers.append((reader, experiment(folder, mixture, model, reader, 2 * LEG, checkpointing=checkpoint)))
    run_all(readers)
    expected = losses(tmp_path / "one" / "run")
    assert len(hashes) >= 2  # rounding differs, or all have run in the same way
    for _, path in readers:
        assert losses(path.parent / "run") == pytest.approx(expected[LEG:], rel=2e-5), path
        shutil.rmtree(path.parent)
