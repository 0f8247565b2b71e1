"""Training that starts from the weights of another run: which weights, which model, and a schedule of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import (
    MODEL,
    checkpoint_tensors,
    results,
    rows,
    run,
    step_folder,
    train_here,
    write_experiment,
    write_sources,
)

from shards.errors import UserError
from tools.hub_export import export_pretrained
from tools.hub_import import import_pretrained
from train.models import ModelRegistry
from train.start_weights import load_start_weights, start_config, start_folder, start_tokenizer

SECTIONS = {
    "training": {"max_steps": 8, "warmup_steps": 2},
    "checkpointing": {"save_steps": 4},
    "logging": {"eval_steps": 4},
}
KINDS = ["run", "checkpoint", "hub", "imported"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A trained run in `run`, its export in `hub`, and that imported again in `imported`; data in `data`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    mixture = write_sources(folder / "data")
    (folder / "mixture.json").write_text(json.dumps(mixture))
    status, output = train_here(write_experiment(folder, mixture, **SECTIONS))
    assert status == 0, output
    export_pretrained(folder / "run", folder / "hub", dtype="float32")
    import_pretrained(folder / "hub", folder / "imported")
    return folder


def place(source: Path, kind: str) -> Path:
    return step_folder(source / "run", 4) if kind == "checkpoint" else source / kind


def midtraining(folder: Path, source: Path, weights: Path, **sections: dict) -> Path:
    return write_experiment(
        folder,
        json.loads((source / "mixture.json").read_text()),
        **{**SECTIONS, "logging": {"eval_steps": None}, **sections},
        experiment={"stage": "midtrain"},
        model={"type": None, "config_path": None, "from_pretrained": str(weights)},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weights(source, kind):
    path = place(source, kind)
    config = start_config(path)
    assert config.model_dump() == ModelRegistry.parse_config(MODEL, "test").model_dump()
    assert start_config(path, {"rms_norm_eps": 1e-4}).rms_norm_eps == 1e-4
    folders = {"run": step_folder(source / "run", 8), "imported": step_folder(source / "imported", 0)}
    assert start_folder(path) == folders.get(kind, path)
    tokenizer = json.loads((source / "data" / "code" / "tokenizer.json").read_text())["model"]
    assert json.loads(start_tokenizer(path).read_text())["model"] == tokenizer
    with torch.device("meta"):
        model = ModelRegistry.create_model("llama", config)
    model.to_empty(device="cpu")
    load_start_weights(model, path)
    stored = checkpoint_tensors(step_folder(source / "run", 4 if kind == "checkpoint" else 8))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"model.{name}"]), name


@pytest.mark.parametrize(("kind", "step"), [("checkpoint", 4), ("run", 8)])
def test_it_starts_at_that_validation_loss_with_its_own_schedule(source, tmp_path, kind, step):
    """And with an optimiser that knows nothing of the other run: the first update follows the first gradient's sign."""
    path = place(source, kind)
    config = midtraining(tmp_path, source, path, checkpointing={"save_steps": 1, "save_total_limit": None})
    status, output = train_here(config, stage="midtrain")
    assert status == 0, output
    assert f"starting from the weights in {start_folder(path)}" in output
    (before,) = (row["val_loss"] for row in rows(source / "run") if row["step"] == step and "val_loss" in row)
    assert results(tmp_path / "run")["initial_val_loss"] == pytest.approx(before, rel=1e-6)
    assert results(tmp_path / "run")["val_loss"] < before
    ours, theirs = ([row["lr"] for row in rows(path) if "lr" in row] for path in (tmp_path / "run", source / "run"))
    assert ours == theirs
    start, first = checkpoint_tensors(start_folder(path)), checkpoint_tensors(step_folder(tmp_path / "run", 1))
    name = "layers.0.self_attn.o_proj.weight"
    mean, square = (first[f"optimizer.{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = 0.9, 0.95
    torch.testing.assert_close((mean / (1 - beta1)) ** 2, square / (1 - beta2), rtol=1e-4, atol=1e-12)
    change = first[f"model.{name}"] - start[f"model.{name}"] * (1 - ours[0] * 0.1)
    torch.testing.assert_close(change, -ours[0] * mean.sign(), rtol=0, atol=ours[0] * 0.05)
    status, output = train_here(config, "training.max_steps=9", stage="midtrain")
    assert status == 0, output
    assert "step-00000008 at step 8" in output


@pytest.mark.slow
def test_ranks_take_their_pieces_of_a_run(source, tmp_path):
    """Each of two tensor-parallel ranks reads its part of the matrices from what one rank wrote."""
    config = midtraining(tmp_path, source, source / "run", parallel={"strategy": "fsdp", "tp": 2})
    run(config, "experiment.stage=pretrain", ranks=2)  # the loop is the same
    assert results(tmp_path / "run")["initial_val_loss"] == pytest.approx(results(source / "run")["val_loss"], rel=1e-5)


def test_paths_that_name_no_weights(source, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(step_folder(source / "run", 4), tmp_path / "lost" / "step-00000004")
    for path, message in [
        (tmp_path / "nowhere", r"nowhere: no such folder"),
        (tmp_path / "empty", r"neither a Hugging Face folder \(config\.json\), nor a run .*, nor a checkpoint"),
        (tmp_path / "lost" / "step-00000004", "a checkpoint outside of its run folder"),
        (source / "data" / "code", "no model here"),
    ]:
        with pytest.raises(UserError, match=message):
            start_config(path)


def test_weights_of_another_model_are_refused(source):
    config = start_config(source / "run", {"intermediate_size": 64})
    with torch.device("meta"):
        model = ModelRegistry.create_model("llama", config)
    model.to_empty(device="cpu")
    for kind in KINDS:
        with pytest.raises(UserError, match=r"of another model|not of this model"):
            load_start_weights(model, place(source, kind))
