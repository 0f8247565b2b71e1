"""Weights from Hugging Face folders: which of their tensors is which part of ours, and reading them.

Every Hugging Face tensor is a part of exactly one of ours: we keep query, key and value as one matrix, gate and up as
another, and all experts of a layer as one tensor. A `Part` names such a pair; `hub_parts` lists them for a model, in an
order that visits each of our tensors once. Names are those of files on the hub, with one tensor per expert; files that
hold the experts of a layer as one tensor, as transformers 5 does in memory, are read as well.

Reading copies one tensor at a time to its place, and of a model that is shared among ranks only the pieces of this one
(see `train.pieces`), so that it needs no memory but the model's own.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.errors import UserError
from train.models.base_config import BaseModelConfig
from train.models.registry import ModelRegistry
from train.models.transformer import BaseModelForCausalLM
from train.pieces import Piece, pieces

# Tensors that files may hold and no model of ours needs: tables of older exports, the layers behind the last that
# predict further tokens (DeepSeek-V3), a head that is the embedding once more.
_TABLES = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Part(NamedTuple):
    """A tensor of the hub and where it lies: `hub == ours[place]`; `place` always begins with the rows."""

    hub: str
    ours: str
    place: tuple[int | slice, ...]


def hub_parts(model: BaseModelForCausalLM, stored: Iterable[str] = ()) -> list[Part]:
    """All tensors of a model under their names on the hub; it may be on the meta device, or shared among ranks.

    Args:
        model: whose parameters and buffers are meant, of all ranks; a tied head is none of its own.
        stored: names in a file; where it holds the experts of a layer as one tensor, that is what is listed.
    """
    stored = set(stored)
    return [part for name, shape in model.whole_shapes.items() for part in _parts(name, shape, model.config, stored)]


def _parts(name: str, shape: tuple[int, ...], config: BaseModelConfig, stored: set[str]) -> list[Part]:
    hub = name if name.startswith("lm_head.") else f"model.{name}"
    everything = Part(hub, name, (slice(0, shape[0]),))
    if hub in stored:
        return [everything]
    if ".qkv_proj." in name:
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        edges = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}
        return [Part(hub.replace("qkv_proj", n), name, (slice(*rows),)) for n, rows in edges.items()]
    if ".shared_experts." in name and config.model_type == "minimind2":
        return _separate_shared_experts(hub, name, shape, getattr(config, "n_shared_experts", 0))
    if ".experts." in name:
        prefix, kind = hub.rsplit(".", 1)
        half = shape[1] // 2
        inner: dict[str, tuple[slice, ...]] = {"down_proj": ()}
        if kind == "gate_up_proj":
            inner = {"gate_proj": (slice(0, half),), "up_proj": (slice(half, 2 * half),)}
        return [
            Part(f"{prefix}.{expert}.{n}.weight", name, (expert, *rows))
            for expert in range(shape[0])
            for n, rows in inner.items()
        ]
    if ".gate_up_proj." in name:
        half = shape[0] // 2
        halves = {"gate_proj": slice(0, half), "up_proj": slice(half, 2 * half)}
        return [Part(hub.replace("gate_up_proj", n), name, (rows,)) for n, rows in halves.items()]
    return [everything]


def _separate_shared_experts(hub: str, name: str, shape: tuple[int, ...], experts: int) -> list[Part]:
    """minimind 2 keeps shared experts apart, whose outputs are summed; side by side they are one wider SwiGLU."""
    place = hub.replace("shared_experts.", "shared_experts.{}.")
    if "down_proj" in name:
        size = shape[1] // experts
        columns = [slice(size * n, size * (n + 1)) for n in range(experts)]
        return [Part(place.format(n), name, (slice(0, shape[0]), column)) for n, column in enumerate(columns)]
    size = shape[0] // (2 * experts)
    return [
        Part(place.format(n).replace("gate_up_proj", kind), name, (slice(first, first + size),))
        for n in range(experts)
        for kind, first in (("gate_proj", size * n), ("up_proj", size * (experts + n)))
    ]


class HubFolder:
    """The tensors of a Hugging Face folder: `shapes` by name, read one at a time.

    `model.safetensors`, or `model.safetensors.index.json` with its shards; or else one file of torch: `*.pth`, or
    `pytorch_model.bin`.

    Raises:
        UserError: there are no weights, a shard of the index is missing, or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}
        self._open: tuple[Path, Any] | None = None
        paths = _safetensors_files(directory)
        for path in paths:
            file = self._file(path)
            names = file.keys()
            for name in names:
                entry = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(entry.get_shape()), entry.get_dtype()
                self._files[name] = path
        if not paths:
            self._tensors = _torch_tensors(directory)
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
            self.dtypes = {name: str(tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or the rows `first` to `stop` of it, in the dtype of the file."""
        if name in self._tensors:
            return self._tensors[name][first:stop]
        file = self._file(self._files[name])
        whole = first == 0 and stop in (None, *self.shapes[name][:1])
        try:
            return file.get_tensor(name) if whole else file.get_slice(name)[first:stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: {name} cannot be read ({error}); fetch the file again") from None

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            try:
                # Read, not mapped: mapped pages would count as memory of this process until the file is closed.
                self._open = (path, safe_open(path, "pt", backend="pread"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not readable as safetensors ({error}); fetch the file again") from None
        return self._open[1]


def _safetensors_files(directory: Path) -> list[Path]:
    """The shards that the index names, or the one file, or none."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [path for path in [directory / "model.safetensors"] if path.exists()]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not readable as an index of shards: {error!r}") from None
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise UserError(f"{index}: names {len(names)} files, of which {_some(missing)} missing; fetch the folder again")
    return [directory / name for name in names]


def _torch_tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / "checkpoints").is_dir():
        raise UserError(f"{directory}: this is a run folder; minigpt-export makes a Hugging Face folder of it")
    found = [*sorted(directory.glob("*.pth")), *directory.glob("pytorch_model.bin")]
    if len(found) != 1:
        what = f"{len(found)} weight files ({', '.join(p.name for p in found)})" if found else "no weights"
        raise UserError(
            f"{directory}: {what} here; expected model.safetensors, model.safetensors.index.json with its shards, or "
            "one file *.pth or pytorch_model.bin"
        )
    try:
        content = torch.load(found[0], map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever unpickling raises
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{found[0]}: not readable as a file of tensors by torch.load ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{found[0]}: expected a dictionary of tensors by name")
    return content


def match_parts(model: BaseModelForCausalLM, folder: HubFolder) -> list[Part]:
    """The parts of a model that a folder holds, after checking that it holds them all and nothing else.

    Raises:
        UserError: naming what is missing, unexpected, of another shape, or quantised.
    """
    parts = hub_parts(model, folder.shapes)
    whole = {name: torch.empty(shape, device="meta") for name, shape in model.whole_shapes.items()}
    wanted = {part.hub: tuple(whole[part.ours][part.place].shape) for part in parts}
    config = model.config
    extra = [name for name in folder.shapes if name not in wanted and not _needless(name, config)]
    missing = [name for name in wanted if name not in folder.shapes]
    shapes = [
        f"{name} {list(folder.shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in folder.shapes and folder.shapes[name] != shape
    ]
    floats = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
    packed = [f"{name} {folder.dtypes[name]}" for name in wanted if folder.dtypes.get(name, "F32") not in floats]
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
            ("quantised, so that they cannot be trained", packed),
        )
        if names
    ]
    if "lm_head.weight" in missing:
        problems.append("a model whose head is its embedding says so: tie_word_embeddings: true")
    if problems:
        raise UserError("\n  ".join([f"{folder.directory}: these weights are not of this model", *problems]))
    return parts


def _needless(name: str, config: BaseModelConfig) -> bool:
    if _TABLES.search(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    layer = _LAYER.match(name)
    return config.model_type == "deepseek_v3" and layer is not None and int(layer[1]) >= config.num_hidden_layers


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


@torch.no_grad()
def load_hf_weights(model: BaseModelForCausalLM, directory: str | Path) -> None:
    """Fill a model with the weights of a Hugging Face folder, cast to the dtype of its own parameters.

    The model is allocated (not on the meta device). Where it is shared among ranks, each calls this and reads its own
    pieces; nothing is sent between them.

    Raises:
        UserError: the folder has no weights, they cannot be read, or they are not exactly those of this model.
    """
    folder = HubFolder(Path(directory))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = {name: pieces(tensor, model.cuts.get(name)) for name, tensor in tensors}
    for part in match_parts(model, folder):
        for piece in held.get(part.ours, ()):  # a stage of a pipeline has some layers only
            copy_part(folder, part, piece)


def copy_part(folder: HubFolder, part: Part, piece: Piece) -> None:
    """Copy what a part and a piece of our tensor have in common into the piece."""
    source: list[slice] = []
    target: list[int | slice] = []
    for offset, size, place in itertools.zip_longest(piece.offsets, piece.tensor.shape, part.place):
        if isinstance(place, int):  # one expert of many: a dimension that the hub's tensor does not have
            if not offset <= place < offset + size:
                return
            target.append(place - offset)
            continue
        start, stop = (place.start, place.stop) if place is not None else (0, offset + size)
        first, last = max(start, offset), min(stop, offset + size)
        if first >= last:
            return
        source.append(slice(first - start, last - start))
        target.append(slice(first - offset, last - offset))
    rows, *rest = source
    piece.tensor[tuple(target)].copy_(folder.read(part.hub, rows.start, rows.stop)[(slice(None), *rest)])


def load_pretrained(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> BaseModelForCausalLM:
    """A model from a Hugging Face folder, or from one that `minigpt-export` wrote, in evaluation mode.

    Its parameters and its computation have `dtype`; buffers stay float32.

    Raises:
        UserError: the folder has no configuration, it is of no family known here, or its weights do not fit.
    """
    directory = Path(directory)
    config = ModelRegistry.load_config(model_file(directory))
    with torch.device("meta"):
        model = ModelRegistry.create_model(config.model_type, config)
    model.allocate(device, dtype)
    load_hf_weights(model, directory)
    return model.eval()


def model_file(directory: Path) -> Path:
    """The file that describes the model of a folder: config.json, or model.yaml where Hugging Face has no such model.

    Raises:
        UserError: there is neither.
    """
    for name in ("config.json", "model.yaml"):
        if (directory / name).exists():
            return directory / name
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; a model of the hub has to be downloaded first")
    raise UserError(f"{directory}: no model here (neither config.json nor model.yaml)")
