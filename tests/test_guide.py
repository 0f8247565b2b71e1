"""The guide to the models: its new family is registered, trained and sampled; what it says of the presets is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from training_runs import ROOT, write_experiment, write_sources

GUIDE = (ROOT / "docs" / "MODEL_ARCHITECTURE_GUIDE.md").read_text()

# What the new family has to do once it is registered, in a process whose `train` has it. The argument: an experiment.
FAMILY_WORKS = """
import sys
from pathlib import Path
import torch
from training_runs import losses, train_here
from train.flops import flops_per_token
from train.load import load_run
from train.models import ModelRegistry

folder = Path(sys.argv[1]).parent
with torch.device("meta"):
    model = ModelRegistry.create_from_yaml(folder / "model.yaml")
assert model.get_num_params() == 6400 * 128 + 128 + 2 * (128 * 32 * 12 + 2 * 32 + 2 * 128 * 512 + 2 * 128)
assert flops_per_token(model, 64) > 6 * model.get_num_params()

for steps in (2, 3):
    status, output = train_here(sys.argv[1], f"training.max_steps={steps}")
    assert status == 0, output
assert "resuming from" in output
first, second, third = losses(folder / "run")
assert third < second < first

model = load_run(folder / "run")[0]
ids = torch.randint(0, 400, (2, 5), generator=torch.Generator().manual_seed(0))
found, expected = model.generate(ids, max_length=20, temperature=0), ids
for _ in range(15):  # the cache changes nothing
    expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
assert (found == expected).all()
"""


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_the_new_family_trains_and_generates(tmp_path: Path):
    """As the guide says, in a copy of `train/`: two files and a line; the linter is content, it trains and resumes."""
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "shards").symlink_to(ROOT / "shards")
    (line, family), (model_file,) = (
        code_blocks("python"),
        [text for text in code_blocks("yaml") if "model_type" in text],
    )
    (tmp_path / "train/models/primer.py").write_text(family)
    families = tmp_path / "train/models/__init__.py"
    text = families.read_text()
    before = "from train.models import qwen as qwen\n"
    assert text.count(before) == 1
    families.write_text(text.replace(before, line + before))

    def run(*arguments: object) -> None:
        """Python on these arguments, where `train` is the copy."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("-m", "ruff", "check", "--no-cache", "train/models")
    run("-m", "ruff", "format", "--no-cache", "--check", "train/models")
    experiment = write_experiment(
        tmp_path / "primer",
        write_sources(tmp_path / "data"),
        model={"type": "primer", "overrides": {"vocab_size": 400}},
        training={"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 1},
        evaluation={"max_tokens": 512},
    )
    (tmp_path / "primer/model.yaml").write_text(model_file)
    run("-c", FAMILY_WORKS, experiment)


def test_the_table_of_presets():
    """Every shipped file with its counts, as the file's own comment has them (which its own test checks)."""
    rows = dict(re.findall(r"\| `(\w+/[\w.-]+)` \| ([\d,]+ \| [\d,]*) ?\|", GUIDE))
    files = {
        str(f.relative_to(ROOT / "configs/model").with_suffix("")): f for f in (ROOT / "configs/model").rglob("*.yaml")
    }
    assert rows.keys() == files.keys()
    for name, row in rows.items():
        comment = " ".join(line for line in files[name].read_text().splitlines() if line.startswith("#"))
        total, active = re.search(r"([\d,]+) parameters", comment), re.search(r"([\d,]+) active", comment)
        assert row.split(" | ") == [total.group(1), active.group(1) if active else ""], name


def test_its_links_and_paths_exist():
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", GUIDE)) <= headings
    for path in re.findall(r"configs/model/[\w/.-]+\.yaml", GUIDE):
        assert (ROOT / path).exists() or "primer" in path, path
    for name in re.findall(r"`(\w+\.py)`", GUIDE):
        assert (ROOT / "train" / "models" / name).exists(), name
