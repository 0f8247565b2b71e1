"""minigpt-plan: the arithmetic of a run against its own small examples, what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from family_runs import FAMILIES
from training_runs import ROOT

from shards.errors import UserError
from tools.plan_run import RunPlan, run_plan
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.hardware import GPUS
from train.layout import Layout
from train.models import ModelRegistry
from train.optim import create_optimizer

H100 = GPUS["h100"]
EXP001 = "configs/experiments/active/exp001_llama7b_pretrain.yaml"
CHINCHILLA = 20


def experiment(**changes: Any) -> ExperimentConfig:
    """Two sources of which only one has a size; 32 windows of 32 tokens a step on 4 ranks."""
    sources = [
        {"name": "code", "path": "absent/code", "weight": 3, "tokens": 32_000},
        {"name": "prose", "path": "absent/prose", "weight": 1},
    ]
    fields: dict[str, Any] = {
        "experiment": {"name": "planned"},
        "model": {"type": "llama", "config": FAMILIES["llama"]},
        "data": {"config": {"name": "two", "sources": sources}},
        "training": {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 100, **changes},
        "checkpointing": {"output_dir": "unused"},
        "parallel": {"strategy": "fsdp"},
    }
    return ExperimentConfig.model_validate(fields)


def plan(count: int = 4, price: float = 2.0, mfu: float = 0.5, **changes: Any) -> RunPlan:
    return run_plan(experiment(**changes), H100, count, price=price, mfu=mfu, disk=1e9)


def test_time_and_cost_follow_from_the_mfu():
    run = plan()
    assert run.flops == 6 * run.parameters + 3 * 2 * 32 * 2 * 32  # causal attention: layers, width, q k and v, length
    assert run.step_tokens == 4 * 2 * 4 * 32
    assert run.tokens == 100 * run.step_tokens
    # seconds * GPUs * peak * MFU = FLOPs of the run
    assert run.hours * 3600 * 4 * 989e12 * 0.5 == pytest.approx(run.flops * run.tokens)
    assert run.cost == pytest.approx(run.hours * 4 * 2.0)
    assert run.mfu_full > run.mfu


def test_more_gpus_take_less_time_for_the_same_money():
    few, many = (
        plan(4, gradient_accumulation_steps=8, world_size=4),
        plan(32, gradient_accumulation_steps=8, world_size=4),
    )
    assert few.tokens == many.tokens
    assert many.hours == pytest.approx(few.hours / 8)
    assert many.cost == pytest.approx(few.cost)


def test_epochs_are_those_of_the_run_and_unknown_without_a_size():
    run = plan()
    code, prose = run.sources
    windows = 100 * 32
    assert code.tokens + prose.tokens == windows * 32
    assert code.tokens == pytest.approx(0.75 * windows * 32, rel=0.02)
    assert code.epochs == pytest.approx(0.75 * windows / (32_000 // 32 - 1), rel=0.02)
    assert prose.epochs is None


@pytest.mark.parametrize("fields", [{}, {"optimizer": "muon"}, {"optimizer_state_dtype": "bf16"}])
def test_checkpoint_size_is_that_of_weights_and_state(fields):
    config = experiment(**fields)
    model = ModelRegistry.create_model("llama", ModelRegistry.parse_config(FAMILIES["llama"], "test"))
    optimizer = create_optimizer(model, config.training, Layout(Ranks(0, 1, torch.device("cpu"), None)))
    state = {k: v for k, v in optimizer.state_dict().items() if k in ("exp_avg", "exp_avg_sq", "momentum")}
    tensors = [*model.parameters(), *(tensor for part in state.values() for tensor in part.values())]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert plan(**fields).checkpoint_bytes == expected


def seven(steps: int, count: int = 64, price: float = 2.5, mfu: float = 0.45) -> RunPlan:
    """A llama of 7B, 4 M tokens a step."""
    fields = dict(vars(plan()))
    fields |= {"count": count, "price": price, "mfu": mfu, "parameters": 6_738_415_616, "flops": 42_900_000_000}
    return RunPlan(**{**fields, "step_tokens": 2**22, "steps": steps})


def test_what_the_verdict_proposes_meets_the_goal_and_no_more():
    run = seven(300_000)
    assert not run.met
    lines = run.verdict()
    steps = next(int(line.split("training.max_steps=")[1].split()[0]) for line in lines if "max_steps" in line)
    assert seven(steps).met
    assert not seven(steps + 1).met
    price = next(float(line.split("$")[1].split()[0]) for line in lines if "lower price" in line)
    assert seven(300_000, price=price - 0.01).cost <= 10_000 < seven(300_000, price=price + 0.01).cost
    gpus = next(int(line.split(": ")[1].split()[0]) for line in lines if "more GPUs" in line)
    assert seven(300_000, count=gpus).days <= 7 < seven(300_000, count=gpus - 1).days
    assert any("speed alone does not do" in line for line in lines)


def test_a_run_that_meets_the_goal_says_so():
    lines = seven(30_000).verdict()
    assert "met" in lines[0]
    assert "not met" not in lines[0]
    assert len(lines) == 2


def test_more_speed_is_proposed_where_it_can_be_reached():
    run = seven(40_000)
    line = next(line for line in run.verdict() if "more speed" in line)
    needed = float(line.split("MFU of ")[1].split("%")[0]) / 100
    assert seven(40_000, mfu=needed + 0.01).met
    assert not seven(40_000, mfu=needed - 0.01).met


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="cannot share evenly"):
        plan(3, world_size=4)


def test_the_shipped_run_on_64_gpus_meets_the_goal(monkeypatch):
    from train.config import load_experiment

    monkeypatch.chdir(ROOT)
    config = load_experiment(EXP001.replace(".yaml", "_64gpu.yaml"))
    run = run_plan(config, H100, 64, price=2.5, mfu=0.45, disk=2e9)
    assert run.met
    assert run.parameters == 6_738_415_616
    assert run.tokens > CHINCHILLA * run.parameters
    assert run.step_tokens == 2**22


def test_a_gpu_that_is_not_known_names_the_nearest():
    command = [sys.executable, "-m", "tools.plan", "--config", EXP001, "--gpu", "h10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown GPU 'h10'; did you mean 'h100'?")


def test_the_command_prints_a_plan_without_data_or_gpus(tmp_path):
    path = tmp_path / "planned.yaml"
    path.write_text(yaml.safe_dump(experiment(compile=False).model_dump(mode="json")))
    command = [sys.executable, "-m", "tools.plan", "--config", str(path), "--count", "4", "--gpu", "l4", "--json"]
    done = subprocess.run([*command, "training.batch_size=2"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["run"]["step_tokens"] == 2 * 2 * 4 * 32
    assert figures["memory"]["fits"]
    assert figures["memory"]["largest"]["full"] > figures["memory"]["largest"]["none"] > 1000
