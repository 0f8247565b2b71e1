"""Every layout trains as one rank does: equal losses, equal gradients of the first step, equal validation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_runs import FAMILIES
from layout_runs import VARIANTS, experiment, train
from training_runs import ROOT

from shards.errors import UserError
from train.distributed import Ranks
from train.layout import Layout, make_layout
from train.models import ModelRegistry
from train.pipeline import stage_layers
from train.tensor_parallel import cut_matrices

ALONE = Ranks(0, 1, torch.device("cpu"), None)
TWO = {  # strategy:dp_replicate:dp_shard:tp:pp
    "ddp": "ddp:2:1:1:1",
    "fsdp": "fsdp:1:2:1:1",
    "tp": "fsdp:1:1:2:1",
    "pp": "ddp:1:1:1:2",
}
FOUR = {
    "hsdp": "hsdp:2:2:1:1",
    "tp+fsdp": "fsdp:1:2:2:1",
    "tp+ddp": "ddp:2:1:2:1",
    "pp+fsdp": "fsdp:1:2:1:2",
    "pp+tp": "ddp:1:1:2:2",
}
EIGHT = {"hsdp+tp": "hsdp:2:2:2:1", "pp+fsdp+tp": "fsdp:1:2:2:2"}
FAST, STEPS = ["llama with biases", "deepseek_v3"], 12
STEPS_SLOW = 30


def run_layouts(
    folder: Path, ranks: int, layouts: dict[str, str], families: list[str], options: str = "", steps: int = STEPS_SLOW
) -> dict:
    """What each (family, layout) gave, all of one start of `ranks` processes."""
    names = {
        f"run{number}": (family, layout)
        for number, (family, layout) in enumerate((f, name) for f in families for name in layouts)
    }
    arguments = [f"{name}={family}:{layouts[layout]}:{options}" for name, (family, layout) in names.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "layout_runs.py"), str(folder), str(steps), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        key: SimpleNamespace(**torch.load(folder / f"{name}.pt", weights_only=False)) for name, key in names.items()
    }


@pytest.fixture(scope="module")
def alone():
    """What one rank gives, by family."""
    torch.set_num_threads(1)
    found: dict[tuple[str, int], SimpleNamespace] = {}

    def get(family: str, steps: int) -> SimpleNamespace:
        if (family, steps) not in found:
            found[family, steps] = train(experiment(family, strategy="ddp"), ALONE, steps)
        return found[family, steps]

    return get


def check(found: dict, alone) -> None:
    """Compare with one rank."""
    for (family, layout), run in found.items():
        one = alone(family, len(run.losses))
        assert run.losses == pytest.approx(one.losses, rel=1e-5), (family, layout)
        assert run.norms == pytest.approx(one.norms, rel=1e-4), (family, layout)
        assert run.validation == pytest.approx(one.validation, rel=1e-5), (family, layout)
        gradients = {name: values for name, _, _, values in one.gradients}
        assert run.gradients.keys() == gradients.keys(), (family, layout)
        for name, gradient in gradients.items():
            error = (run.gradients[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, (family, layout, name, error)
        assert one.losses[-1] < one.losses[0] - 0.001 * len(run.losses)  # or equal losses say little


def test_layouts_of_two_ranks(tmp_path, alone):
    check(run_layouts(tmp_path, 2, TWO, FAST, steps=STEPS), alone)


def test_layouts_of_four_ranks(tmp_path, alone):
    check(run_layouts(tmp_path, 4, FOUR, ["deepseek_v3"], steps=STEPS), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO), (4, FOUR), (8, EIGHT)])
def test_every_family_in_every_layout(tmp_path, alone, ranks, layouts):
    check(run_layouts(tmp_path, ranks, layouts, list(VARIANTS)), alone)


@pytest.mark.slow
def test_three_stages_with_a_tied_embedding(tmp_path, alone):
    check(run_layouts(tmp_path, 3, {"pp": "ddp:1:1:1:3"}, ["llama with biases"]), alone)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["compile", "full", "selective", "compile+selective"])
def test_compiled_and_recomputed_blocks(tmp_path, alone, options):
    layouts = {name: {**TWO, **FOUR}[name] for name in ("tp+fsdp", "pp+fsdp")}
    check(run_layouts(tmp_path, 4, layouts, FAST, options), alone)


def sizes(strategy: str, world: int, **parallel: int) -> tuple[int, int, int, int]:
    """dp_replicate, dp_shard, tp and pp that `world` ranks get."""
    ranks = Ranks(0, world, torch.device("cpu"), None)
    layout = make_layout(experiment("llama", strategy=strategy, **parallel), ranks)
    return layout.dp_replicate, layout.dp_shard, layout.tp, layout.pp


def test_sizes_that_are_not_given_follow():
    assert sizes("ddp", 8) == (8, 1, 1, 1)
    assert sizes("fsdp", 8, tp=2) == (1, 4, 2, 1)
    assert sizes("hsdp", 16, dp_shard=4, pp=2) == (2, 4, 1, 2)
    assert sizes("hsdp", 16, dp_replicate=8) == (8, 2, 1, 1)


@pytest.mark.parametrize(
    ("strategy", "world", "parallel", "message"),
    [
        ("fsdp", 6, {"tp": 4}, r"tp 4 x pp 1 needs a multiple of 4 ranks, but 6 are here: start 8"),
        ("ddp", 4, {"dp_shard": 2}, r"dp_shard is 1, not 2; use fsdp"),
        ("fsdp", 4, {"dp_replicate": 2}, r"dp_replicate is 1, not 2; use hsdp"),
        ("hsdp", 4, {}, r"hsdp needs dp_shard"),
        ("hsdp", 6, {"dp_shard": 4}, r"4 ranks, but 6 are here; .* can be 6 x 1 or 3 x 2 or 2 x 3 or 1 x 6"),
        ("fsdp", 8, {"dp_shard": 4}, r"dp_shard 4 x tp 1 x pp 1 = 4 ranks, but 8 are here; .* can be 1 x 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(strategy, world, parallel, message):
    with pytest.raises(UserError, match=message):
        sizes(strategy, world, **parallel)


@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (7, 3), (32, 5)])
def test_stages_share_the_layers(layers, stages):
    found = [stage_layers(layers, stages, stage) for stage in range(stages)]
    assert [layer for stage in found for layer in stage] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("tp", [3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_too_large_for_the_heads_is_refused(family, tp, monkeypatch):
    with torch.device("meta"):
        model = ModelRegistry.create_model(
            FAMILIES[family]["model_type"], ModelRegistry.parse_config(FAMILIES[family], "test")
        )
    layout = Layout(ALONE, "fsdp", tp=tp)
    layout.__dict__["mesh"] = SimpleNamespace(get_group=lambda _: SimpleNamespace(group_name="none"))
    with pytest.raises(UserError, match=rf"parallel.tp {tp} does not divide the .*; .* would"):
        cut_matrices(model, layout)
