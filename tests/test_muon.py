"""Muon against singular value decompositions, torch.optim.Muon and itself on other layouts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from muon_runs import FAMILIES
from small_models import build_model
from torch import Tensor

from train.config import TrainingConfig
from train.distributed import Ranks
from train.layout import Layout
from train.models import BaseModelForCausalLM
from train.muon import COEFFICIENTS, Muon, orthogonalize
from train.optim import Optimizer, create_optimizer
from train.owners import Block, choose_owners, make_groups

ROOT = Path(__file__).parent.parent
ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))
FIELDS = {"batch_size": 1, "optimizer": "muon", "weight_decay": 0.3, "grad_clip": 0.0, "muon_momentum": 0.9}


def make(family: str, **fields: object) -> tuple[BaseModelForCausalLM, Optimizer]:
    model = build_model(FAMILIES[family])
    return model, create_optimizer(model, TrainingConfig.model_validate({**FIELDS, **fields}), ALONE)


def set_gradients(model: BaseModelForCausalLM, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def muon_of(optimizer: Optimizer) -> Muon:
    return next(rule for rule in optimizer._rules if isinstance(rule, Muon))


def logical_matrices(model: BaseModelForCausalLM, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Views of the matrices that Muon is for, cut apart by hand."""
    found: list[Tensor] = []
    for name, tensor in tensors.items():
        if not name.startswith("layers.") or tensor.ndim < 2 or "mlp.gate." in name:
            continue
        for matrix in tensor if tensor.ndim == 3 else [tensor]:
            if "qkv_proj" in name:
                size = model.config.head_dim
                key = model.config.num_key_value_heads * size
                query = model.config.num_attention_heads * size
                found += [matrix[:query], matrix[query : query + key], matrix[query + key :]]
            elif "gate_up_proj" in name:
                found += [matrix[: len(matrix) // 2], matrix[len(matrix) // 2 :]]
            else:
                found.append(matrix)
    return found


def by_svd(matrix: Tensor) -> Tensor:
    """The five iterations as what they are: polynomials of the singular values, in float64."""
    left, values, right = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(24, 24), (48, 20), (20, 48), (1, 9)])
def test_iterations_are_polynomials_of_the_singular_values(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([by_svd(matrix) for matrix in matrices]).float()
    torch.testing.assert_close(orthogonalize(matrices), expected, rtol=1e-3, atol=1e-4)
    assert orthogonalize(torch.zeros(2, *shape)).eq(0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_updates_every_logical_matrix_on_its_own(family):
    """Also the halves of gate and up and each expert, by a loop over the matrices."""
    model, optimizer = make(family)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = [matrix.clone() for matrix in logical_matrices(model, weights)]
    momentum = [torch.zeros_like(matrix) for matrix in expected]
    for step in range(3):
        gradients = {name: grad.double() for name, grad in set_gradients(model, step).items()}
        optimizer.step(0.01)
        for i, gradient in enumerate(logical_matrices(model, gradients)):
            momentum[i] = 0.9 * momentum[i] + 0.1 * gradient
            update = by_svd(0.9 * momentum[i] + 0.1 * gradient) * 0.2 * max(gradient.shape) ** 0.5
            expected[i] = expected[i] - 0.01 * (0.3 * expected[i] + update)
    found = logical_matrices(model, {name: p.detach().double() for name, p in model.named_parameters()})
    assert len(found) == {"llama": 14, "qwen3_moe": 32, "deepseek_v3": 40}[family]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_equals_pytorch_on_each_matrix_of_two_dimensions():
    """PyTorch's runs in bf16 everywhere, and so does ours here: the directions agree as far as bf16 does."""
    model, optimizer = make("llama")
    muon_of(optimizer).dtype = torch.bfloat16
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in logical_matrices(model, start)]
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for parameter, gradient in zip(theirs, logical_matrices(model, set_gradients(model, step)), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step(0.01)
        reference.step()
    ours = logical_matrices(model, dict(model.named_parameters()))
    for a, b, before in zip(ours, theirs, logical_matrices(model, start), strict=True):
        moved = (b - before).norm()
        assert moved > 0.01 * before.norm()
        assert (a - b).norm() < 0.02 * moved


def test_everything_but_the_matrices_of_the_blocks_is_adamws():
    model, optimizer = make("deepseek_v3")
    state = optimizer.state_dict()
    assert state["momentum"].keys() | state["exp_avg"].keys() == dict(model.named_parameters()).keys()
    assert not state["momentum"].keys() & state["exp_avg"].keys()
    adamw = {re.sub(r"layers\.\d\.", "", name) for name in state["exp_avg"]}
    norms = {f"self_attn.{part}_a_layernorm.weight" for part in ("q", "kv")}
    norms |= {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
    assert adamw == norms | {"embed_tokens.weight", "mlp.gate.weight"}


def tensors_of(model: BaseModelForCausalLM, optimizer: Optimizer) -> list[Tensor]:
    state = [part for key, part in optimizer.state_dict().items() if key != "guard"]
    return [*model.parameters(), *(tensor for part in state for tensor in part.values())]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_skipped_step_changes_nothing(bad, dtype):
    model, optimizer = make("qwen3_moe", optimizer_state_dtype=dtype)
    for step in range(65):
        set_gradients(model, step)
        assert optimizer.step(1e-3)[1] == 0
    before = [tensor.detach().clone() for tensor in tensors_of(model, optimizer)]
    set_gradients(model, 65)
    model.layers[1].mlp.experts.down_proj.grad[2, 3, 4] = bad
    assert optimizer.step(1e-3)[1] == 1
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(model, optimizer), before, strict=True))
    set_gradients(model, 66)
    assert optimizer.step(1e-3)[1] == 0
    after = tensors_of(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_goes_on_from_loaded_state_as_if_it_had_not_stopped(dtype):
    model, optimizer = make("deepseek_v3", optimizer_state_dtype=dtype)
    for step in range(4):
        set_gradients(model, step)
        optimizer.step(1e-2)
    other, resumed = make("deepseek_v3", optimizer_state_dtype=dtype)
    other.load_state_dict(model.state_dict())
    for key, part in resumed.state_dict().items():
        for name, tensor in part.items():
            tensor.copy_(optimizer.state_dict()[key][name])
    for step in range(4, 7):
        for one, its in ((model, optimizer), (other, resumed)):
            set_gradients(one, step)
            its.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(model, optimizer), tensors_of(other, resumed), strict=True))


BLOCKS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30)


@given(shapes=BLOCKS, size=st.integers(1, 8))
def test_owners_share_the_work(shapes, size):
    blocks = [Block(str(i), ((0, rows), (0, columns))) for i, (rows, columns) in enumerate(shapes)]
    loads = [0] * size
    for block, owner in zip(blocks, choose_owners(blocks, size), strict=True):
        loads[owner] += block.shape[0] * block.shape[1] * min(block.shape)
    assert sum(loads) == sum(block.cost for block in blocks)
    assert max(loads) <= sum(loads) / size + max(block.cost for block in blocks)


@given(shapes=BLOCKS, size=st.integers(1, 4), limit=st.integers(1, 3000))
def test_groups_stay_within_the_limit(shapes, size, limit):
    """Two blocks to a parameter, whose rows the ranks share unevenly."""
    blocks, tables = [], [{} for _ in range(size)]
    for name, (rows, columns) in enumerate(shapes):
        blocks += [Block(str(name), ((begin, begin + rows), (0, columns))) for begin in (0, rows)]
        tables[0][str(name)] = [((0, 2 * rows - 1), (0, columns))]
        for table in tables[1:]:
            table[str(name)] = [((2 * rows - 1, 2 * rows), (0, columns))]
    groups = make_groups(blocks, tables, limit)
    assert [block for group in groups for block in group] == blocks
    for group in groups:
        names = {block.name for block in group}
        assert len(group) == 2 * len(names)  # no parameter is in two groups
        held = sum((2 * shapes[int(name)][0] - 1) * shapes[int(name)][1] for name in names)
        assert held <= limit or len(names) == 1


def equal_one_rank(size: int, *runs: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "muon_runs.py"), *runs],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(runs), done.stdout


def test_two_ranks_equal_one():
    """FAMILY/OPTIMIZER/STRATEGY/dp_shard/tp/pp, each with a step that is skipped for a NaN of one rank."""
    equal_one_rank(
        2,
        "deepseek_v3/muon/fsdp/2/1/1",
        "qwen3_moe/muon/ddp/1/1/1",
        "qwen3_moe/muon/fsdp/1/2/1",
        "deepseek_v3/muon/ddp/1/2/1",
        "llama/muon/fsdp/1/1/2",
        "deepseek_v3/adamw/fsdp/1/2/1",
        "llama/adamw/fsdp/1/1/2",
    )


@pytest.mark.slow
def test_four_ranks_equal_one():
    equal_one_rank(
        4,
        "deepseek_v3/muon/fsdp/4/1/1",
        "qwen3_moe/muon/ddp/1/1/1",
        "qwen3_moe/muon/hsdp/2/1/1",
        "qwen3_moe/muon/fsdp/2/2/1",
        "deepseek_v3/muon/fsdp/2/2/1",
        "llama/muon/ddp/1/2/2",
        "llama/muon/fsdp/2/1/2",
        "llama/adamw/hsdp/2/1/1",
        "llama/adamw/fsdp/1/2/2",
        "deepseek_v3/adamw/fsdp/2/2/1",
    )
