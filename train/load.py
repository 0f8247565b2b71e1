"""A trained model from its run folder, for whatever comes after training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shards.errors import UserError
from train.checkpoint import complete_checkpoints, load_weights
from train.config import load_experiment
from train.models import BaseModelForCausalLM, ModelRegistry
from train.prepare import load_model_config


def load_run(run: Path, checkpoint: Path | None = None) -> tuple[BaseModelForCausalLM, bytes, int]:
    """Load the newest (or a given) checkpoint of a run, in float32 on the CPU.

    Returns:
        the model in evaluation mode, the content of its tokenizer.json, and its EOS id.

    Raises:
        UserError: there is no run or no checkpoint there, or it cannot be read.
    """
    if not (run / "manifest.json").exists():
        raise UserError(f"{run}: no run folder (manifest.json is missing)")
    config = load_model_config(load_experiment(run / "config.yaml"))
    checkpoint = checkpoint or next(reversed(complete_checkpoints(run / "checkpoints")), None)
    if checkpoint is None:
        raise UserError(f"{run}: the run has no checkpoint yet; it writes one each checkpointing.save_steps steps")
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    model.to_empty(device="cpu")
    load_weights(checkpoint, model)
    manifest = json.loads((run / "manifest.json").read_text())
    return model.eval(), (run / "tokenizer.json").read_bytes(), manifest["data"]["eos_id"]
