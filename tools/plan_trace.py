"""A training step on tensors that have a shape but no memory, and the bytes that they would take.

It is the trainer's own model, cut, compiled and sharded by `train.parallel`, on one rank of a process group that has no
other ranks (PyTorch's "fake" backend). What is counted is what PyTorch
allocates, storage by storage, so that no formula of a plan has to follow the code. Compiled blocks are traced and
divided into forward and backward as always, which decides what is kept between the two, but run operator by operator.

The fake tensors are said to be the CPU's: autograd needs a device that PyTorch is built for. Attention runs as the
fused kernel of the GPU keeps it: query, key, value, output and one float32 per query.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.adamw import AdamW
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.layout import Layout, make_layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.models.attend import Kernel
from train.muon import is_matrix_of_block
from train.optim import create_optimizer
from train.parallel import delay_reduction, parallelize, reduce_gradients
from train.prepare import load_model_config


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a rank, part by part; their sum is the peak of a step.

    Attributes:
        weights: parameters and buffers at rest.
        optimizer: its state.
        gradients: of earlier micro-batches, while another runs.
        gathered: embedding, norm and head, which FSDP keeps whole during a micro-batch.
        activations: kept between forward and backward, of all micro-batches that are under way.
        working: what comes and goes on top of that at the peak: a block's weights and gradients, its activations that
            are computed again, logits.
    """

    weights: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    working: int

    @property
    def peak(self) -> int:
        """All parts."""
        return self.weights + self.optimizer + self.gradients + self.gathered + self.activations + self.working


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make while it is active, until they are freed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code stays compiled under this mode."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value._local_tensor if isinstance(value, DTensor) else value)
        return result

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized  # type: ignore[method-assign]  # how FSDP frees
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._drop, storage._cdata)
            self._set(storage)

    def _set(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes() - self._sizes[storage._cdata]
        self._sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @property
    def _resized(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage)

        return resize


@contextlib.contextmanager
def one_of(world_size: int, rank: int = 0) -> Iterator[Ranks]:
    """A rank among `world_size`, of which there is no other: what they would send is never written."""
    device = torch.device("cpu")
    if world_size == 1:
        yield Ranks(0, 1, device, None)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Ranks(rank, world_size, device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def step_memory(
    config: ExperimentConfig, ranks: Ranks, length: int, accumulation: int, kernel: str = "flash"
) -> StepMemory:
    """Memory of a training step of an experiment on one of `ranks`.

    Args:
        config: its `training.batch_size`, `activation_checkpointing` and `parallel` count.
        ranks: as `one_of` gives them.
        length: tokens of a window.
        accumulation: micro-batches of the step.
        kernel: of attention, a name of `train.models.attend`.
    """
    layout = make_layout(config, ranks)
    make_groups(layout)
    model_config = load_model_config(config)
    with torch.device("meta"):
        model = ModelRegistry.create_model(model_config.model_type, model_config)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        parallelize(model, config, layout, fill=False)
        _trace_compiled(model)
        model.attention_kernel = lambda *_, **__: Kernel(kernel, "planned")  # type: ignore[method-assign]
        weights = live.now
        optimizer = _optimizer(model, config, layout)  # kept until the step is done; its update works in place
        outside = [
            p for name, p in model.named_parameters() if isinstance(p, DTensor) and not name.startswith("layers.")
        ]
        gathered = sum(parameter.numel() for parameter in outside) * model.compute_dtype.itemsize
        at_rest = live.peak = live.now
        forward = _ForwardPasses(model, live)
        model.train()
        count = min(accumulation, 2)  # those that would follow are like the second
        for number in range(1, count + 1):
            delay_reduction(model, number < count)
            run_pass(model, layout, config.training.batch_size, length)
        reduce_gradients(model, layout)
    del optimizer
    torch._dynamo.reset()  # what it has compiled is for tensors of this mode
    gradients = forward.begins[-1] - forward.begins[0]
    activations = forward.ends[0] - forward.begins[0] - gathered
    working = live.peak - at_rest - gradients - gathered - activations
    under_way = min(accumulation, layout.pp - layout.stage)  # 1F1B: one micro-batch in each stage from here on
    return StepMemory(weights, at_rest - weights, gradients, gathered, activations * under_way, working)


class _ForwardPasses:
    """Bytes in use at the beginning and at the end of each forward pass."""

    def __init__(self, model: nn.Module, live: LiveBytes) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        model.register_forward_pre_hook(lambda *_: self.begins.append(live.now), prepend=True)  # before FSDP's
        model.register_forward_hook(lambda *_: self.ends.append(live.now))


def _optimizer(model: BaseModelForCausalLM, config: ExperimentConfig, layout: Layout) -> object:
    """The optimiser, or with Muon its state: its ranks tell each other what they have, and here are no others."""
    if config.training.optimizer == "adamw":
        return create_optimizer(model, config.training, layout)
    dtype = torch.bfloat16 if config.training.optimizer_state_dtype == "bf16" else torch.float32
    matrices = {name: p for name, p in model.named_parameters() if is_matrix_of_block(name, p)}
    others = {name: p for name, p in model.named_parameters() if name not in matrices}
    momentum = [torch.zeros_like(parameter, dtype=dtype) for parameter in matrices.values()]
    return momentum, AdamW(others, config.training)


def make_groups(layout: Layout) -> None:
    """All process groups of a layout: they cannot be made of fake tensors."""
    if layout.ranks.world_size > 1:
        for mesh in (layout.mesh, layout.token_mesh, layout.stage_mesh):
            mesh.get_all_groups()
        for mesh in (layout.mesh, layout.token_mesh):
            mesh["dp_replicate", "dp_shard"].get_all_groups()
        _ = layout.tied_group


def _trace_compiled(model: BaseModelForCausalLM) -> None:
    """Have what was compiled traced and divided into forward and backward, but not turned into machine code."""
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    for module in compiled:
        module.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    if compiled:
        model.loss_kernel = _fused_loss


def _fused_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled loss kernel leaves: no copy of the logits but their gradient."""
    return logits.new_zeros(len(labels), dtype=torch.float32), torch.empty_like(logits)


def run_pass(model: BaseModelForCausalLM, layout: Layout, batch_size: int, length: int) -> None:
    """Forward and backward of a micro-batch, in a pipeline those of this stage."""
    tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    hidden = None
    if layout.stage > 0:
        shape = batch_size, length // layout.tp, model.config.hidden_size
        hidden = torch.zeros(shape, dtype=model.compute_dtype, requires_grad=True)
    output = model(tokens, labels=tokens, reduction="sum", hidden=hidden)
    if output.hidden is None:
        output.objective.backward()
    else:
        output.hidden.backward(torch.zeros_like(output.hidden))
