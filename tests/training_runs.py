"""Small real training data, experiment files and training processes, for the tests of the training room.

The text is what every Python carries: the source of its standard library and the prose of its language reference.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import io
import itertools
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shards.writer import DatasetWriter

ROOT = Path(__file__).parent.parent
EOS = "<|endoftext|>"
SEQ_LEN = 32


def texts() -> dict[str, list[str]]:
    """Documents of two sources, about 100 KB each."""
    code = inspect.getsource(argparse) + inspect.getsource(difflib)
    prose = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    return {"code": code.split("\n\n\n"), "prose": [text for text in prose if 200 < len(text) < 3000]}


def train_tokenizer(documents: list[str], vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_tokens(directory: Path, tokenizer: Tokenizer, documents: list[str], shard_tokens: int = 10_000) -> np.ndarray:
    """Tokenize documents into a dataset; returns its stream of tokens."""
    end = tokenizer.token_to_id(EOS)
    pieces = [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in documents]
    stream = np.array(list(itertools.chain.from_iterable(pieces)), np.uint16)
    writer = DatasetWriter(
        directory,
        tokenizer_json=tokenizer.to_str().encode(),
        vocab_size=tokenizer.get_vocab_size(),
        eos_id=end,
        shard_tokens=shard_tokens,
    )
    writer.append(
        stream,
        np.cumsum([len(piece) for piece in pieces]),
        pa.array([f"{directory.name}-{number}" for number in range(len(documents))]),
        pa.array([directory.name] * len(documents)),
        np.array([len(text.encode()) for text in documents]),
    )
    writer.finish(backend="tokenizers", recipe={})
    return stream


def write_sources(folder: Path) -> dict[str, Any]:
    """Datasets `code` and `prose` with a `val/` each, under `folder`; returns the mixture of the two."""
    sources = texts()
    tokenizer = train_tokenizer([*sources["code"], *sources["prose"]])
    for name, documents in sources.items():
        write_tokens(folder / name, tokenizer, documents[4:])
        write_tokens(folder / name / "val", tokenizer, documents[:4])
    weights = {"code": 0.7, "prose": 0.3}
    return {
        "name": "two",
        "seed": 3,
        "sources": [{"name": name, "path": str(folder / name), "weight": weights[name]} for name in sources],
    }


MODEL = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
}


def write_experiment(folder: Path, mixture: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """Write experiment, model and mixture files into `folder`, the run to `folder/run`; `sections` change fields."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL))
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    content: dict[str, dict[str, Any]] = {
        "experiment": {"name": "tiny", "seed": 7},
        "model": {"type": "llama", "config_path": str(folder / "model.yaml")},
        "data": {"config_path": str(folder / "mixture.yaml")},
        "training": {
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 30,
            "learning_rate": 3e-3,
            "warmup_steps": 5,
            "mixed_precision": "fp32",
            "compile": False,
        },
        "checkpointing": {"output_dir": str(folder / "run"), "save_steps": 10},
        "logging": {"log_steps": 1, "eval_steps": 10},
        "evaluation": {"max_tokens": 1024},
    }
    for name, fields in sections.items():
        content.setdefault(name, {}).update(fields)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(config: Path, *overrides: str, ranks: int = 0) -> list[str]:
    """The command line of a run; with `ranks` under torchrun, without as a plain process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, str(ROOT / "train" / "pretrain.py"), "--config", str(config), *overrides]


def start(config: Path, *overrides: str, ranks: int = 0, **options: Any) -> subprocess.Popen[str]:
    """Start a training process with one thread per rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        command(config, *overrides, ranks=ranks),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a run, and the ranks under torchrun first, which live in sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in [*map(int, children), process.pid]:
        os.kill(number, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def run(config: Path, *overrides: str, ranks: int = 0, **options: Any) -> str:
    """Train to the end in a process of its own; returns what it printed."""
    process = start(config, *overrides, ranks=ranks, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(run_folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, without what was measured, which differs from run to run, unless `timed`."""
    from train.speed import MEASURED

    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return found if timed else [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def losses(run_folder: Path) -> list[float]:
    """Training loss of every step."""
    return [row["loss"] for row in rows(run_folder) if "loss" in row]


def checkpoint_tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by name."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def step_folder(run_folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def results(run_folder: Path) -> dict[str, Any]:
    """What the run ended with."""
    return json.loads((run_folder / "results.json").read_text())


def train_here(config: Path, *overrides: str, stage: str = "pretrain", plot: bool = False) -> tuple[int, str]:
    """The command in this process, as `run_command(main)` runs it: exit status, and what it printed.

    Without `plot` the loss curve is not drawn, which takes as long as the steps.
    """
    from shards.errors import run_command
    from train.pretrain import main

    output, arguments = io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    sys.argv = [f"train/{stage}.py", "--config", str(config), *overrides]
    status, undrawn = 0, contextlib.nullcontext() if plot else mock.patch("train.pretrain.plot_losses")
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), undrawn:
            run_command(lambda: main(stage))
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, output.getvalue()
