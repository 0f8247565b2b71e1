"""Validation: mean loss in nats per token, and bits per byte, which do not depend on the tokenizer.

bits per byte = (sum of the losses in nats / ln 2) / (UTF-8 bytes of the target tokens); control tokens count 0 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.mixture import MixturePlan
from shards.reader import TokenDataset
from train.config import EvaluationSection
from train.layout import Layout
from train.loss import IGNORE_INDEX
from train.models.positions import document_borders
from train.passes import Passes


@dataclass(frozen=True)
class ValidationSet:
    """A dataset and the first tokens of the windows that are evaluated."""

    name: str
    dataset: TokenDataset
    starts: np.ndarray


class Validation:
    """All validation sets of a run, their windows shared among the data ranks."""

    def __init__(
        self, config: EvaluationSection, plan: MixturePlan, batch_size: int, document_mask: bool, layout: Layout
    ) -> None:
        """Open the configured datasets, or the `val/` part of every source that has one.

        Raises:
            UserError: a configured dataset cannot be read or has another tokenizer.
        """
        if config.datasets:
            paths = {dataset.name: Path(dataset.path) for dataset in config.datasets}
        else:
            folders = {source.name: source.dataset.path / "val" for source in plan.sources}
            paths = {name: folder for name, folder in folders.items() if (folder / "dataset.json").exists()}
        self.sets = [_open_set(name, path, plan, config.max_tokens) for name, path in paths.items()]
        self._seq_len, self._batch_size, self._document_mask = plan.seq_len, batch_size, document_mask
        self._metrics, self._layout = config.metrics, layout
        self._device = layout.ranks.device
        if self.sets:
            sizes = token_bytes(self.sets[0].dataset.tokenizer_json(), plan.vocab_size)
            self._token_bytes = torch.from_numpy(sizes).to(self._device)

    @torch.no_grad()
    def run(self, passes: Passes) -> dict[str, Any]:
        """Evaluate on all ranks: `val_loss` and what else is asked for, overall, and the same per set under `val`."""
        sums = torch.zeros(len(self.sets), 3, dtype=torch.float64, device=self._device)
        passes.model.eval()
        for row, validation_set in zip(sums, self.sets, strict=True):
            for windows, positions in self._batches(validation_set):
                row += self._sum_batch(passes, windows, positions)
        passes.model.train()
        self._layout.ranks.sum_(sums)
        per_set = {
            validation_set.name: self._summarise(row)
            for validation_set, row in zip(self.sets, sums.tolist(), strict=True)
        }
        overall = self._summarise(sums.sum(0).tolist())
        return {**{f"val_{name}": value for name, value in overall.items()}, "val": per_set}

    def _batches(self, validation_set: ValidationSet) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's windows, as many on every rank.

        Yields:
            tokens int64 [batch, seq_len + 1], -1 where there is none, and position ids int64 [batch, seq_len], which
            restart with each document under a document mask.
        """
        starts, size, length = validation_set.starts, self._batch_size, self._seq_len
        per_rank = math.ceil(len(starts) / (size * self._layout.data_size)) * size
        mine = starts[self._layout.data_rank * per_rank :][:per_rank]
        dataset = validation_set.dataset
        for first in range(0, per_rank, size):
            windows = np.full((size, length + 1), -1, np.int64)
            positions = np.tile(np.arange(length), (size, 1))
            for row, start in enumerate(mine[first : first + size].tolist()):
                stop = min(start + length + 1, dataset.tokens)
                windows[row, : stop - start] = dataset.read(start, stop)
                if self._document_mask and stop - start > 1:
                    ends = dataset.document_ends(start, min(stop, start + length) - 1) - start
                    begins = np.zeros(length, np.int64)
                    begins[ends] = ends
                    positions[row] -= np.maximum.accumulate(begins)
            yield torch.from_numpy(windows), torch.from_numpy(positions)

    def _sum_batch(self, passes: Passes, windows: Tensor, positions: Tensor) -> Tensor:
        """This rank's part of the sum of losses, tokens and bytes of the targets: float64 [3].

        `windows` and `positions` are on the host.
        """
        device = self._device
        borders = document_borders(positions).to(device) if self._document_mask else None
        windows, positions = windows.to(device), positions.to(device)
        labels = windows[:, 1:]
        valid = labels >= 0
        losses = passes.token_losses(
            input_ids=windows[:, :-1].clamp_min(0),
            labels=labels.masked_fill(~valid, IGNORE_INDEX),
            position_ids=positions,
            cu_seqlens=borders,
            mask_documents=self._document_mask,
        )
        nats = torch.zeros((), dtype=torch.float64, device=device) if losses is None else losses.double().sum()
        sizes = self._token_bytes[labels.clamp_min(0)] * valid
        counts = torch.stack([valid.sum().double(), sizes.sum().double()])
        return torch.cat([nats[None], counts * self._layout.counts])

    def _summarise(self, sums: list[float]) -> dict[str, float]:
        nats, tokens, size = sums
        loss = nats / tokens
        bpb = nats / math.log(2) / size if size else math.nan  # nothing but control tokens
        values = {"loss": loss, "bpb": bpb, "perplexity": math.exp(min(loss, 700.0))}
        return {name: values[name] for name in ("loss", "bpb", "perplexity") if name in self._metrics}


def _open_set(name: str, path: Path, plan: MixturePlan, max_tokens: int) -> ValidationSet:
    try:
        dataset = TokenDataset(path)
    except UserError as error:
        raise UserError(f"evaluation, validation set '{name}': {error}") from None
    if dataset.manifest.tokenizer_hash != plan.tokenizer_hash:
        raise UserError(f"validation set '{name}' ({path}) was made with another tokenizer than the training data")
    if dataset.tokens < 2:
        raise UserError(f"validation set '{name}' ({path}) has {dataset.tokens} token(s); at least 2 are needed")
    starts = np.arange(0, dataset.tokens - 1, plan.seq_len)
    wanted = max(1, max_tokens // plan.seq_len)
    if len(starts) > wanted:  # evenly spread
        starts = starts[np.arange(wanted) * len(starts) // wanted]
    return ValidationSet(name, dataset, starts)


def token_bytes(tokenizer_json: bytes, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes that each token id stands for, int64 [vocab_size]; control tokens and unused ids stand for 0.

    Byte-level vocabularies write each byte as one character; in the others `▁` is a space and `<0x0A>` one byte.
    """
    tokenizer = json.loads(tokenizer_json)
    byte_level = '"ByteLevel"' in json.dumps(
        [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")], separators=(",", ":")
    )
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pairs of token and score, by id
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    sizes = np.zeros(vocab_size, np.int64)
    for token, index in vocab.items():
        if byte_level:
            sizes[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("▁", " ").encode())
    for added in tokenizer.get("added_tokens", []):
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return sizes
