"""Small token datasets on disk, for the tests of mixtures, loaders and commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.writer import DatasetWriter

EOS = 0


def tokenizer_json(words: int = 500) -> bytes:
    """A word-level tokenizer: id 0 is <eos>, id n the word `w<n>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<eos>": 0, **{f"w{number}": number for number in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer.to_str().encode()


def write_dataset(
    directory: Path,
    tokens: int,
    *,
    seed: int = 0,
    shard_tokens: int = 1000,
    vocab_size: int = 500,
    words: int = 500,
    mean: int = 40,
) -> np.ndarray:
    """A dataset of random documents, some of them a lone EOS; returns its stream of tokens."""
    rng = np.random.default_rng(seed)
    ends = np.unique(np.minimum(rng.integers(1, 2 * mean, tokens).cumsum(), tokens))
    stream = rng.integers(1, min(words, vocab_size), tokens)
    stream[ends - 1] = EOS
    writer = DatasetWriter(
        directory,
        tokenizer_json=tokenizer_json(words),
        vocab_size=vocab_size,
        eos_id=EOS,
        shard_tokens=shard_tokens,
    )
    ids = pa.array([f"{directory.name}-{number}" for number in range(len(ends))])
    names = pa.array([directory.name] * len(ends))
    writer.append(stream.astype(np.uint32), ends.astype(np.int64), ids, names, np.full(len(ends), 10))
    writer.finish(backend="test", recipe={})
    return stream
