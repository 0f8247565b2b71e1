"""A trained model from its run folder, for whatever comes after training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shards.errors import UserError
from train.checkpoint import load_weights
from train.config import load_experiment
from train.models import BaseModelConfig, BaseModelForCausalLM, ModelRegistry
from train.run_state import complete_checkpoints


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
    fields = load_experiment(run / "config.yaml").model.config or {}  # a run writes them all, whatever it was given
    return ModelRegistry.parse_config(fields, f"{run / 'config.yaml'}, model.config")


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that a path names: a run (its newest checkpoint), or one of its checkpoints.

    Raises:
        UserError: it names neither.
    """
    if (source / "state.json").exists():
        run = source.absolute().parent.parent
        if not (run / "manifest.json").exists():
            raise UserError(f"{source}: a checkpoint outside of its run folder; its model and tokenizer are kept there")
        return run, source
    if not source.exists():
        raise UserError(f"{source}: no such folder")
    if (source / "config.json").exists():
        raise UserError(f"{source}: a Hugging Face folder already; minigpt-import makes a run folder of one")
    run_model_config(source)
    return source, newest_checkpoint(source)


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        UserError: it has none.
    """
    checkpoint = next(reversed(complete_checkpoints(run / "checkpoints")), None)
    if checkpoint is None:
        raise UserError(f"{run}: the run has no checkpoint yet; it writes one each checkpointing.save_steps steps")
    return checkpoint
