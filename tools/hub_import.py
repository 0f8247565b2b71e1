"""A Hugging Face folder as a run folder of step 0."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from shards.errors import UserError
from shards.files import write_atomic
from tools.hub_files import new_folder, progress_bar, read_tokenizer, special_ids, write_json
from train.models import ModelRegistry
from train.models.hf import HubFolder, Part, copy_part, match_parts, model_file
from train.pieces import pieces
from train.stored_weights import write_weights


def import_pretrained(directory: Path, out: Path, *, overwrite: bool = False) -> tuple[int, Path]:
    """Write `model.yaml`, `tokenizer.json`, `manifest.json` and a checkpoint of float32 weights, or nothing.

    Memory: the largest of our tensors twice.

    Returns:
        number of parameters, and the checkpoint.

    Raises:
        UserError: something is missing in the folder, its model is not supported or its weights do not fit, or `out` is
            taken.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such folder; fetch a model of the hub first: hf download OWNER/NAME --local-dir DIR"
        )
    if (directory / "manifest.json").exists():
        raise UserError(f"{directory}: a run folder already; minigpt-export makes a Hugging Face folder of one")
    config = ModelRegistry.load_config(model_file(directory))
    tokenizer_json, tokenizer = read_tokenizer(directory)
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    source = HubFolder(directory)
    parts: dict[str, list[Part]] = {}
    for part in match_parts(model, source):
        parts.setdefault(part.ours, []).append(part)
    shapes = model.whole_shapes
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    eos, bos = _special_ids(directory, tokenizer)
    manifest = {
        "name": directory.absolute().name,
        "imported_from": str(directory.absolute()),
        "parameters": model.get_num_params(),
        "data": {
            "vocab_size": tokenizer.get_vocab_size(),
            "eos_id": eos,
            "bos_id": bos,
        },
    }
    with new_folder(out, overwrite, _made_here) as folder, progress_bar(f"reading {directory}", size) as done:

        def read(name: str) -> Tensor:
            tensor = torch.empty(shapes[name])
            (piece,) = pieces(tensor)
            for part in parts[name]:
                copy_part(source, part, piece)
            done(4 * tensor.numel())
            return tensor

        checkpoint = write_weights(folder / "checkpoints", shapes, read, origin=str(directory.absolute()))
        write_atomic(folder / "tokenizer.json", tokenizer_json)
        fields = config.model_dump(mode="json", exclude_none=True)
        write_atomic(
            folder / "model.yaml", f"# from {directory.absolute()}\n" + yaml.safe_dump(fields, sort_keys=False)
        )
        write_json(folder / "manifest.json", manifest)
    return model.get_num_params(), out / checkpoint.relative_to(folder)


def _made_here(folder: Path) -> bool:
    """Whether an import made a folder, going by its manifest; nothing was trained in it."""
    try:
        return "imported_from" in json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _special_ids(directory: Path, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """EOS and BOS of the base model: config.json, or else the tokens that tokenizer_config.json names."""
    if (directory / "config.json").exists():
        return special_ids(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    path = directory / "tokenizer_config.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    eos, bos = (tokenizer.token_to_id(names[key]) if names.get(key) else None for key in ("eos_token", "bos_token"))
    return eos, bos
