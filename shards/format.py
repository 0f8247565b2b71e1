"""The files of a token dataset: names, the 64-byte index header, and the manifest `dataset.json`.

    shard-00000.bin          token ids only, little-endian uint16 (vocabulary <= 65,536) or uint32
    shard-00000.idx          64-byte header, then u32[documents]: ends of documents, relative to the shard start
    documents-00000.parquet  id, source and tokens of every document that ends in the shard
    tokenizer.json           the tokenizer, byte for byte
    dataset.json             the manifest; written last, so its presence means that the dataset is complete

The shards form one stream of tokens. All but the last hold exactly `shard_tokens`, so stream position p lies in shard
p // shard_tokens. A document belongs to the shard that holds its last token (EOS): one that ends at stream position e
(exclusive) is listed in shard (e - 1) // shard_tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash

from shards.errors import UserError
from shards.files import write_atomic

FORMAT_VERSION = 1
DEFAULT_SHARD_TOKENS = 2**27
MAX_SHARD_TOKENS = 2**32 - 1  # document ends are u32, relative to the shard
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"
COPY_AGAIN = "copy it again from where the dataset was made, or remove the dataset and run minigpt-prep tokenize again"

MAGIC = b"MGPTIDX1"
HEADER_BYTES = 64
# magic, version, bytes per token, tokens, documents, global offset, xxh3 of .bin, xxh3 of the ends, zero
_HEADER = struct.Struct("<8sIIQQQQQQ")
assert _HEADER.size == HEADER_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest and the index header both say about one shard.

    `offset` is the stream position of its first token, `documents` counts the documents that end in it, `bin_xxh3` and
    `idx_xxh3` are xxh3-64 (16 hex digits) of the tokens and of the array of document ends.
    """

    tokens: int
    documents: int
    offset: int
    bin_xxh3: str
    idx_xxh3: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `dataset.json`.

    `sources` maps each source to its `documents`, `tokens` (EOS included) and `text_bytes` (UTF-8). `recipe` says how
    the dataset was made and `backend` which tokenizer library encoded it; neither enters the fingerprint.
    """

    format_version: int
    dtype: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    tokenizer_hash: str
    shard_tokens: int
    tokens: int
    documents: int
    text_bytes: int
    sources: dict[str, dict[str, int]]
    backend: str
    recipe: dict[str, Any]
    fingerprint: str
    shards: tuple[ShardEntry, ...]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read `directory/dataset.json`.

        Raises:
            UserError: it is missing, is not JSON, has a newer format version, or contradicts itself.
        """
        path = directory / MANIFEST
        try:
            fields = orjson.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory} has no {MANIFEST}: the dataset is unfinished or the path is wrong; "
                "run the same minigpt-prep tokenize command again to finish it"
            ) from None
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error}); {COPY_AGAIN}") from None
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if not isinstance(version, int):
            raise UserError(f"{path}: no format_version: this is not the manifest of a minigpt dataset")
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {version} is newer than this minigpt reads ({FORMAT_VERSION}); update minigpt"
            )
        try:
            shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
            manifest = cls(**fields, shards=shards)
            problem = manifest._contradiction()
        except (KeyError, TypeError, ValueError) as error:
            problem = str(error)
        if problem:
            raise UserError(f"{path}: damaged manifest ({problem}); {COPY_AGAIN}")
        return manifest

    def _contradiction(self) -> str | None:
        """The first thing in the manifest that cannot be true, or None."""
        if self.dtype != token_dtype(self.vocab_size).name:
            return f"dtype {self.dtype} with a vocabulary of {self.vocab_size:,}"
        if not 1 <= self.shard_tokens <= MAX_SHARD_TOKENS or not self.shards:
            return f"{len(self.shards)} shards of {self.shard_tokens:,} tokens"
        offset = documents = 0
        for index, entry in enumerate(self.shards):
            full = index < len(self.shards) - 1
            if entry.offset != offset or not (self.shard_tokens if full else 1) <= entry.tokens <= self.shard_tokens:
                return f"shard {index} holds {entry.tokens:,} tokens from stream position {entry.offset:,}"
            offset += entry.tokens
            documents += entry.documents
        if (offset, documents) != (self.tokens, self.documents):
            return (
                f"its shards add up to {offset:,} tokens and {documents:,} documents, "
                f"its totals say {self.tokens:,} and {self.documents:,}"
            )
        return None

    def write(self, directory: Path) -> None:
        """Write `directory/dataset.json` atomically: indented JSON with one line per shard."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shards = [json.dumps(dataclasses.asdict(entry)) for entry in fields.pop("shards")]
        head = json.dumps(fields, indent=2, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n    ".join(shards)
        write_atomic(directory / MANIFEST, f'{head},\n  "shards": [\n    {lines}\n  ]\n}}\n')


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for a vocabulary of up to 65,536 ids, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@functools.lru_cache(maxsize=2)
def tokenizer_hash(tokenizer_json: bytes) -> str:
    """xxh3-128 of the tokenizer's canonical JSON (keys sorted, no white space): formatting does not change it.

    Raises:
        UserError: the bytes are not JSON.
    """
    try:
        canonical = orjson.dumps(orjson.loads(tokenizer_json), option=orjson.OPT_SORT_KEYS)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{TOKENIZER}: not valid JSON ({error})") from None
    return xxhash.xxh3_128_hexdigest(canonical)


def dataset_fingerprint(dtype: str, tokenizer: str, shards: Iterable[ShardEntry]) -> str:
    """xxh3-128 of dtype, tokenizer hash and shard checksums: the same data made elsewhere has the same fingerprint."""
    checksums = [[entry.bin_xxh3, entry.idx_xxh3] for entry in shards]
    return xxhash.xxh3_128_hexdigest(orjson.dumps([dtype, tokenizer, checksums]))


def bin_path(directory: Path, shard: int) -> Path:
    """Where the tokens of a shard lie."""
    return directory / f"shard-{shard:05d}.bin"


def idx_path(directory: Path, shard: int) -> Path:
    """Where the document ends of a shard lie."""
    return directory / f"shard-{shard:05d}.idx"


def documents_path(directory: Path, shard: int) -> Path:
    """Where ids and sources of the documents that end in a shard lie."""
    return directory / f"documents-{shard:05d}.parquet"


def pack_header(entry: ShardEntry, token_bytes: int) -> bytes:
    """The 64-byte header of a shard's .idx file."""
    checksums = int(entry.bin_xxh3, 16), int(entry.idx_xxh3, 16)
    return _HEADER.pack(MAGIC, 1, token_bytes, entry.tokens, entry.documents, entry.offset, *checksums, 0)


def unpack_header(header: bytes, path: Path, token_bytes: int) -> ShardEntry:
    """Parse the first 64 bytes of the .idx file `path`.

    Raises:
        UserError: cut short, not an index, a newer version, or another token width than `token_bytes`.
    """
    if len(header) < HEADER_BYTES:
        raise UserError(f"{path}: {len(header)} bytes, too short for an index header; {COPY_AGAIN}")
    magic, version, width, tokens, documents, offset, bin_xxh3, idx_xxh3, zero = _HEADER.unpack(header)
    if magic != MAGIC or zero != 0:
        raise UserError(f"{path}: not a minigpt shard index (begins with {magic!r}); {COPY_AGAIN}")
    if version > 1:
        raise UserError(f"{path}: index version {version} is newer than this minigpt reads (1); update minigpt")
    if width != token_bytes:
        raise UserError(f"{path}: {width} bytes per token, expected {token_bytes}: the file is from another dataset")
    return ShardEntry(tokens, documents, offset, f"{bin_xxh3:016x}", f"{idx_xxh3:016x}")
