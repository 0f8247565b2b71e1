"""A checkpoint as a Hugging Face folder, and the proof that it computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from shards.errors import UserError
from shards.files import write_atomic
from tools.hub_files import (
    DTYPES,
    Entry,
    cast,
    new_folder,
    progress_bar,
    write_json,
    write_safetensors,
    write_tokenizer,
)
from tools.model_card import is_card, model_card
from train.load import find_checkpoint, load_run, run_model_config
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.hf import hub_parts, load_pretrained
from train.models.hf_config import hf_config
from train.stored_weights import StoredWeights

# Largest difference of logits that --check lets pass, as a part of the largest logit, both sides computing in float32
# with the same weights: sums in another order move them by about 1e-6 of it, one exchanged matrix by about 1.
TOLERANCE = 1e-4
TEXTS = (
    "The old lighthouse keeper climbed the stairs every evening, as his father had done before him. From the top he "
    "could see the harbour, the fishing boats and, on clear days, the islands at the horizon.",
    'import os\n\n\ndef main() -> None:\n    for name in sorted(os.listdir(".")):\n        print(f"{name}: {42}")\n',
    "Wasser gefriert bei 0 °C und siedet bei 100 °C. 水在零度结冰。 L'eau bout à 100 degrés; E = mc², π ≈ 3.14159!",
)


@dataclass(frozen=True)
class Export:
    """What was written: the folder, its format, the dtype, the weight files, their bytes, the class that loads it."""

    out: Path
    format: str
    dtype: str
    files: list[str]
    size: int
    architecture: str | None


@dataclass(frozen=True)
class Comparison:
    """What `--check` found, in logits: `difference` of the written model to ours with the same weights, which must not
    exceed `tolerance`; and `rounding`, what the dtype of the file moved."""

    difference: float
    tolerance: float
    rounding: float
    loader: str


def export_pretrained(
    source: Path,
    out: Path,
    *,
    file_format: str = "safetensors",
    dtype: str = "bfloat16",
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> Export:
    """Write a checkpoint as a folder that `from_pretrained` of transformers loads; complete, or not there.

    Memory: the largest of our tensors twice. With `file_format` "pth" all weights in `dtype` as well.

    Args:
        source: run folder or checkpoint.
        out: the folder to make.
        file_format: "safetensors", or "pth" for one file of torch, which any model can be written as.
        dtype: of the weights: "bfloat16", "float16" or "float32". Routers' correction biases stay float32.
        max_shard_size: bytes of a file of weights, for safetensors.
        overwrite: replace what an earlier call made.

    Raises:
        UserError: no checkpoint there, it is not of the run's model, transformers has no such model, or `out` is taken.
    """
    run, checkpoint = find_checkpoint(source)
    config = run_model_config(run)
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    eos, bos = manifest["data"].get("eos_id"), manifest["data"].get("bos_id")
    native = hf_config(config, dtype) if file_format == "safetensors" else None
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    weights = StoredWeights(checkpoint)
    _check_names(model, weights)
    buffers = dict(model.named_buffers())
    entries = [
        Entry(part, weights.shapes[part.ours], torch.float32 if part.ours in buffers else DTYPES[dtype])
        for part in hub_parts(model)
    ]
    size = sum(entry.size for entry in entries)
    with new_folder(out, overwrite, _made_here) as folder, progress_bar(f"writing {out}", size) as written:
        if native is None:
            tied = config.tie_word_embeddings
            files = _write_torch(folder / "model.pth", entries, weights.read, tied, written)
            fields = config.model_dump(mode="json", exclude_none=True)
            write_atomic(folder / "model.yaml", yaml.safe_dump(fields, sort_keys=False))
        else:
            files = write_safetensors(folder, entries, weights.read, max_shard_size, written)
            ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None}
            write_json(folder / "config.json", {**native, **ids})
            write_json(
                folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
            )
        tokenizer_json = (run / "tokenizer.json").read_bytes()
        write_tokenizer(folder, tokenizer_json, config.max_position_embeddings, eos, bos)
        architecture = native["architectures"][0] if native else None
        parameters = (model.get_num_params(), model.get_num_active_params())
        write_atomic(folder / "README.md", model_card(run, checkpoint, config, parameters, architecture, dtype))
    return Export(out, file_format, dtype, files, size, architecture)


def _made_here(folder: Path) -> bool:
    """Whether an export made a folder, going by its card; no run and no import has one."""
    card = folder / "README.md"
    return card.is_file() and is_card(card.read_text("utf-8", "replace")) and not (folder / "manifest.json").exists()


def _check_names(model: BaseModelForCausalLM, weights: StoredWeights) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in wanted.items() if weights.shapes.get(name) != shape]
    wrong += [name for name in weights.shapes if name not in wanted]
    if wrong:
        raise UserError(
            f"{weights.checkpoint}: not a checkpoint of this run's model ({wrong[0]} is missing or differs)"
        )


def _write_torch(
    path: Path, entries: list[Entry], read: Callable[[str], Tensor], tied: bool, written: Callable[[int], None]
) -> list[str]:
    """One dictionary of tensors; a tied head is in it too, as PyTorch's own `load_state_dict` expects."""
    tensors: dict[str, Tensor] = {}
    ours: tuple[str, Tensor] | None = None
    for entry in entries:
        if ours is None or ours[0] != entry.part.ours:
            ours = None
            ours = (entry.part.ours, read(entry.part.ours))
        tensors[entry.part.hub] = cast(ours[1], entry).clone()
        written(entry.size)
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, path)
    return [path.name]


@torch.no_grad()
def compare(source: Path, export: Export) -> Comparison:
    """Load what was written, and compare its logits on a few texts with those of the checkpoint.

    Both compute in float32. The checkpoint's weights are rounded to the dtype of the file first, so that any
    difference is a mistake, whatever the dtype; what rounding does is measured apart.

    Raises:
        UserError: transformers is not installed, or its tokenizer gives other tokens.
    """
    run, checkpoint = find_checkpoint(source)
    model, tokenizer_json, _ = load_run(run, checkpoint)
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    limit = min(model.config.max_position_embeddings, 512)
    batches = [torch.tensor([ids[:limit]]) for text in TEXTS if (ids := tokenizer.encode(text).ids)]
    exact = [_logits(model, ids) for ids in batches]
    for parameter in model.parameters():
        parameter.copy_(parameter.to(DTYPES[export.dtype]))
    expected = [_logits(model, ids) for ids in batches]
    del model
    if export.architecture is None:
        loader, other = "minigpt", load_pretrained(export.out)
    else:
        loader, other = "transformers", _load_with_transformers(export.out, batches, limit)
    found = [_logits(other, ids) for ids in batches]
    return Comparison(
        difference=_largest(found, expected),
        tolerance=TOLERANCE * max(1.0, max(logits.abs().max().item() for logits in expected)),
        rounding=_largest(expected, exact),
        loader=loader,
    )


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits.float()


def _largest(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference; infinite where one is not a number."""
    differences = [(a - b).abs().max().item() for a, b in zip(first, second, strict=True)]
    return max(value if value == value else float("inf") for value in differences)


def _load_with_transformers(out: Path, batches: list[Tensor], limit: int) -> Any:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError("--check needs transformers: pip install transformers") from None
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text, ids in zip(TEXTS, batches, strict=True):
        if tokenizer(text, truncation=True, max_length=limit)["input_ids"] != ids[0].tolist():
            raise UserError(f"{out}: transformers' tokenizer gives other tokens for {text[:40]!r}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    wrong = {name: found for name, found in info.items() if found}
    if wrong:
        raise UserError(f"{out}: transformers does not find its tensors here: {wrong}")
    return model
