"""The guide to the models: its new family is built, trained and sampled; what it says of the presets is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT

from train.distributed import Ranks
from train.flops import flops_per_token
from train.models import ModelRegistry
from train.parallel import initialize

GUIDE = (ROOT / "docs" / "MODEL_ARCHITECTURE_GUIDE.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_the_new_family_trains_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelRegistry, "_families", dict(ModelRegistry._families))  # the other tests do not see it
    (family,), (model_file,) = code_blocks("python"), [block for block in code_blocks("yaml") if "model_type" in block]
    (tmp_path / "primer.py").write_text(family)
    (tmp_path / "tiny.yaml").write_text(model_file)
    spec = importlib.util.spec_from_file_location("primer", tmp_path / "primer.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "primer", module)
    spec.loader.exec_module(module)

    model = ModelRegistry.create_from_yaml(tmp_path / "tiny.yaml")
    initialize(model, 0, Ranks(0, 1, torch.device("cpu"), None))
    assert model.get_num_params() == 6400 * 128 + 128 + 2 * (128 * 32 * 12 + 2 * 32 + 2 * 128 * 512 + 2 * 128)
    assert flops_per_token(model, 64) > 6 * model.get_num_params()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 6400, (2, 65), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = model(ids[:, :-1], labels=ids[:, 1:]).objective
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]

    model.eval()
    found = model.generate(ids[:, :5], max_length=20, temperature=0)
    expected = ids[:, :5]
    for _ in range(15):  # the cache changes nothing
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert (found == expected).all()


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
