"""The files of a Hugging Face folder: weights written as they come, the tokenizer, and the folder as a whole.

A safetensors file is a length, a JSON header with the place of every tensor, and the tensors. All shapes are known
beforehand, so the header is written first and each tensor goes to its place as soon as it is there: no more than one of
ours is in memory, however large a file is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from shards.errors import UserError
from shards.files import sync_directory, write_atomic
from train.models.hf import Part

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Entry:
    """A tensor to write: its name on the hub, the part of ours that it is, its shape and its dtype in the file."""

    def __init__(self, part: Part, whole: Sequence[int], dtype: torch.dtype) -> None:
        self.part, self.dtype = part, dtype
        self.shape = list(torch.empty(tuple(whole), device="meta")[part.place].shape)
        self.size = math.prod(self.shape) * dtype.itemsize


def write_safetensors(
    folder: Path,
    entries: Sequence[Entry],
    read: Callable[[str], Tensor],
    max_shard_size: int,
    written: Callable[[int], None],
) -> list[str]:
    """Write `model.safetensors`, or, if that would exceed `max_shard_size` bytes, shards and their index.

    Args:
        folder: to write into.
        entries: in an order that visits each of our tensors once.
        read: gives one of our tensors by name; it is called once for each.
        max_shard_size: a tensor larger than this has a shard of its own.
        written: is told the bytes of each tensor.

    Returns:
        names of the files with weights.

    Raises:
        UserError: a value is too large for its dtype.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > max_shard_size:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    ours: tuple[str, Tensor] | None = None
    for name, shard in zip(names, shards, strict=True):
        with _safetensors_file(folder / name, shard) as (file, places):
            for entry in shard:
                if ours is None or ours[0] != entry.part.ours:
                    ours = None  # makes room before the next is read
                    ours = (entry.part.ours, read(entry.part.ours))
                file.seek(places[entry.part.hub])
                file.write(_bytes(cast(ours[1], entry)))
                written(entry.size)
    if count > 1:
        weight_map = {e.part.hub: name for name, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": sum(e.size for e in entries)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return names


@contextlib.contextmanager
def _safetensors_file(path: Path, entries: list[Entry]) -> Iterator[tuple[IO[bytes], dict[str, int]]]:
    """A new file with its header, and where in it the bytes of each tensor go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in sorted(entries, key=lambda e: -e.dtype.itemsize):  # wide types first keeps all of them aligned
        header[entry.part.hub] = {
            "dtype": _CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield file, {entry.part.hub: start + header[entry.part.hub]["data_offsets"][0] for entry in entries}
        file.flush()
        os.fsync(file.fileno())


def cast(ours: Tensor, entry: Entry) -> Tensor:
    """The part of our tensor that an entry is, in its dtype.

    Raises:
        UserError: a value has become infinite.
    """
    source = ours[entry.part.place]
    tensor = source.to(entry.dtype, memory_format=torch.contiguous_format).contiguous()
    if entry.dtype == torch.float16 and not tensor.isfinite().all() and source.isfinite().all():
        raise UserError(f"{entry.part.hub}: a value is beyond float16's 65,504; use --dtype bfloat16 or float32")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_tokenizer(folder: Path) -> tuple[bytes, Tokenizer]:
    """`tokenizer.json` of a folder, as it is and read.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"{folder}: tokenizer.json is missing; with transformers, AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR) writes one from older tokenizer files"
        )
    content = path.read_bytes()
    try:
        return content, Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path}: not readable as a tokenizer ({error}); fetch the file again") from None


def special_ids(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """EOS and BOS id of a config.json or generation_config.json; of several EOS ids the first."""
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    return (next(iter(eos), None) if isinstance(eos, list) else eos), bos


def write_tokenizer(folder: Path, tokenizer_json: bytes, max_length: int, eos: int | None, bos: int | None) -> None:
    """Write `tokenizer.json`, byte for byte, and the `tokenizer_config.json` that AutoTokenizer needs.

    Padding is EOS: base models have no token of their own for it, and batches of prompts need one.
    """
    write_atomic(folder / "tokenizer.json", tokenizer_json)
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    names = {name: tokenizer.id_to_token(i) for name, i in (("eos", eos), ("bos", bos), ("pad", eos)) if i is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in names.items() if token is not None},
    }
    write_json(folder / "tokenizer_config.json", config)


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool, made_here: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all has gone well; otherwise there is none.

    Args:
        out: the folder to make.
        overwrite: replace `out`, if `made_here` knows it for the work of an earlier call: weights that were trained or
            downloaded cannot be made again.
        made_here: whether the same command made a folder.

    Raises:
        UserError: `out` is not empty and may not be replaced.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise UserError(f"{out}: exists and is not empty; choose another --out, or --overwrite replaces it")
        if (out / ".git").exists() or not made_here(out):
            raise UserError(f"{out}: does not look like a folder that this command made, so it is not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.parent / f".{out.name}.{end}" for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with bytes, rate and remaining time; gives the function to call with the bytes done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000; units are decimal.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size: '{text}' is not a size; write 5GB, 500MB or a number of bytes")
    return int(size)
