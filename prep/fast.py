"""`fastokens`, loaded in the background: a large vocabulary takes a part of a second.

Nothing heavy is imported here, so that the command line can begin to load before it imports the rest.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    import numpy as np


class FastEncoder:
    """`fastokens`: whole batches to flat buffers, with threads of its own, outside the interpreter's lock."""

    def __init__(self, tokenizer_json: bytes) -> None:
        from importlib.metadata import version

        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.backend = f"fastokens {version('fastokens')}"

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents, uint32 [n], and the borders between them, int64 [len(texts) + 1]."""
        import numpy as np

        ids, offsets = self._tokenizer.encode_batch_flat(texts, False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<i8")


def use_threads(workers: int) -> int:
    """Settle how many threads encode, before the libraries that read it from the environment are loaded.

    Each worker encodes a block of its own with `fastokens` in one thread: two levels of threads cost a tenth of the
    speed. `tokenizers` has only threads of its own. Arrow's own allocator gives memory back to the system between
    blocks, and so does worse here than the C library's. Settings of the user's win.

    Args:
        workers: threads; 0: one per core that this process may use.

    Returns:
        The number of threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    threads = workers or cores or 1
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    return threads


@lru_cache(maxsize=1)
def load_fast_encoder(tokenizer_json: bytes) -> Future[FastEncoder]:
    """Begin to load; a second call for the same tokenizer gives the same encoder."""
    pool = ThreadPoolExecutor(1)
    loading = pool.submit(FastEncoder, tokenizer_json)
    pool.shutdown(wait=False)
    return loading


def load_tokenizer(path: Path) -> tuple[bytes, Path]:
    """Read a `tokenizer.json` or the one in a folder; gives its bytes and its path.

    Raises:
        UserError: there is none.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return path.read_bytes(), path
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); --tokenizer is a tokenizer.json or a folder that holds one "
            f"(minigpt-prep train-tokenizer makes one)"
        ) from None
