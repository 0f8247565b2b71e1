"""Every family through the trainer: it learns, ranks agree, experts are balanced, a resumed run is the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from family_runs import FAMILIES
from training_runs import (
    ROOT,
    checkpoint_tensors,
    losses,
    results,
    rows,
    run,
    step_folder,
    train_here,
    write_experiment,
    write_sources,
)

from train.load import load_run

STEPS = 50
ON_TWO_RANKS = ["llama", "qwen3_moe", "deepseek_v3"]  # test_layouts.py has all
RECOMPUTED = {"qwen3_moe", "deepseek_v2"}  # these train with gradient checkpointing and a document mask


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    torch.set_num_threads(1)
    return write_sources(tmp_path_factory.mktemp("data"))


def experiment(folder: Path, mixture: dict, name: str, strategy: str = "fsdp", **sections: dict) -> Path:
    """An experiment file whose model file is the tiny one of this family."""
    content = {
        "model": {"type": None, "overrides": {"gradient_checkpointing": name in RECOMPUTED}},
        "data": {"document_mask": name in RECOMPUTED},
        "training": {"max_steps": STEPS, "world_size": 1, "lr_scheduler": "constant"},
        "checkpointing": {"save_steps": STEPS},
        "logging": {"eval_steps": None},
        "evaluation": {"max_tokens": 256},
        "parallel": {"strategy": strategy},
    }
    merged = {section: {**content.get(section, {}), **sections.get(section, {})} for section in content}
    path = write_experiment(folder, mixture, **merged)
    (folder / "model.yaml").write_text(yaml.safe_dump(FAMILIES[name]))
    return path


@pytest.fixture(scope="module")
def runs(mixture, tmp_path_factory):
    """Run folders by (family, ranks, strategy), 50 steps each, all in one start of two processes."""
    folder = tmp_path_factory.mktemp("families")
    layouts = [(name, 1, "fsdp") for name in FAMILIES] + [(name, 2, "fsdp") for name in ON_TWO_RANKS]
    layouts.append(("deepseek_v3", 2, "ddp"))
    paths = {
        layout: experiment(folder / "-".join(map(str, layout)), mixture, layout[0], layout[2]) for layout in layouts
    }
    apart, together = ([str(path) for layout, path in paths.items() if layout[1] == ranks] for ranks in (1, 2))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "family_runs.py"), *together, "--", *apart],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {layout: path.parent / "run" for layout, path in paths.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_and_two_ranks_have_the_losses_of_one(runs, name):
    one = losses(runs[name, 1, "fsdp"])
    assert len(one) == STEPS
    assert one[-1] < one[0] - 0.6
    assert results(runs[name, 1, "fsdp"])["val_loss"] < results(runs[name, 1, "fsdp"])["initial_val_loss"] - 0.6
    for layout, other in runs.items():
        if layout[0] == name:
            assert losses(other) == pytest.approx(one, rel=1e-5), layout


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if "moe" in name or "deepseek" in name or "experts" in name]
)
def test_what_the_metrics_say_of_experts(runs, name):
    """Load and balance loss are those of the global batch, so they do not depend on the ranks."""
    found = {layout: [row for row in rows(run) if "loss" in row] for layout, run in runs.items() if layout[0] == name}
    one = found[name, 1, "fsdp"]
    for layout, other in found.items():
        for a, b in zip(one, other, strict=True):
            assert a["expert_load"] == pytest.approx(b["expert_load"], rel=1e-5), layout
            assert a["balance_loss"] == pytest.approx(b["balance_loss"], rel=1e-4), layout
    assert all(row["expert_load"]["max_violation"] >= 0 for row in one)
    assert all(row["balance_loss"] > 0 for row in one)


def test_dense_models_say_nothing_of_experts(runs):
    assert not any("expert_load" in row or "balance_loss" in row for row in rows(runs["llama", 1, "fsdp"]))


def test_correction_biases_follow_the_load_once_per_step(runs):
    """Each step moves a bias by the rate or not at all, alike on every layout; they are saved and loaded."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    biases = [
        checkpoint_tensors(step_folder(run, STEPS))[name] for layout, run in runs.items() if layout[0] == "deepseek_v3"
    ]
    assert biases[0].abs().max() > 0
    assert (biases[0] / 1e-3 - (biases[0] / 1e-3).round()).abs().max() < 1e-3
    assert biases[0].abs().max() <= STEPS * 1e-3 + 1e-6
    for other in biases[1:]:
        torch.testing.assert_close(other, biases[0], rtol=0, atol=0)
    model, _, _ = load_run(runs["deepseek_v3", 1, "fsdp"])
    assert torch.equal(dict(model.named_buffers())[name.removeprefix("model.")], biases[0])


def test_a_resumed_run_of_experts_is_the_same_run(runs, mixture, tmp_path):
    """Stopped by its length at step 20, gone on to 50: biases and all, to the bit."""
    path = experiment(tmp_path, mixture, "deepseek_v3")
    assert train_here(path, "training.max_steps=20")[0] == 0
    status, output = train_here(path)
    assert status == 0, output
    assert "resuming from" in output
    ours, whole = (
        checkpoint_tensors(step_folder(r, STEPS)) for r in (tmp_path / "run", runs["deepseek_v3", 1, "fsdp"])
    )
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_compiled_bf16_recomputed_and_masked_ranks_learn_what_one_plain_process_learns(mixture, tmp_path):
    """Six steps on two ranks, then six on one, beside twelve of the eager float32 run: the same curve but for bf16."""
    sources = []
    for source in mixture["sources"]:  # without validation, which would be compiled apart
        folder = tmp_path / source["name"]
        shutil.copytree(source["path"], folder, ignore=shutil.ignore_patterns("val"))
        sources.append({**source, "path": str(folder)})
    shared = {"data": {"document_mask": True}, "model": {"overrides": {"first_k_dense_replace": 0}}}
    length = {"max_steps": 12}
    plain = experiment(tmp_path / "plain", {**mixture, "sources": sources}, "deepseek_v3", **shared, training=length)
    shared["model"]["overrides"]["gradient_checkpointing"] = True
    modes = {"compile": True, "mixed_precision": "bf16"}
    path = experiment(
        tmp_path / "all", {**mixture, "sources": sources}, "deepseek_v3", **shared, training={**length, **modes}
    )
    status, output = train_here(plain)
    assert status == 0, output
    run(path, "training.max_steps=6", ranks=2)
    assert "resuming from" in run(path)
    expected, found = losses(tmp_path / "plain" / "run"), losses(tmp_path / "all" / "run")
    assert len(found) == 12
    assert found == pytest.approx(expected, rel=5e-4)
    assert found[-1] < found[0] - 0.2


def test_the_family_is_one_line_of_an_experiment_file(mixture, tmp_path):
    path = write_experiment(tmp_path, mixture, model={"type": None}, training={"max_steps": 2, "warmup_steps": 1})
    lines = path.read_text().splitlines()
    for name in ("qwen3", "deepseek_v2"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(FAMILIES[name]))
        swapped = [line.replace("model.yaml", f"{name}.yaml") for line in lines]
        assert sum(a != b for a, b in zip(lines, swapped, strict=True)) == 1
        path.write_text("\n".join(swapped))
        status, output = train_here(path, f"checkpointing.output_dir={tmp_path / name}")
        assert status == 0, output
