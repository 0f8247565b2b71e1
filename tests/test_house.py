"""The house rules that a machine can check: who imports whom, names, sizes, what a command loads at its start."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shards.settings import load_yaml

ROOT = Path(__file__).parent.parent
ROOMS = {
    "shards": {"shards"},
    "prep": {"prep", "shards"},
    "train": {"train", "shards"},
    "tools": {"tools", "train", "shards"},
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
CHECKED = [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    assert imported(path) & ROOMS.keys() <= ROOMS[room]


def test_no_module_hides_another():
    """`torchrun train/pretrain.py` puts train/ first on the import path: a file there hides a module of its name."""
    installed = {name.split(".")[0] for name in importlib.metadata.packages_distributions()}
    for path in SOURCES:
        if path.stem not in ("__init__", "__main__"):
            assert path.stem not in sys.stdlib_module_names | (installed - ROOMS.keys()), path


def test_files_are_short():
    long = {str(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_nothing_is_left_open():
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert [str(path) for path in CHECKED if marks.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "program", ["prep.cli", "shards.cli", "tools.generate", "tools.export", "tools.import_weights"]
)
def test_commands_start_light(program):
    code = (
        f"import sys; sys.argv = ['program', '--help']; from {program} import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'datasets', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configurations_load(path, monkeypatch):
    from prep.recipe import read_recipe
    from shards.mixture import load_mixture
    from train.config import load_experiment
    from train.models import ModelRegistry
    from train.prepare import load_data_config, load_model_config

    monkeypatch.chdir(ROOT)
    match path.relative_to(ROOT / "configs").parts[0]:
        case "model":
            ModelRegistry.load_config(path)
        case "data" if "recipes" in path.parts:
            assert read_recipe(path).sources
        case "data":
            assert load_mixture(path).sources
        case "experiments":
            config = load_experiment(path)
            assert load_model_config(config).model_type == load_yaml(path)["model"]["type"]
            assert load_data_config(config).sources
        case other:
            pytest.fail(f"no loader for configs/{other}")
