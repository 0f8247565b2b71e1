"""The decoder that the families share, and what every model offers: loss, logits, generation, parameter counts.

A family file states a configuration and its blocks; everything here is independent of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.loss import IGNORE_INDEX, loss_and_gradient, summed_loss, token_losses
from train.models.attend import PACKED, Kernel, choose_kernel, warn_of_padding
from train.models.base_config import BaseModelConfig
from train.models.cache import KeyValueCache
from train.models.linear import RMSNorm, linear
from train.models.moe import MixtureOfExperts, Routing
from train.models.positions import Positions, cache_mask, causal_mask, document_borders, document_mask, padding_mask
from train.models.rope import inverse_frequencies, rotary_angles
from train.models.sequence import SequenceShare
from train.pieces import Cut
from train.recompute import Recompute, recomputed


@dataclass
class ModelOutput:
    """What a pass gives. Where ranks share a sequence, each rank's values are its part of a sum over them.

    Attributes:
        loss: cross-entropy, where labels were given.
        logits: float32 [batch, length or 1, vocab], where they were not.
        balance_loss: of the experts, weighted as it is to be added to the loss; None where there is none.
        expert_load: float32 [moe layers, experts], how many token slots each expert was given; None without experts.
        window_losses: float32 [batch], the sum of each window's losses, without gradient; None with reduction "none".
        hidden: [batch, length, hidden_size], what the next stage of a pipeline goes on with; None in the last.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_load: Tensor | None = None
    window_losses: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """What training minimises: the loss and, with experts, their balance loss."""
        assert self.loss is not None
        return self.loss if self.balance_loss is None else self.loss + self.balance_loss

    def detach(self) -> ModelOutput:
        """The same without graph."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return ModelOutput(**{name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()})


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp may be a mixture of experts."""

    def __init__(self, config: BaseModelConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp
        self.share: SequenceShare | None = None  # set where tensor parallelism cuts the block
        self.recompute: Recompute = "full" if config.gradient_checkpointing else "none"

    def forward(
        self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None, layer: int = 0
    ) -> tuple[Tensor, Routing | None]:
        """[batch, length, hidden] -> the same, and what the router did. `x` may be a share of the length."""
        if self.recompute == "none" or not self.training or cache is not None:
            return self.compute(x, positions, cache, layer)
        return recomputed(self.compute, self.recompute, x, positions)

    def compute(
        self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None, layer: int = 0
    ) -> tuple[Tensor, Routing | None]:
        """`forward` itself, whose activations may be kept for backward or not."""
        attended = self.self_attn(self._gather(self.input_layernorm(x)), positions, cache, layer)
        x = x + self._reduce(attended)
        inner = self._gather(self.post_attention_layernorm(x))
        if not isinstance(self.mlp, MixtureOfExperts):
            return x + self._reduce(self.mlp(inner)), None
        out, routing = self.mlp(inner, positions.valid)
        if self.share is not None:  # every rank of the group has seen all tokens
            routing = Routing(routing.load / self.share.size, routing.balance / self.share.size)
        return x + self._reduce(out), routing

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.share is None else self.share.gather(x)

    def _reduce(self, x: Tensor) -> Tensor:
        return x if self.share is None else self.share.reduce(x)


class BaseModelForCausalLM(nn.Module):
    """Embedding, blocks, final norm and head; a family gives the blocks.

    Parameters are created on the default device without values worth keeping: `parallel.initialize` fills them.

    `train.parallel` may leave a rank a part of the model: `cuts` says what tensor parallelism left of which parameter,
    and a stage of a pipeline has some of the layers only, an embedding if it is the first, norm and head if it is the
    last. `whole_shapes` are those of all parameters and buffers in any case.
    """

    # Matrices that write into the residual stream.
    residual_outputs: ClassVar[tuple[str, ...]] = ("o_proj.weight", "down_proj.weight", "experts.down_proj")

    def __init__(self, config: BaseModelConfig, layers: list[DecoderBlock]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: nn.ModuleList | nn.ModuleDict = nn.ModuleList(layers)
        self.norm: RMSNorm | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype = torch.float32  # of the activations; parameters keep their own
        self.loss_kernel: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_gradient
        self._frequencies: dict[torch.device, Tensor] = {}
        self.share: SequenceShare | None = None
        self.cuts: dict[str, Cut] = {}
        self.tied_across_stages = False  # the embedding of the first stage is the head of the last
        tensors = [*self.named_parameters(), *self.named_buffers()]
        self.whole_shapes = {name: tuple(tensor.shape) for name, tensor in tensors}

    def allocate(self, device: str | torch.device, dtype: torch.dtype) -> None:
        """Give a model on the meta device memory for its weights, without values; buffers stay float32.

        Parameters and activations get `dtype`: for use, not for training, whose parameters rest in float32.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        self.to_empty(device=device)
        self.compute_dtype = dtype

    def rotary_frequencies(self) -> Tensor:
        """Float32 [rotary_dim / 2]; a family that turns a part of each head only gives its own."""
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

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
        cu_seqlens: Tensor | None = None,
        mask_documents: bool = False,
        cache: KeyValueCache | None = None,
        logits_at: Tensor | None = None,
        reduction: str = "mean",
        hidden: Tensor | None = None,
    ) -> ModelOutput:
        """One pass over a batch.

        Args:
            input_ids: int64 [batch, length].
            attention_mask: [batch, length], 0 for padding; not together with a cache.
            labels: int64 [batch, length]; labels[t] is the target of input_ids[t], nothing is shifted; -100 is ignored.
            position_ids: int64 [batch, length]; 0, 1, … or, with a cache, on from its length if not given.
            cu_seqlens: int32 [pieces + 1], borders of the documents in the flattened batch, if they are known.
            mask_documents: attend within documents only, which begin where `position_ids` is 0.
            cache: keys and values of earlier tokens, extended in place.
            logits_at: int64 [batch], the one position of each row whose logits are wanted; None: all.
            reduction: of the loss over the valid labels: "mean", "sum", or "none" for float32 [batch, length]
                without gradient.
            hidden: what the stage before gave, in a later stage of a pipeline.
        """
        positions = self._positions(input_ids, attention_mask, position_ids, cu_seqlens, mask_documents, cache)
        x = self.embed_tokens(self._take(input_ids)).to(self.compute_dtype) if hidden is None else hidden
        routings: list[Routing] = []
        for name, layer in self.layers.named_children():
            x, routing = layer(x, positions, cache, int(name))
            if routing is not None:
                routings.append(routing)
        load = torch.stack([routing.load for routing in routings]) if routings else None
        balance = None if labels is None else self._balance_loss(routings, labels)
        if self.norm is None:
            return ModelOutput(hidden=x, balance_loss=balance, expert_load=load)
        if logits_at is not None:
            x = x[torch.arange(len(x), device=x.device), logits_at][:, None]
        x = self.norm(x)
        if labels is None:
            return ModelOutput(logits=linear(x, self.head).float(), expert_load=load)
        shape = x.shape[:2]
        flat_x, flat_labels = x.flatten(0, 1), self._take(labels).flatten()
        if reduction == "none":
            losses = token_losses(flat_x, self.head, flat_labels).view(shape)
            return ModelOutput(losses if self.share is None else self.share.place(losses), expert_load=load)
        loss, losses = summed_loss(flat_x, self.head, flat_labels, self.loss_kernel)
        if reduction == "mean":
            valid = (labels != IGNORE_INDEX).sum()
            loss, balance = loss / valid, None if balance is None else balance / valid
        return ModelOutput(loss, balance_loss=balance, expert_load=load, window_losses=losses.view(shape).sum(1))

    def _take(self, tokens: Tensor) -> Tensor:
        """This rank's part of [batch, length]."""
        return tokens if self.share is None else self.share.take(tokens)

    def attention_kernel(self, device: torch.device, *, documents: bool) -> Kernel:
        """The attention kernel for this model on `device`, with or without a document mask."""
        return choose_kernel(
            device,
            self.compute_dtype,
            *self.config.attention_head_dims,
            documents=documents,
            flash=self.config.use_flash_attention,
        )

    def _positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        mask_documents: bool,
        cache: KeyValueCache | None,
    ) -> Positions:
        (batch, length), device = input_ids.shape, input_ids.device
        kernel = self.attention_kernel(device, documents=mask_documents).name
        mask = None
        if cache is not None:
            assert attention_mask is None, "rows of a cache are not padded: give position_ids"
            assert not mask_documents, "a row of a cache is one document"
            if position_ids is not None:
                cache.length = int(position_ids.max()) + 1
                mask = cache_mask(position_ids, cache.length)
            else:
                past, cache.length = cache.length, cache.length + length
                position_ids = torch.arange(past, cache.length, device=device).expand(batch, length)
                if past and length > 1:
                    mask = cache_mask(position_ids[:1], cache.length)
        elif position_ids is None:
            position_ids = torch.arange(length, device=device).expand(batch, length)
        if attention_mask is not None:
            mask = padding_mask(attention_mask)
            warn_of_padding(kernel)
        if not mask_documents:
            cu_seqlens = None
        elif kernel in PACKED and mask is None:
            cu_seqlens = document_borders(position_ids) if cu_seqlens is None else cu_seqlens
        else:
            mask = document_mask(position_ids) & (causal_mask(length, length, device) if mask is None else mask)
        if device not in self._frequencies:
            self._frequencies[device] = self.rotary_frequencies().to(device)
        cos, sin = rotary_angles(position_ids, self._frequencies[device])
        if (scaling := self.config.rope_scaling) is not None and scaling.cos_sin_factor != 1.0:
            cos, sin = cos * scaling.cos_sin_factor, sin * scaling.cos_sin_factor
        return Positions(position_ids, cos, sin, mask, cu_seqlens, kernel, attention_mask)

    def _balance_loss(self, routings: list[Routing], labels: Tensor) -> Tensor | None:
        """Sum over layers and sequences, each sequence weighted by its valid labels as its cross-entropy is."""
        if not routings or not self.training or not self.config.balance_loss_weight:
            return None
        per_sequence = torch.stack([routing.balance for routing in routings]).sum(0)
        return self.config.balance_loss_weight * (per_sequence * (labels != IGNORE_INDEX).sum(1)).sum()

    def experts(self) -> list[MixtureOfExperts]:
        """The mixtures of experts, in the order of `expert_load`."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def update_router_biases(self, load: Tensor) -> None:
        """Once per step: let the correction biases follow `load` [moe layers, experts], summed over all ranks.

        Models that are balanced by a loss alone are left as they are.
        """
        if self.config.bias_update_rate:
            for experts, layer_load in zip(self.experts(), load, strict=True):
                experts.gate.update_correction_bias(layer_load, self.config.bias_update_rate)

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

    def get_num_active_params(self) -> int:
        """Parameters that work on one token: of the routed experts only those that it is sent to."""
        idle = 0
        for moe in self.experts():
            routed = sum(parameter.numel() for parameter in moe.experts.parameters())
            idle += routed - routed * moe.gate.top_k // moe.gate.num_experts
        return self.get_num_params() - idle

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
        """Continue prompts of one length; `train.generate` has the engine with everything else.

        Args:
            input_ids: int64 [batch, length].
            max_length: tokens of prompt and continuation together, at most `max_position_embeddings`.
            temperature: 0 takes the likeliest token.
            top_k: sample among the k likeliest only.
            eos_token_id: a row that has produced it is filled up with it; all rows done ends generation.

        Returns:
            int64 [batch, <= max_length], the prompts included.
        """
        from train.generate import generate_ids

        return generate_ids(
            self, input_ids, max_length, temperature=temperature, top_k=top_k, eos_token_id=eos_token_id, seed=seed
        )
