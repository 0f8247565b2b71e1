"""The plan of a run: memory part by part, time and cost by plain arithmetic, and what does not fit."""

from __future__ import annotations

import json

import pytest
import yaml
from family_runs import FAMILIES
from training_runs import write_experiment
from typer.testing import CliRunner

from tools import plan as plan_module
from train.config import load_experiment
from train.hardware import find_gpu
from train.models import ModelRegistry


@pytest.fixture
def config(tmp_path):
    """An experiment on data that is not there: its sizes are those of the mixture file."""
    sources = [{"name": name, "path": f"nowhere/{name}", "weight": 1.0, "tokens": 10_000_000} for name in ("a", "b")]
    path = write_experiment(
        tmp_path,
        {"name": "two", "seed": 1, "sources": sources},
        model={"type": None},
        training={"max_steps": 100, "mixed_precision": "bf16", "warmup_steps": 1},
        parallel={"strategy": "fsdp"},
    )
    fields = {**FAMILIES["llama"], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**fields, "max_position_embeddings": 512}))
    return path


def whole(config) -> int:
    """Parameters of the experiment's model."""
    with_path = load_experiment(config).model.config_path
    return ModelRegistry.create_from_yaml(with_path).get_num_params()


@pytest.mark.parametrize(("ranks", "copies"), [(1, 1), (4, 4)])
def test_weights_and_state_are_counted_as_they_are_kept(config, ranks, copies):
    """float32 weights and two float32 moments, on each rank its share."""
    from tools.plan_memory import memory_plan

    step = memory_plan(load_experiment(config), ranks).step
    assert step.weights == pytest.approx(4 * whole(config) / copies, rel=0.01)
    assert step.optimizer == pytest.approx(8 * whole(config) / copies, rel=0.01)


def test_recomputation_keeps_less(config):
    from tools.plan_memory import memory_plan

    activations = memory_plan(load_experiment(config), 1, find_gpu("h100")).activations
    assert activations["full"] < activations["selective"] < activations["none"]


def test_time_and_cost_follow_from_the_mfu(config):
    from tools.plan_run import run_plan

    run = run_plan(load_experiment(config), find_gpu("h100"), 4, price=3.0, mfu=0.4, disk=2e9)
    tokens = 100 * 4 * 2 * 4 * 512  # steps, windows, micro-batches, ranks, length
    seconds = tokens * run.flops / (4 * 989e12 * 0.4)
    assert run.parameters == run.active_parameters == whole(config)
    assert run.tokens == tokens
    assert run.flops == 6 * whole(config) + 3 * 4 * 256 * 2 * 512  # and causal attention: layers, width, q k and v
    assert run.hours == pytest.approx(seconds / 3600)
    assert run.cost == pytest.approx(4 * seconds / 3600 * 3.0)
    assert {source.name: source.epochs for source in run.sources} == {
        name: pytest.approx(tokens / 2 / 10_000_000, rel=0.05) for name in ("a", "b")
    }


def test_the_command_prints_json(config):
    result = CliRunner().invoke(plan_module.app, ["--config", str(config), "--count", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert str(whole(config)) in json.dumps(json.loads(result.output))


def test_a_gpu_that_is_not_known_is_one_line(config):
    result = CliRunner().invoke(plan_module.app, ["--config", str(config), "--gpu", "h10"])
    assert result.exit_code != 0
    assert "h100" in str(result.exception)
