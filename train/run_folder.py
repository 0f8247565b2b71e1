"""The folder of a run: its configuration, its manifest, its log."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from shards.files import lock_folder, write_atomic
from shards.mixture import MixturePlan
from train.append import AppendOnly
from train.config import ExperimentConfig
from train.distributed import Ranks

CLEAR = "\r\x1b[K"  # ECMA-48: carriage return, erase in line


class RunFolder:
    """`experiments/<name>/`; on ranks other than the first it writes and prints nothing."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path = path
        self._ranks = ranks
        if ranks.is_first:
            (path / "logs").mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(path)
            self._log = AppendOnly(path / "logs" / "train.log", self._print)
        self._on_terminal = ranks.is_first and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def close(self) -> None:
        """Let another process write here."""
        if self._ranks.is_first:
            self._log.close()
            self._lock.close()

    def say(self, message: str) -> None:
        """Print a line and keep it in `logs/train.log`. A full disk or a reader that has gone does not end a run."""
        if self._ranks.is_first:
            self._print(message)
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {message}\n".encode())

    def status(self, text: str) -> None:
        """Show a line on the terminal, if there is one, until the next takes its place."""
        if self._on_terminal:
            _write_out(CLEAR + text[: shutil.get_terminal_size().columns - 1])

    def _print(self, message: str) -> None:
        _write_out(f"{CLEAR if self._on_terminal else ''}{message}\n")

    def previous_config(self) -> dict[str, Any] | None:
        """The configuration of the last start, if there was one."""
        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_start(
        self, config: ExperimentConfig, plan: MixturePlan, parameters: int, global_batch: int, layout: str
    ) -> None:
        """Write `config.yaml` (resolved), `manifest.json` (what the run is made of) and the data's `tokenizer.json`."""
        if not self._ranks.is_first:
            return
        write_atomic(self.path / "config.yaml", config.to_yaml())
        write_atomic(self.path / "tokenizer.json", plan.sources[0].dataset.tokenizer_json())
        self.write_json("manifest.json", _manifest(config, plan, parameters, global_batch, layout, self._ranks))

    def write_json(self, name: str, content: dict[str, Any] | list[Any]) -> None:
        """Write a JSON file of the folder, whole or not at all.

        Raises:
            OSError: the disk fails.
        """
        if self._ranks.is_first:
            write_atomic(self.path / name, json.dumps(content, indent=1) + "\n")


def _write_out(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):  # a pipe's reader or the terminal has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A full disk behind a redirection: the text waits in the buffer of stdout.


def _manifest(
    config: ExperimentConfig, plan: MixturePlan, parameters: int, global_batch: int, layout: str, ranks: Ranks
) -> dict[str, Any]:
    packages = ["torch", "numpy", "numba", "pyarrow", "tokenizers", "pydantic"]
    return {
        "name": config.experiment.name,
        "seed": config.experiment.seed,
        "parameters": parameters,
        "global_batch": global_batch,
        "seq_len": plan.seq_len,
        "data": {
            "tokenizer": plan.tokenizer_hash,
            "vocab_size": plan.vocab_size,
            "eos_id": plan.sources[0].dataset.manifest.eos_id,
            "bos_id": plan.sources[0].dataset.manifest.bos_id,
            "sources": {
                source.name: {"path": str(source.dataset.path), "fingerprint": source.dataset.fingerprint}
                for source in plan.sources
            },
            "plan": plan.past(plan.length()),
        },
        "command": sys.argv,
        "git": _git_state(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "hardware": {
            "machine": platform.platform(),
            "world_size": ranks.world_size,
            "layout": layout,
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit and whether the tree has changes; None outside a repository or without git."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
