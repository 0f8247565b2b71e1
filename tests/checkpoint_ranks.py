"""Saves and loads checkpoints on the ranks of this start, sharded and whole.

torchrun --nproc-per-node 2 tests/checkpoint_ranks.py FOLDER
"""

from __future__ import annotations

import errno
import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_models import make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from train import checkpoint_files
from train.checkpoint import Checkpoints, load_weights
from train.config import CheckpointingSection
from train.distributed import Ranks, shorten_timeouts, start_ranks
from train.layout import Layout
from train.models import BaseModelForCausalLM
from train.run_state import RunState


class Moments:
    """Stands for an optimiser: moments like the parameters, counters, and a small tensor of its own."""

    def __init__(self, model: torch.nn.Module, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.exp_avg = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        self.steps = {n: torch.tensor(float(seed)) for n, _ in model.named_parameters()}
        self.guard = {"norms": torch.randn(100, generator=generator)}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"exp_avg": self.exp_avg, "steps": self.steps, "guard": self.guard}


def state(step: int, **fields: Any) -> RunState:
    """The state of a run without data."""
    return RunState(step, step * 8, plan="", past={}, position={}, identity={}, world_size=1, **fields)


def shard(model: BaseModelForCausalLM, optimizer: Moments) -> None:
    """Shard a model with FSDP, and the moments like the parameters: half of them as plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        assert isinstance(parameter, DTensor)
        moment = distribute_tensor(optimizer.exp_avg[name], mesh, parameter.placements)
        optimizer.exp_avg[name] = moment if number % 2 else moment.to_local()


def main() -> None:
    """The run in FOLDER/fsdp has a failed save in its middle; each run is read back into another model."""
    folder, ranks, said = Path(sys.argv[1]), start_ranks("gloo"), []
    reads, describe, notes = [], checkpoint_files.describe_file, {}
    checkpoint_files.describe_file = lambda path: (reads.append(path), describe(path))[1]

    def count() -> list[int]:
        """Files that each rank has read since the last call."""
        found = gather(len(reads))
        reads.clear()
        return found

    for strategy in ("fsdp", "ddp"):
        layout = Layout(ranks, "ddp") if strategy == "ddp" else Layout(ranks, "fsdp", dp_shard=2)
        checkpoints = Checkpoints(folder / strategy, CheckpointingSection(output_dir="unused"), layout, said.append)
        model = make_model()
        optimizer = Moments(model)
        if strategy == "fsdp":
            shard(model, optimizer)
        checkpoints.save(state(1), model, optimizer)
        if strategy == "fsdp":
            checkpoints.wait()
            stream = checkpoint_files._HashedStream.write
            if ranks.rank == 1:
                checkpoint_files._HashedStream.write = full
            checkpoints.save(state(2), model, optimizer)
            checkpoints.wait()
            checkpoint_files._HashedStream.write = stream
            checkpoints.save(state(3), model, optimizer)
        checkpoints.wait()
        other = make_model(seed=4)
        moments = Moments(other, seed=4)
        if strategy == "fsdp":
            shard(other, moments)
        count()
        path = checkpoints.find(None)
        counts = [count()]
        checkpoints.load(path, other, moments)
        counts.append(count())
        for name, parameter in model.named_parameters():
            assert torch.equal(local(parameter), local(dict(other.named_parameters())[name])), name
            assert torch.equal(local(optimizer.exp_avg[name]), local(moments.exp_avg[name])), name
        if strategy == "fsdp":
            notes["passed over"] = pass_over(path, checkpoints, ranks)
        else:
            load_weights(path, other, ranks.host_group)
            notes["found, loaded, weights"] = [*counts, count()]
            notes["memory"] = gather(checkpoints._memory._memory.nbytes)
            notes["slow"] = save_slowly(checkpoints, model, optimizer, ranks)
    if ranks.is_first:
        (folder / "said.json").write_text(json.dumps(said))
        (folder / "notes.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def pass_over(newest: Path, checkpoints: Checkpoints, ranks: Ranks) -> list[str]:
    """What the ranks find behind a newest checkpoint with a wrong byte in a file of the second rank."""
    if ranks.is_first:
        path = newest / "__1_0.distcp"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    ranks.barrier()
    return gather(checkpoints.find(None).name)


def save_slowly(checkpoints: Checkpoints, model: BaseModelForCausalLM, optimizer: Moments, ranks: Ranks) -> float:
    """Save where the second rank takes longer to read back than an exchange of a step may last; seconds of the save."""
    shorten_timeouts(timedelta(seconds=1))
    if ranks.rank == 1:
        describe = checkpoint_files.describe_file
        checkpoint_files.describe_file = lambda path: (time.sleep(3), describe(path))[1]
    return checkpoints.save(state(2), model, optimizer, wait=True)


def full(*_args: object) -> int:
    """A disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
