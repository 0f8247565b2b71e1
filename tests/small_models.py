"""Small models with weights large enough to matter, for all tests of models, caches and generation."""

from __future__ import annotations

from typing import Any

import torch
from family_runs import FAMILIES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from train.models import BaseModelForCausalLM, ModelRegistry

VOCAB = FAMILIES["llama"]["vocab_size"]
POSITIONS = FAMILIES["llama"]["max_position_embeddings"]


def build_model(fields: dict[str, Any], seed: int = 0, std: float = 0.1) -> BaseModelForCausalLM:
    """The model of a configuration, as constructed (in training mode), its weights, norms and all biases random.

    They are large enough to matter, and logits small enough (about 1) for an absolute tolerance of 1e-5.
    """
    config = ModelRegistry.parse_config(fields, "test")
    model = ModelRegistry.create_model(config.model_type, config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        spread = 0.5 if "mlp.gate.weight" in name else std
        tensor.data.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
    return model


def shard_alone(model: BaseModelForCausalLM) -> None:
    """FSDP over a process group of one: whole tensors, but in its hands."""
    precision = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = {parameter for experts in model.experts() for parameter in experts.gate.parameters()}
    for module in [*model.layers, model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=precision, ignored_params=whole)


def make_model(family: str = "llama", seed: int = 0, **fields: Any) -> BaseModelForCausalLM:
    """A family's tiny model in evaluation mode, its logits so far apart that no greedy choice is a tie.

    `fields` change its configuration.
    """
    return build_model({**FAMILIES[family], **fields}, seed, std=0.2).eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, length]."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
