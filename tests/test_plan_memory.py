"""The planned memory of a step against what real tensors take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from family_runs import FAMILIES
from torch import Tensor
from training_runs import ROOT

from tools.plan_memory import GIB, memory_plan, overhead
from tools.plan_trace import LiveBytes, StepMemory, one_of, step_memory
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.hardware import Gpu
from train.layout import Layout
from train.models import BaseModelForCausalLM, ModelRegistry
from train.optim import create_optimizer
from train.parallel import parallelize

LENGTH = 32


def experiment(
    family: str = "llama", mode: str = "none", parallel: dict[str, Any] | None = None, **training: Any
) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "experiment": {"name": "planned"},
            "model": {"config": FAMILIES[family]},
            "data": {"config_path": "unused"},
            "training": {"batch_size": 8, "compile": False, "activation_checkpointing": mode, **training},
            "checkpointing": {"output_dir": "unused"},
            "parallel": parallel,
        }
    )


def planned(config: ExperimentConfig, world_size: int = 1, accumulation: int = 1, rank: int = 0) -> StepMemory:
    with one_of(world_size, rank) as ranks:
        return step_memory(config, ranks, LENGTH, accumulation, kernel="sdpa")


def real_model(config: ExperimentConfig) -> tuple[BaseModelForCausalLM, Layout]:
    layout = Layout(Ranks(0, 1, torch.device("cpu"), None))
    fields = ModelRegistry.parse_config(config.model.config or {}, "test")
    with torch.device("meta"):
        model = ModelRegistry.create_model(fields.model_type, fields)
    parallelize(model, config, layout)
    return model.train(), layout


def forward(model: BaseModelForCausalLM) -> Tensor:
    ids = torch.randint(400, (8, LENGTH))
    return model(ids, labels=ids.clone(), reduction="sum").objective


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_what_was_planned(family, mode, precision):
    config = experiment(family, mode, mixed_precision=precision)
    plan = planned(config)
    with LiveBytes() as live:
        model, layout = real_model(config)
        optimizer = create_optimizer(model, config.training, layout)
        live.peak = live.now
        loss = forward(model)
        loss.backward()
    assert live.peak == pytest.approx(plan.peak, rel=0.01)
    del optimizer


def test_activations_are_what_autograd_keeps():
    """Unique storages handed to backward, without the weights: counted by autograd's own hooks."""
    config = experiment(mixed_precision="fp32")
    model, _ = real_model(config)
    known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in known else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(model)
    assert planned(config).activations == pytest.approx(sum(kept.values()), rel=0.02)
    del loss


def test_checkpointing_saves_activations():
    none, selective, full = (planned(experiment(mode=mode)).activations for mode in ("none", "selective", "full"))
    assert full < 0.5 * selective < 0.5 * 0.9 * none


def test_fsdp_shares_weights_and_state_but_keeps_whole_gradients_of_earlier_micro_batches():
    fsdp = {"strategy": "fsdp"}
    model, _ = real_model(experiment())
    slices = sum(4 * ceil(p.shape[0] / 8) * p[0].numel() for p in model.parameters())
    plan = planned(experiment(parallel=fsdp), world_size=8)
    assert plan.weights == pytest.approx(slices, rel=0.01)  # and a few bytes of empty tensors
    assert plan.optimizer == pytest.approx(2 * slices, rel=0.05)
    assert plan.gradients == 0
    later = planned(experiment(parallel=fsdp), world_size=8, accumulation=3)
    assert later.gradients == pytest.approx(4 * model.get_num_params(), rel=0.01)
    assert planned(experiment(), world_size=8).weights == 4 * model.get_num_params()  # ddp


def test_tensor_parallelism_divides_activations():
    one = planned(experiment(parallel={"strategy": "fsdp"}), world_size=2)
    two = planned(experiment(parallel={"strategy": "fsdp", "tp": 2}), world_size=4)
    assert 0.4 * one.activations < two.activations < 0.75 * one.activations


def test_the_first_stage_of_a_pipeline_keeps_a_micro_batch_for_each_stage():
    config = experiment(parallel={"strategy": "ddp", "pp": 2})
    first, last = (planned(config, world_size=2, accumulation=4, rank=rank) for rank in (0, 1))
    once = planned(config, world_size=2, accumulation=1)
    assert first.activations == 2 * once.activations
    assert last.weights != 0
    assert last.activations < first.activations  # with the head, but of one micro-batch


def test_muon_keeps_one_moment_of_matrices():
    adamw, muon = (planned(experiment(optimizer=name)).optimizer for name in ("adamw", "muon"))
    assert 0.5 * adamw < muon < 0.9 * adamw


@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_largest_micro_batch_fits_and_hardly_more(mode):
    gpu = Gpu((), 100.0, 1.7)
    config = experiment(mode=mode, parallel={"strategy": "fsdp"})
    largest = memory_plan(with_length(config), 2, gpu).largest[mode]

    def total(batch_size: int) -> int:
        changed = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": batch_size})})
        with one_of(2) as ranks:
            return step_memory(changed, ranks, LENGTH, 1).peak + overhead(gpu)

    assert total(largest) <= gpu.bytes < total(int(1.05 * largest))


def with_length(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"max_seq_length": LENGTH})})


def test_what_does_not_fit_gets_what_would():
    fitting = memory_plan(with_length(experiment()), 1, Gpu((), 100.0, 1.7))
    assert fitting.advice() is None
    large = replace(fitting, step=replace(fitting.step, working=2 * GIB))
    assert f"at most {large.largest['full']} with activation_checkpointing full" in str(large.advice())
    without = replace(large, largest=dict.fromkeys(large.largest, 0))
    assert "a single window" in str(without.advice())
    waiting = replace(without, step=replace(fitting.step, gradients=2 * GIB))
    assert "gradient_accumulation_steps=1" in str(waiting.advice())


def test_parts_add_up_to_the_peak():
    memory = StepMemory(1, 2, 4, 8, 16, 32)
    assert memory.peak == 63
    assert replace(memory, working=0).peak == 31


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_peak_of_a_process_is_within_ten_percent(mode):
    """Compiled, 26 M parameters: the resident set of a process that maps each tensor by itself."""
    from tools.bench.plan_memory import MAPPED, experiment

    model, batch_size, length = "configs/model/minimind/26m.yaml", 4, 256
    command = [sys.executable, "-m", "tools.bench", "plan-memory", "--mode", mode, "--measure", model]
    done = subprocess.run(
        [*command, str(batch_size), str(length)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, MAPPED: "65536"},
    )
    with one_of(1) as ranks:
        plan = step_memory(experiment(str(ROOT / model), batch_size, "fp32", mode, True), ranks, length, 1, "sdpa")
    assert plan.peak == pytest.approx(json.loads(done.stdout), rel=0.1)
