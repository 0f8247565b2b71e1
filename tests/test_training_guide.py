"""The guide to training: every field with its default, every file of a run, every number of a row, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from family_runs import FAMILIES
from pydantic.fields import FieldInfo
from training_runs import ROOT, rows, train_here, write_experiment, write_sources

from shards.settings import Settings, parse_yaml, validate
from train.config import EvaluationDataset, ExperimentConfig, load_experiment
from train.distributed import Ranks
from train.flops import flops_per_token
from train.hardware import find_gpu
from train.layout import make_layout
from train.models import ModelRegistry
from train.prepare import load_model_config
from train.rollback import LIMIT
from train.signals import REQUEUE

GUIDE = (ROOT / "docs" / "TRAINING_GUIDE.md").read_text()
SCALING = (ROOT / "docs" / "SCALING_TO_7B.md").read_text()
README = (ROOT / "README.md").read_text()
GUIDES = pytest.mark.parametrize("text", [GUIDE, SCALING, README], ids=["training", "scaling", "readme"])


def section_models() -> dict[str, type[Settings]]:
    """The sections of an experiment file."""
    found = {}
    for name, field in ExperimentConfig.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        found[name] = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings))
    return found


SECTIONS = section_models()


def chapter(text: str, heading: str) -> str:
    """What stands under a heading, up to the next of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def table(text: str) -> list[list[str]]:
    """The cells of all rows of the tables in a chapter, without heads."""
    lines = [re.split(r"(?<!\\) \| ", line[2:-2].strip()) for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0].startswith("`")]


def default_of(field: FieldInfo) -> object:
    """As YAML has it."""
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_stands_with_its_default(section):
    described = {name.strip("`"): default for name, default, _ in table(chapter(GUIDE, f"`{section}`"))}
    fields = SECTIONS[section].model_fields
    assert list(described) == list(fields)
    for name, default in described.items():
        if fields[name].is_required():
            assert default == "required", name
        else:
            assert default != "required", name
            assert parse_yaml(default.strip("`"), name) == default_of(fields[name]), name


def test_the_fields_of_a_validation_set():
    (row,) = [cells for cells in table(chapter(GUIDE, "`evaluation`")) if cells[0] == "`datasets`"]
    assert set(re.findall(r"`(\w+)`", row[2])) == EvaluationDataset.model_fields.keys()


@GUIDES
def test_only_fields_that_exist_are_named(text):
    code = "\n".join(code_of(text))
    names = re.findall(rf"(?<![\w/.-])({'|'.join(SECTIONS)})\.(\w+)(?!\.py)", code)
    assert names
    unknown = {(section, name) for section, name in names if name not in SECTIONS[section].model_fields}
    allowed = {("data", "config"), ("training", "lernrate")}  # the second: an example of a mistake
    assert unknown <= allowed


def code_of(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", rest)


@GUIDES
def test_yaml_of_experiments_is_valid(text):
    """Sections shown as YAML have fields that exist, with values that fit."""
    for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in [block] if "\n  " in block else block.splitlines():
            for section, content in (yaml.safe_load(line) or {}).items():
                if section in SECTIONS and isinstance(content, dict) and not {"weights", "sources"} & content.keys():
                    known = SECTIONS[section].model_fields
                    assert content.keys() <= known.keys(), (section, content)
    sections = [line for line in GUIDE.splitlines() if line.startswith("parallel: {")]
    assert sections
    for line in sections:
        SECTIONS["parallel"].model_validate(yaml.safe_load(line)["parallel"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a model with experts, of which the peak is known, on TensorBoard, with a profile."""
    folder = tmp_path_factory.mktemp("guide")
    experiment = write_experiment(
        folder,
        write_sources(folder / "data"),
        model={"type": None, "config_path": None, "config": {**FAMILIES["minimind2 with experts"], "vocab_size": 400}},
        training={"max_steps": 3, "warmup_steps": 1},
        logging={"peak_tflops": 1.0, "use_tensorboard": True},
        evaluation={"metrics": ["loss", "bpb", "perplexity"]},
        profile={"steps": [2, 2]},
    )
    status, output = train_here(experiment)
    assert status == 0, output
    return folder / "run"


def test_every_number_of_a_row_is_explained_and_no_other(run):
    from train.metrics import flatten

    described = set()
    for cells in table(chapter(GUIDE, "The rows of the log")):
        described |= set(re.findall(r"`([^`]+)`", cells[0]))
    training = [row for row in rows(run, timed=True) if "loss" in row]
    written = {re.sub(r"^sources/[^/]+", "sources/NAME", name) for row in training for name in flatten(row)}
    of_gpus = {"memory_gb/allocated", "memory_gb/reserved"}
    assert written == described - of_gpus
    validation = [row for row in rows(run) if "val_loss" in row]
    text = chapter(GUIDE, "The rows of the log")
    assert all(f"`{name}`" in text for row in validation for name in row)


def test_every_file_of_a_run_is_named(run):
    named = re.findall(r"`([^`]+)`", "\n".join(cells[0] for cells in table(chapter(GUIDE, "The run folder"))))
    files = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "checkpoints/step-00000003/state.json", "logs/train.log", ".lock"} <= set(files)
    for file in files:
        assert any(file == name or (name.endswith("/") and file.startswith(name)) for name in named), file
    profiles = {cells[0].strip("`") for cells in table(chapter(GUIDE, "Profiles"))}
    written = {path.name for path in (run / "logs/profile").iterdir()}
    assert written == profiles - {"memory-rank00000.pickle"}


def test_its_constants():
    assert f'| SIGUSR2 | the same, "start me again" | {REQUEUE} |' in GUIDE
    assert LIMIT == 3
    assert "After three rollbacks to one checkpoint" in GUIDE


@GUIDES
def test_links_paths_and_commands_exist(text):
    for file, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        target = ROOT / ("" if text is README else "docs") / file if file else None
        assert target is None or target.exists(), file
        if anchor:
            there = text if target is None else target.read_text()
            headings = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor
    for path in re.findall(r"\b((?:configs|docs|train|tools|tests)/[\w/.-]+\.(?:yaml|py|md|sbatch))", text):
        assert (ROOT / path).exists() or "FILE" in path, path
    scripts = (ROOT / "pyproject.toml").read_text()
    for command in set(re.findall(r"\bminigpt-[a-z]+\b", text)):
        assert f"\n{command} = " in scripts, command


def scaling_experiments() -> dict[str, ExperimentConfig]:
    """The experiments of the walk to 7B, by heading."""
    found = {}
    for heading, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", SCALING, re.MULTILINE | re.DOTALL):
        for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found[heading] = validate(ExperimentConfig, parse_yaml(block, heading), heading)
    return found


RANKS = {"26M on a laptop": 1, "124M on one GPU": 1, "1B on 8 GPUs": 8, "7B on 8 GPUs": 8, "7B on 64 GPUs": 64}
MFU = {"124M": 0.40, "1B": 0.48, "7B, 8": 0.50, "7B, 64": 0.45}


def test_the_walk_to_7b_adds_up(monkeypatch):
    """Its experiments can be run; parameters, tokens, speed, time and cost of its table follow from them."""
    monkeypatch.chdir(ROOT)
    experiments = scaling_experiments()
    assert list(experiments) == list(RANKS)
    lines = [
        line.strip("| ").split(" | ") for line in chapter(SCALING, "The numbers").splitlines() if " H100 | " in line
    ]
    numbers = {cells[0]: cells[1:] for cells in lines}
    checked = 0
    for heading, config in experiments.items():
        model_config = load_model_config(config)
        with torch.device("meta"):
            model = ModelRegistry.create_model(model_config.model_type, model_config)
        length = config.data.max_seq_length or model_config.max_position_embeddings
        layout = make_layout(config, Ranks(0, RANKS[heading], torch.device("cpu"), None))
        step = config.training.batch_size * config.training.gradient_accumulation_steps * layout.data_size * length
        assert f"{step:,} tokens a step" in chapter_with_code(heading), heading
        name = next(
            (name for name in numbers if name.split(",")[0] == heading.split()[0] and f" {RANKS[heading]} " in name),
            None,
        )
        if name is None:
            continue
        parameters, tokens, strategy, micro, _, speed, time, cost = numbers[name]
        assert parameters == f"{model.get_num_params():,}"
        assert micro == f"{config.training.batch_size} x {length:,}"
        assert strategy.split(",")[0] == (config.strategy if RANKS[heading] > 1 else "one process")
        wanted = float(tokens.removesuffix(" B")) * 1e9
        assert step * config.training.max_steps == pytest.approx(wanted, rel=0.02)
        mfu = next(value for key, value in MFU.items() if name.startswith(key))
        rate = RANKS[heading] * find_gpu("h100").flops * mfu / flops_per_token(model, length)
        assert float(speed.replace(",", "")) == pytest.approx(rate, rel=0.02)
        hours = wanted / rate / 3600
        value, unit = time.split()
        assert float(value) * {"h": 1, "days": 24}[unit] == pytest.approx(hours, rel=0.05)
        assert float(re.sub(r"[$,]", "", cost)) == pytest.approx(
            2.5 * hours * RANKS[heading], rel=0.2 if hours < 2 else 0.02
        )
        checked += 1
    assert checked == 4
    shipped = load_experiment(ROOT / "configs/experiments/active/exp001_llama7b_pretrain_64gpu.yaml")
    walk = experiments["7B on 64 GPUs"]
    assert (walk.model.config_path, walk.data.config_path) == (shipped.model.config_path, shipped.data.config_path)
    assert walk.training.model_dump(exclude_unset=True).items() <= shipped.training.model_dump().items()
    assert walk.parallel == shipped.parallel


def chapter_with_code(heading: str) -> str:
    """As `chapter`, where comments of code look like headings."""
    (found,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", SCALING, re.MULTILINE | re.DOTALL)
    return found
