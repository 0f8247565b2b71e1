"""The decoder that the families share, and what every model offers: loss, logits, generation, parameter count.

A family file states a configuration and its blocks; everything here is independent of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards.settings import Settings
from train.loss import IGNORE_INDEX, loss_and_gradient, summed_loss, token_losses
from train.models.attention import KeyValueCache, causal_mask, document_mask
from train.models.linear import RMSNorm
from train.models.rope import rotary_angles

# Keys of a Hugging Face config.json that say nothing about the architecture or that this code fixes.
INERT_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache"),
    *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
}


class BaseModelConfig(Settings):
    """What every family's model file holds; names are Hugging Face's, so a config.json is a valid model file."""

    model_type: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = 0.02
    tie_word_embeddings: bool = False
    use_flash_attention: bool = True
    gradient_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_inert_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("attention_dropout"):
            raise ValueError(f"attention_dropout {data['attention_dropout']} is not supported; set it to 0")
        return {key: value for key, value in data.items() if key not in INERT_KEYS}


@dataclass
class ModelOutput:
    """`loss` where labels were given, else `logits` [batch, length, vocab]."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class BaseModelForCausalLM(nn.Module):
    """Embedding, blocks, final norm and head; a family gives the blocks and the rotary frequencies.

    Parameters are created on the default device without values worth keeping: `initialize` fills them.
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("o_proj.weight", "down_proj.weight")

    def __init__(self, config: BaseModelConfig, layers: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype = torch.float32  # of the activations; parameters keep their own
        self._frequencies: dict[torch.device, Tensor] = {}
        self.loss_kernel: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_gradient

    def rotary_frequencies(self) -> Tensor:
        """Float32 [rotary_dim / 2], given by the family."""
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """Output embedding [vocab, hidden_size]; the input embedding where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        mask_documents: bool = False,
        cache: KeyValueCache | None = None,
        reduction: str = "mean",
    ) -> ModelOutput:
        """One pass over a batch.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: [batch, keys], 0 for padding (keys = cached tokens + length).
            labels: int64 [batch, length]; labels[t] is the target of input_ids[t], nothing is shifted; -100 is ignored.
            position_ids: int64 [batch, length]; counted from the cache's end if not given.
            mask_documents: attend within documents only, which begin where `position_ids` is 0.
            cache: keys and values of earlier tokens, extended in place.
            reduction: of the loss over the valid labels: "mean", "sum", or "none" for float32 [batch, length]
                without gradient.
        """
        batch, length = input_ids.shape
        past = cache.length if cache else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device).expand(batch, length)
        if input_ids.device not in self._frequencies:
            self._frequencies[input_ids.device] = self.rotary_frequencies().to(input_ids.device)
        cos, sin = rotary_angles(position_ids, self._frequencies[input_ids.device])
        mask = attention_bias(position_ids, attention_mask, mask_documents, past)

        x = self.embed_tokens(input_ids).to(self.compute_dtype)
        for index, layer in enumerate(self.layers):
            if self.config.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, index)
        x = self.norm(x)
        if labels is None:
            return ModelOutput(logits=F.linear(x, self.head.to(x.dtype)).float())
        flat_x, flat_labels = x.flatten(0, 1), labels.flatten()
        if reduction == "none":
            return ModelOutput(loss=token_losses(flat_x, self.head, flat_labels).view(batch, length))
        loss = summed_loss(flat_x, self.head, flat_labels, self.loss_kernel)
        return ModelOutput(loss=loss / (labels != IGNORE_INDEX).sum() if reduction == "mean" else loss)

    def initial_std(self, name: str) -> float:
        """Standard deviation of a weight matrix at the start.

        `initializer_range`, and for the matrices that write into the residual stream that over sqrt(2 layers), so that
        its variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
        """
        scaled = name.endswith(self.residual_outputs)
        return self.config.initializer_range * ((2 * self.config.num_hidden_layers) ** -0.5 if scaled else 1.0)

    def get_num_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continue prompts of one length by sampling, with a key/value cache.

        Args:
            input_ids: int64 [batch, length].
            max_length: tokens of prompt and continuation together, at most `max_position_embeddings`.
            temperature: 0 takes the likeliest token.
            top_k: sample among the k likeliest only.
            eos_token_id: a row that has produced it is filled up with it; all rows done ends generation.

        Returns:
            int64 [batch, <= max_length], the prompts included.
        """
        max_length = min(max_length, self.config.max_position_embeddings)
        generator = torch.Generator(input_ids.device).manual_seed(seed)
        cache = KeyValueCache()
        ids, new = input_ids, input_ids
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while ids.shape[1] < max_length and not done.all():
            logits = self(new, cache=cache).logits[:, -1]
            new = sample_token(logits, temperature, top_k, generator)
            if eos_token_id is not None:
                new = new.masked_fill(done[:, None], eos_token_id)
                done |= new[:, 0] == eos_token_id
            ids = torch.cat((ids, new), dim=1)
        return ids


def attention_bias(
    position_ids: Tensor, attention_mask: Tensor | None, mask_documents: bool, past: int
) -> Tensor | None:
    """Bool [batch or 1, 1, length, past + length], true where a query may look; None where plain causal is right."""
    length = position_ids.shape[1]
    if attention_mask is None and not mask_documents and (past == 0 or length == 1):
        return None
    mask = causal_mask(length, past + length, position_ids.device)
    if mask_documents:
        mask = mask & document_mask(position_ids)
    if attention_mask is not None:
        # A padding query keeps itself in sight: its output means nothing, but it must not be NaN.
        itself = torch.eye(length, past + length, dtype=torch.bool, device=mask.device).roll(past, dims=1)
        mask = mask & attention_mask.bool()[:, None, None, :] | itself
    return mask


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one token per row of logits [batch, vocab]: int64 [batch, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
