"""Checkpoints of any layout: hashed, loaded and exported like whole ones, and written by two ranks together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint_ranks import Moments, state
from simulated_ranks import Grid, as_rank, fused_cut, held, write_together
from small_models import make_model
from test_export import write_run
from training_runs import ROOT, checkpoint_tensors, step_folder

from tools.hub_export import export_pretrained
from train.checkpoint import Checkpoints, load_weights, stored_tensors, weights_sha256
from train.config import CheckpointingSection
from train.distributed import Ranks
from train.layout import Layout
from train.models.hf import load_pretrained
from train.pieces import StoredTensor
from train.run_state import RunState

ALONE = Layout(Ranks(0, 1, torch.device("cpu"), None))


def cut_of(name: str, shape: tuple[int, ...], tp: int, rank: int):
    """Some matrices cut by columns, some by rows in two parts, the others whole."""
    if "o_proj" in name or "down_proj" in name:
        return fused_cut(shape, 1, [shape[1]], tp, rank)
    if "q_proj" in name or "gate" in name:
        return fused_cut(shape, 0, [shape[0] // 2] * 2, tp, rank)
    return None


@pytest.mark.parametrize("grid", [Grid(shard=2), Grid(tp=2), Grid(replicate=2, shard=2, tp=2)], ids=str)
def test_a_sharded_checkpoint_is_hashed_loaded_and_exported_like_a_whole_one(grid, tmp_path):
    model = make_model()
    run = write_run(tmp_path / "run", model)
    whole = step_folder(run, 0)
    ranks = []
    for rank, place in enumerate(grid.places):
        stored = {}
        with as_rank(rank, len(grid.places)):
            for name, tensor in model.state_dict().items():
                cut = cut_of(name, tuple(tensor.shape), grid.tp, place[2]) if grid.tp > 1 else None
                stored[f"model.{name}"] = StoredTensor.of(held(tensor, grid, place, cut)[0], cut)
        ranks.append(stored)
    sharded = step_folder(run, 1)
    write_together(sharded, ranks)
    shutil.copy(whole / "state.json", sharded)
    assert len(list(sharded.glob("*.distcp"))) == len(grid.places)
    assert weights_sha256(sharded) == weights_sha256(whole)
    other = make_model(seed=3)
    load_weights(sharded, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    export_pretrained(sharded, tmp_path / "hub", dtype="float32")
    exported = load_pretrained(tmp_path / "hub")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.parameters(), strict=True))


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """FSDP and DDP on gloo; a rank that cannot write spoils the checkpoint for all, and the next one is written."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*program, str(ROOT / "tests" / "checkpoint_ranks.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = make_model()
    alone = Checkpoints(tmp_path / "alone", CheckpointingSection(output_dir="unused"), ALONE, print)
    optimizer = Moments(expected)
    alone.save(state(1), expected, optimizer, wait=True)
    theirs = checkpoint_tensors(step_folder(tmp_path / "alone", 1))
    for name in ("fsdp", "ddp"):
        path = step_folder(tmp_path / name, 1)
        sizes = [entry["bytes"] for file, entry in RunState.read(path).files.items() if file.endswith(".distcp")]
        assert len(sizes) == 2
        assert max(sizes) < 1.3 * min(sizes)
        ours = checkpoint_tensors(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        other = make_model(seed=9)
        moments = Moments(other, seed=9)
        alone.load(path, other, moments)
        assert torch.equal(moments.exp_avg["norm.weight"], optimizer.exp_avg["norm.weight"])
    log, notes = (json.loads((tmp_path / name).read_text()) for name in ("said.json", "notes.json"))
    assert any("step-00000002: the checkpoint could not be written (OSError: [Errno 28]" in line for line in log)
    assert step_folder(tmp_path / "fsdp", 3).exists()
    assert not step_folder(tmp_path / "fsdp", 2).exists()
    # Of two copies each rank has taken half to its memory, and of three files each was read by one rank.
    size = sum(part.tensor.nbytes for tensor in stored_tensors(expected, optimizer).values() for part in tensor.parts)
    assert size <= sum(notes["memory"]) < 1.1 * size
    assert max(notes["memory"]) < 1.3 * min(notes["memory"])
    assert [sum(counts) for counts in notes["found, loaded, weights"]] == [3, 0, 3]
    assert all(min(counts) > 0 for counts in notes["found, loaded, weights"][::2])
    # A rank that takes longer than the time limit of a step does not spoil a checkpoint.
    assert notes["slow"] > 3
    assert step_folder(tmp_path / "ddp", 2).exists()
    # A wrong byte is found by the rank that reads it, and known to both.
    assert notes["passed over"] == ["step-00000001"] * 2
    assert any("step-00000003 is passed over: __1_0.distcp is not as it was written" in line for line in log)
    assert stored_tensors(expected, None).keys() == {name for name in theirs if name.startswith("model.")}
