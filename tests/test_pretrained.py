"""Training that starts from the weights of a Hugging Face folder, and weights that belong to something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from family_runs import FAMILIES
from training_runs import results, step_folder, train_here, write_experiment, write_sources

from shards.errors import UserError
from tools.hub_export import export_pretrained
from train.load import load_run


def experiment(folder: Path, mixture: dict, **model: str) -> Path:
    return write_experiment(
        folder,
        mixture,
        model={"type": None, **model},
        training={"max_steps": 6, "warmup_steps": 1, "lr_scheduler": "constant"},
        logging={"eval_steps": None},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained deepseek, its run folder and its export."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    mixture = write_sources(folder / "data")
    config = experiment(folder, mixture)
    (folder / "model.yaml").write_text(yaml.safe_dump(FAMILIES["deepseek_v3"]))
    status, output = train_here(config)
    assert status == 0, output
    export_pretrained(folder / "run", folder / "hub", dtype="float32")
    return folder, mixture


def test_it_starts_where_the_other_run_ended_and_goes_on_from_its_own_checkpoints(source, tmp_path):
    folder, mixture = source
    config = experiment(tmp_path, mixture, config_path=None, from_pretrained=str(folder / "hub"))
    status, output = train_here(config)
    assert status == 0, output
    assert f"starting from the weights in {folder / 'hub'}" in output
    started, ended = results(tmp_path / "run"), results(folder / "run")
    assert started["initial_val_loss"] == pytest.approx(ended["val_loss"], rel=1e-6)
    assert started["val_loss"] < ended["val_loss"]
    status, output = train_here(config, "training.max_steps=8")
    assert status == 0, output
    assert "resuming from" in output
    assert "starting from" not in output


def test_data_of_another_tokenizer_is_refused(source, tmp_path):
    folder, mixture = source
    (tmp_path / "hub").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "hub" / name).write_bytes((folder / "hub" / name).read_bytes())
    tokenizer = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "hub" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = experiment(tmp_path, mixture, config_path=None, from_pretrained=str(tmp_path / "hub"))
    status, output = train_here(config)
    assert status == 2
    assert "was tokenized with other ids than the pretrained model has" in output
    (tmp_path / "hub" / "tokenizer.json").write_text("{}")
    status, output = train_here(config)
    assert status == 2
    assert "not readable as a tokenizer" in output


def test_a_folder_that_is_not_there(source, tmp_path):
    config = experiment(tmp_path, source[1], config_path=None, from_pretrained=str(tmp_path / "nowhere"))
    status, output = train_here(config)
    assert status == 2
    assert "nowhere: no such folder; a model of the hub has to be downloaded first" in output


def test_a_checkpoint_of_another_model_is_refused(source, tmp_path):
    """Also one that has all that is asked for, and more."""
    folder, mixture = source
    config = experiment(tmp_path, mixture)
    fields = {**FAMILIES["deepseek_v3"], "n_shared_experts": None}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(fields))
    assert train_here(config)[0] == 0
    with pytest.raises(UserError, match=r"a checkpoint of another model: model\.layers\.1\.mlp\.shared_experts"):
        load_run(tmp_path / "run", step_folder(folder / "run", 6))
    with pytest.raises(UserError, match=r"shared_experts.* is missing there"):
        load_run(folder / "run", step_folder(tmp_path / "run", 6))
    with pytest.raises(UserError, match="no such checkpoint"):
        load_run(folder / "run", tmp_path / "nowhere")


def test_weights_load_in_another_dtype(source):
    exact, _, _ = load_run(source[0] / "run")
    rounded, _, _ = load_run(source[0] / "run", dtype=torch.bfloat16)
    for parameter, same in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(same, parameter.bfloat16())
    assert all(buffer.dtype == torch.float32 for buffer in rounded.buffers())
