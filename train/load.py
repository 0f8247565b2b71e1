"""A trained model from its run folder, for whatever comes after training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shards.errors import UserError
from train.checkpoint import complete_checkpoints, load_weights
from train.config import load_experiment
from train.models import BaseModelConfig, BaseModelForCausalLM, ModelRegistry
from train.prepare import load_model_config


def load_run(
    run: Path, checkpoint: Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[BaseModelForCausalLM, bytes, int]:
    """Load the newest (or a given) checkpoint of a run; its parameters and its computation have `dtype`.

    Returns:
        the model in evaluation mode, the content of its tokenizer.json, and its EOS id.

    Raises:
        UserError: there is no run or no checkpoint there, or it cannot be read.
    """
    config = run_model_config(run)
    checkpoint = checkpoint or newest_checkpoint(run)
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    model.allocate(device, dtype)
    load_weights(checkpoint, model)
    manifest = json.loads((run / "manifest.json").read_text())
    return model.eval(), (run / "tokenizer.json").read_bytes(), manifest["data"]["eos_id"]


def run_model_config(run: Path) -> BaseModelConfig:
    """The model of a run folder, or of a folder that `minigpt-import` made.

    Raises:
        UserError: it is neither, or its configuration cannot be read.
    """
    if not (run / "manifest.json").exists():
        raise UserError(f"{run}: no run folder (manifest.json is missing)")
    if not (run / "config.yaml").exists():
        return ModelRegistry.load_config(run / "model.yaml")  # imported: there was no experiment
    return load_model_config(load_experiment(run / "config.yaml"))


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        UserError: it has none.
    """
    checkpoint = next(reversed(complete_checkpoints(run / "checkpoints")), None)
    if checkpoint is None:
        raise UserError(f"{run}: the run has no checkpoint yet; it writes one each checkpointing.save_steps steps")
    return checkpoint
