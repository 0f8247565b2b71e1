"""Serves a mixture plan as batches of tensors: any step of any rank from its sample numbers alone.

One numba kernel call per micro-batch gathers the windows from the memory-mapped shards into a fresh int64 buffer,
without the GIL, so that threads can run ahead of the training loop. They hold no state: the order is that of the sample
numbers.
"""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from shards.batch import Batch
from shards.errors import UserError
from shards.mixture import Located, MixtureConfig, MixturePlan, load_mixture


@intrinsic
def _pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """Typed pointer to a memory address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.uint64, dtype), generate


@njit(
    "int64(int32[::1], int64[::1], int64[::1], int64[::1], uint64[::1], uint8[::1], int64, int64[:, ::1], int64)",
    cache=True,
    nogil=True,
)
def gather(
    source: np.ndarray,
    start: np.ndarray,
    first_shard: np.ndarray,
    shard_tokens: np.ndarray,
    addresses: np.ndarray,
    widths: np.ndarray,
    vocab_size: int,
    out: np.ndarray,
    row: int,
) -> int:
    """Copy windows into the rows of `out`, from `row` on.

    Returns the number of rows when done, the row that needs a shard not yet mapped, or -1 - row where a row holds an id
    that is not below `vocab_size`.

    Args:
        source, start: source and stream position of each window [n].
        first_shard, shard_tokens, widths: per source the number of its first shard in `addresses`, tokens per shard and
            bytes per token.
        addresses: where each shard's tokens lie in memory, 0 if it is not mapped.
        out: [n, tokens per window].
        row: the first row to fill.
    """
    length = out.shape[1]
    while row < out.shape[0]:
        s = source[row]
        size = shard_tokens[s]
        done = 0
        largest = 0
        while done < length:  # once, or once more for each shard border inside the window
            shard = (start[row] + done) // size
            offset = start[row] + done - shard * size
            address = addresses[first_shard[s] + shard]
            if address == 0:
                return row
            take = min(length - done, size - offset)
            target = out[row, done : done + take]
            if widths[s] == 2:
                narrow = carray(_pointer(address, types.uint16), size)  # type: ignore[call-arg]
                for i in range(take):
                    token = np.int64(narrow[offset + i])
                    target[i] = token
                    largest = max(largest, token)
            else:
                wide = carray(_pointer(address, types.uint32), size)  # type: ignore[call-arg]
                for i in range(take):
                    token = np.int64(wide[offset + i])
                    target[i] = token
                    largest = max(largest, token)
            done += take
        if largest >= vocab_size:
            return -1 - row
        row += 1
    return row


class WindowReader:
    """Reads the windows of samples; several threads may share one. Shards are mapped when first needed and kept."""

    def __init__(self, plan: MixturePlan) -> None:
        datasets = [source.dataset for source in plan.sources]
        shards = np.array([len(dataset.shards) for dataset in datasets])
        self.plan = plan
        self._first_shard = np.cumsum(shards) - shards
        self._shard_tokens = np.array([dataset.shard_tokens for dataset in datasets])
        self._widths = np.array([dataset.dtype.itemsize for dataset in datasets], np.uint8)
        self._addresses = np.zeros(shards.sum(), np.uint64)
        self._mapped: list[np.ndarray] = []  # keeps the memory behind the addresses
        self._lock = threading.Lock()

    def read(self, samples: np.ndarray) -> tuple[torch.Tensor, Located]:
        """The windows of samples [n] as int64 [n, seq_len + 1] in a buffer of their own, and where they lie."""
        found = self.plan.locate(samples)
        n = len(samples)
        # A fresh buffer each time: a pool could hand out memory that a caller still looks at.
        buffer = torch.empty((n, self.plan.seq_len + 1), dtype=torch.int64)
        out, row = buffer.numpy(), 0
        tables = (self._first_shard, self._shard_tokens, self._addresses, self._widths, self.plan.vocab_size)
        while (row := gather(found.source, found.start, *tables, out, row)) < n:
            if row < 0:
                raise self._damaged(int(found.source[-1 - row]), int(found.start[-1 - row]))
            self._map_shards(int(found.source[row]), int(found.start[row]))
        return buffer, found

    def _damaged(self, source: int, start: int) -> UserError:
        dataset = self.plan.sources[source].dataset
        return UserError(
            f"{dataset.path}: tokens {start:,} to {start + self.plan.seq_len:,} hold an id that is not below the "
            f"vocabulary of {self.plan.vocab_size:,}: the shard is damaged; run minigpt-mix verify {dataset.path}"
        )

    def _map_shards(self, source: int, start: int) -> None:
        """Map the shards that hold the window at `start`."""
        dataset = self.plan.sources[source].dataset
        with self._lock:
            for shard in range(start // dataset.shard_tokens, (start + self.plan.seq_len) // dataset.shard_tokens + 1):
                tokens = dataset.shard(shard)
                self._mapped.append(tokens)
                self._addresses[self._first_shard[source] + shard] = tokens.ctypes.data


class WindowLoader:
    """Iterates the optimiser steps of one rank.

    A step of G = batch_size * accumulation * world_size samples from g on gives rank r the contiguous slice
    [g + r G / W, g + (r + 1) G / W), cut into `accumulation` micro-batches. A last step that is not full is left out.

    Args:
        plan: the mixture.
        batch_size: windows per micro-batch on this rank.
        accumulation: micro-batches per step.
        rank, world_size: this rank, of how many.
        next_sample: global number of the first sample; to resume, what this attribute was when the run stopped.
        stop_sample: no sample from this number on is drawn (default: the plan's total; without one, there is no end).
        document_mask: also give `cu_seqlens` and `position_ids`.
        num_workers: threads that work ahead; 0 works when asked.
        prefetch_factor: steps kept ready ahead of the caller.
        pin_memory: put batches into page-locked memory.
    """

    def __init__(
        self,
        plan: MixturePlan,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        next_sample: int = 0,
        stop_sample: int | None = None,
        document_mask: bool = False,
        num_workers: int = 1,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if min(batch_size, accumulation) < 1 or not 0 <= rank < world_size or next_sample < 0:
            raise ValueError(f"{batch_size=}, {accumulation=}, {rank=}, {world_size=}, {next_sample=}")
        self.plan = plan
        self.next_sample = next_sample  # first sample of the next step: all the state there is
        self.step_samples = batch_size * accumulation * world_size
        self._stop = plan.total_samples if stop_sample is None else stop_sample
        self._batch_size, self._accumulation, self._rank = batch_size, accumulation, rank
        self._document_mask, self._pin_memory = document_mask, pin_memory
        self._reader = WindowReader(plan)
        self._pool = ThreadPoolExecutor(num_workers, "window-loader") if num_workers else None
        self._prefetch = max(1, prefetch_factor)
        self._ahead: collections.deque[list[Future[Batch]]] = collections.deque()
        self._submitted = next_sample

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._pool is None:
            if self._is_over(self.next_sample):
                raise StopIteration
            batches = [self._batch(first) for first in self._micro_batches(self.next_sample)]
        else:
            self._work_ahead()
            if not self._ahead:
                raise StopIteration
            step = self._ahead.popleft()
            self._work_ahead()
            batches = [future.result() for future in step]
        self.next_sample += self.step_samples
        return batches

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _is_over(self, sample: int) -> bool:
        return self._stop is not None and sample + self.step_samples > self._stop

    def _micro_batches(self, sample: int) -> range:
        """First samples of this rank's micro-batches in the step that starts at `sample`."""
        first = sample + self._rank * self._batch_size * self._accumulation
        return range(first, first + self._batch_size * self._accumulation, self._batch_size)

    def _work_ahead(self) -> None:
        assert self._pool is not None
        while len(self._ahead) < self._prefetch and not self._is_over(self._submitted):
            self._ahead.append(
                [self._pool.submit(self._batch, first) for first in self._micro_batches(self._submitted)]
            )
            self._submitted += self.step_samples

    def _batch(self, first: int) -> Batch:
        samples = np.arange(first, first + self._batch_size, dtype=np.uint64)
        buffer, found = self._reader.read(samples)
        mask = _document_mask(self.plan, found) if self._document_mask else (None, None, self.plan.seq_len)
        batch = Batch(buffer, torch.from_numpy(found.source), *mask)
        return batch.pin_memory() if self._pin_memory else batch


def _document_mask(plan: MixturePlan, found: Located) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`cu_seqlens`, `position_ids` and `max_seqlen` of a batch, by bisection of the document ends."""
    seq_len, rows = plan.seq_len, len(found.start)
    borders = [np.zeros(1, np.int64)]
    for row, (source, start) in enumerate(zip(found.source.tolist(), found.start.tolist(), strict=True)):
        # An end at the row's own end is no border of its own.
        ends = plan.sources[source].dataset.document_ends(start, start + seq_len - 1)
        borders += [ends + (row * seq_len - start), np.array([(row + 1) * seq_len])]
    cu_seqlens = np.concatenate(borders)
    lengths = np.diff(cu_seqlens)
    positions = np.arange(rows * seq_len) - np.repeat(cu_seqlens[:-1], lengths)
    return (
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        torch.from_numpy(positions.reshape(rows, seq_len)),
        int(lengths.max()),
    )


class MixedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset over sample(g), g in [0, length); items hold `input_ids` and `labels`, int64 [seq_len]."""

    def __init__(self, plan: MixturePlan, length: int) -> None:
        self.plan = plan
        self._length = length
        self._reader = WindowReader(plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedDataset, (self.plan, self._length)  # a worker process maps the shards itself

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several items at once; `DataLoader` calls this with a whole batch."""
        for index in indices:
            if not -self._length <= index < self._length:
                raise IndexError(f"sample {index} of a dataset of {self._length:,}")
        buffer, _ = self._reader.read(np.array([index % self._length for index in indices], np.uint64))
        return [{"input_ids": window[:-1], "labels": window[1:]} for window in buffer]


class DatasetMixer:
    """A mixture file as a PyTorch dataset.

    >>> mixer = DatasetMixer.from_yaml("configs/data/pretrain/phase1/mixture1.yaml")  # doctest: +SKIP
    >>> dataset = mixer.build_dataset(max_seq_length=4096)  # doctest: +SKIP
    >>> DataLoader(dataset, batch_size=32)  # doctest: +SKIP
    """

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config

    @classmethod
    def from_yaml(cls, path: str | Path) -> DatasetMixer:
        """Read a mixture file; the datasets are opened later."""
        return cls(load_mixture(path))

    def validate_mixture(self, max_seq_length: int = 2048) -> dict[str, float]:
        """Open the sources and check that the mixture can be met; returns the realised share of every source.

        The shares are exact counts over `total_tokens`, or up to the first source's end where there is no total.

        Raises:
            UserError: a source cannot be used, or the weights and `max_epochs` cannot be met.
        """
        plan = MixturePlan.build(self.config, max_seq_length)
        total = plan.length()
        return {source.name: count / total for source, count in zip(plan.sources, plan.counts(total), strict=True)}

    def build_dataset(self, max_seq_length: int, split: str = "train", tokenizer: Any = None) -> MixedDataset:
        """Map-style dataset of windows; its length is total_tokens / L, or the first source's end without a total.

        Args:
            max_seq_length: tokens per window.
            split: "train", or "val" for the sources' validation parts.
            tokenizer: a `tokenizers.Tokenizer` or a fast `transformers` tokenizer that must be the datasets' own.

        Raises:
            UserError: see `MixturePlan.build`; another tokenizer.
        """
        plan = MixturePlan.build(self.config, max_seq_length, split=split)
        if tokenizer is not None:
            _check_tokenizer(plan, tokenizer)
        return MixedDataset(plan, plan.length())


def _check_tokenizer(plan: MixturePlan, tokenizer: Any) -> None:
    """Compare what decides the ids; how text is padded, cut or decoded does not matter here."""
    from tokenizers import Tokenizer

    def identity(text: str) -> list[Any]:
        parts = json.loads(text)
        return [parts.get(name) for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]

    given = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(given, Tokenizer):
        raise UserError(
            f"tokenizer: expected a tokenizers.Tokenizer or a fast tokenizer, found {type(tokenizer).__name__}"
        )
    dataset = plan.sources[0].dataset
    # Through the same library, so that only meaning is compared.
    own = Tokenizer.from_str(dataset.tokenizer_json().decode())
    if identity(given.to_str()) != identity(own.to_str()):
        raise UserError(
            f"mixture '{plan.config.name}': the tokenizer given ({given.get_vocab_size():,} ids) is not the one that "
            f"made {dataset.path} ({own.get_vocab_size():,} ids); use {dataset.path}/tokenizer.json, "
            "or tokenize the data again"
        )
