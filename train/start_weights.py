"""The weights that `model.from_pretrained` names.

A Hugging Face folder, a run folder (of which the newest checkpoint is meant, or what `minigpt-import` made), or one
checkpoint of a run, `…/checkpoints/step-00001000`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from shards.errors import UserError
from train.checkpoint import load_weights
from train.load import find_checkpoint, run_model_config
from train.models import BaseModelConfig, BaseModelForCausalLM, ModelRegistry
from train.models.hf import load_hf_weights, model_file


def start_config(path: str | Path, overrides: dict[str, Any] | None = None) -> BaseModelConfig:
    """The model that the weights belong to; `overrides` replace its fields.

    Raises:
        UserError: there is no model at this path, or it cannot be read.
    """
    path = Path(path)
    if _is_hugging_face(path):
        return ModelRegistry.load_config(model_file(path), overrides)
    run, _ = _find(path)
    config = run_model_config(run)
    if not overrides:
        return config
    return ModelRegistry.parse_config({**config.model_dump(mode="json"), **overrides}, f"{run} with model.overrides")


def start_folder(path: str | Path) -> Path:
    """The folder that the weights are read from: the Hugging Face folder, or the checkpoint."""
    path = Path(path)
    return path if _is_hugging_face(path) else _find(path)[1]


def start_tokenizer(path: str | Path) -> Path:
    """Where the model's tokenizer.json is, if it has one."""
    path = Path(path)
    return (path if _is_hugging_face(path) else _find(path)[0]) / "tokenizer.json"


def load_start_weights(model: BaseModelForCausalLM, path: str | Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill what this rank has of an allocated model; every rank reads its own pieces.

    Args:
        model: filled in place.
        path: see above.
        group: all ranks of it call this together, and share the check of a checkpoint; None: this one is alone.

    Raises:
        UserError: there are no weights at this path, they cannot be read, or they are of another model.
    """
    folder = start_folder(path)
    if _is_hugging_face(folder):
        load_hf_weights(model, folder)
    else:
        load_weights(folder, model, group)


def _is_hugging_face(path: Path) -> bool:
    """Also what minigpt-export writes where Hugging Face has no such model: a model.yaml instead of a config.json."""
    return (path / "config.json").exists() or ((path / "model.yaml").exists() and not (path / "manifest.json").exists())


def _find(path: Path) -> tuple[Path, Path]:
    """A run folder and its checkpoint."""
    if not path.is_dir():
        raise UserError(f"model.from_pretrained: {path}: no such folder; a model of the hub has to be downloaded first")
    if not (path / "manifest.json").exists() and not (path / "state.json").exists():
        raise UserError(
            f"model.from_pretrained: {path}: no model here: neither a Hugging Face folder (config.json), nor a run "
            "(manifest.json), nor a checkpoint of one (state.json)"
        )
    return find_checkpoint(path)
