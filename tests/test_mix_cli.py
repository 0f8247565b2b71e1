"""`minigpt-mix` as a user runs it: real files, real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from dataset_files import EOS, write_dataset

from shards.mixture import MixturePlan, load_mixture
from shards.pages import amount

MIXTURE1 = Path(__file__).parent.parent / "configs/data/pretrain/phase1/mixture1.yaml"
YAML = """
name: balanced
seed: 3
total_tokens: 64_000
sources:
  - {name: web, path: "${DATA:-data}/web", weight: 0.8}
  - {name: math, path: "${DATA:-data}/math", weight: 0.2, max_epochs: 50}
  - {name: late, path: "${DATA:-data}/late"}
phases:
  - {from: 0.5, weights: {web: 1, late: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    for seed, (name, tokens) in enumerate({"web": 30_000, "math": 1_000, "late": 9_000}.items()):
        np.save(folder / f"{name}.npy", write_dataset(folder / "data" / name, tokens, seed=seed))
    write_dataset(folder / "data" / "web" / "val", 600)
    (folder / "mix.yaml").write_text(YAML)
    return folder


def mix(folder, *arguments, status=0):
    code = "from shards.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


def plan_of(folder, seq_len=64) -> MixturePlan:
    return MixturePlan.build(load_mixture(folder / "mix.yaml"), seq_len, base=folder)


def test_starts_without_heavy_imports(folder):
    code = (
        "import sys, shards, shards.cli\n"
        "assert not {'torch', 'datasets', 'transformers', 'numba', 'numpy'} & set(sys.modules)\n"
        "sys.argv = ['minigpt-mix', 'inspect', 'mix.yaml', '--seq-len', '64', '--json']\n"
        "try: shards.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=60)


def test_inspect_counts_what_is_drawn(folder):
    summary = json.loads(mix(folder, "inspect", "mix.yaml", "--seq-len", 64, "--json").stdout)
    plan = plan_of(folder)
    drawn = np.bincount(plan.locate(np.arange(1000)).source, minlength=3).tolist()
    assert summary["total_samples"] == 1000
    assert summary["total_tokens"] == 64_000
    assert [source["samples"] for source in summary["sources"]] == drawn
    assert [source["realised"] for source in summary["sources"]] == [count / 1000 for count in drawn]
    assert [source["epochs"] for source in summary["sources"]] == [
        count / source.windows for count, source in zip(drawn, plan.sources, strict=True)
    ]
    assert [phase["from_sample"] for phase in summary["phases"]] == [0, 512]
    assert summary["phases"][1]["sources"][1]["samples"] == 0
    assert summary["phases"][1]["sources"][2]["share"] == 0.5
    for index, source in enumerate(summary["sources"]):
        assert sum(phase["sources"][index]["samples"] for phase in summary["phases"]) == source["samples"]
    (warning,) = summary["warnings"]
    assert warning.startswith("read 'math' 7.4 times: beyond 4 epochs")
    assert "Muennighoff" in warning


def test_inspect_prints_tables(folder):
    text = mix(folder, "inspect", "mix.yaml", "--seq-len", 64).stdout
    assert "balanced: 64.0 K tokens = 1,000 windows of 64, seed 3" in text
    assert "phase 1: 31.2 K tokens from 32.8 K on (sample 512), blocks of 64" in text
    row = next(line for line in text.splitlines() if line.startswith("math")).split()
    assert row[-2:] == ["7.36", "50"]  # 103 draws of 14 windows
    assert "warning: read 'math' 7.4 times" in text


def test_inspect_with_another_length_and_with_none(folder):
    shorter = json.loads(mix(folder, "inspect", "mix.yaml", "--seq-len", 64, "--tokens", 6400, "--json").stdout)
    assert shorter["total_samples"] == 100
    assert shorter["phases"][1]["from_sample"] == 64  # half of 100, on the border of a block
    (folder / "endless.yaml").write_text(YAML.replace("total_tokens: 64_000", "").split("phases")[0])
    endless = json.loads(mix(folder, "inspect", "endless.yaml", "--seq-len", 64, "--json").stdout)
    assert endless["total_is"] == "the first source's end"
    (folder / "strict.yaml").write_text(YAML.replace("50}", "2}"))
    error = mix(folder, "inspect", "strict.yaml", "--seq-len", 64, status=2).stderr
    assert "'math': max_epochs 2 allows 28 windows" in error
    assert "fits with max_epochs: " in error


def test_inspect_names_phases_that_never_begin(folder):
    summary = json.loads(mix(folder, "inspect", "mix.yaml", "--seq-len", 64, "--tokens", 3200, "--json").stdout)
    assert len(summary["phases"]) == 1
    assert any("never begins: the run ends at 50" in warning for warning in summary["warnings"])
    assert any("never drawn: 'late'" in warning for warning in summary["warnings"])


def test_inspect_without_the_data(folder, tmp_path):
    yaml = YAML.replace('data}/web"', 'data}/web", tokens: 30_000').replace('data}/math"', 'data}/math", tokens: 1_000')
    (tmp_path / "mix.yaml").write_text(yaml)
    error = mix(tmp_path, "inspect", "mix.yaml", "--seq-len", 64, status=2).stderr
    assert "source 'web': data/web" in error
    text = mix(tmp_path, "inspect", "mix.yaml", "--seq-len", 64, "--plan-only", "--html", "plan.html").stdout
    assert "plan without data: no dataset was opened" in text
    rows = [line.split() for line in text.split("phase 0")[0].splitlines()]
    assert rows[5][-2:] == ["7.36", "50"]  # math, as with the data
    assert rows[6][:4] == ["late", "–", "–", "–"]
    assert "warning: of unknown size: 'late'" in text
    assert "Plan without data:" in (tmp_path / "plan.html").read_text()
    found = json.loads(mix(tmp_path, "inspect", "mix.yaml", "--seq-len", 64, "--plan-only", "--json").stdout)
    with_data = json.loads(mix(folder, "inspect", "mix.yaml", "--seq-len", 64, "--json").stdout)
    assert found["plan_only"]
    for a, b in zip(found["sources"], with_data["sources"], strict=True):
        assert all(a[key] == b[key] for key in ("share", "realised", "samples", "tokens_drawn"))
        assert a["epochs"] == (None if a["name"] == "late" else b["epochs"])
    strict = yaml.replace("50}", "2}")
    (tmp_path / "strict.yaml").write_text(strict)
    error = mix(tmp_path, "inspect", "strict.yaml", "--seq-len", 64, "--plan-only", status=2).stderr
    assert "'math': max_epochs 2 allows 28 windows" in error


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.rects, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag == "rect":
            self.rects.append(values)
        if tag not in ("meta", "line", "rect") or (tag == "rect" and values.get("class") == "cut"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("line", "rect")


def test_page_is_self_contained_and_its_picture_is_the_plan(folder):
    mix(folder, "inspect", "mix.yaml", "--seq-len", 64, "--html", "reports/mix.html")
    text = (folder / "reports" / "mix.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.links
    assert "http" not in text
    blocks = [rect for rect in page.rects if rect.get("class") == "cut"]
    area = sum(float(rect["width"]) * float(rect["height"]) for rect in blocks)
    assert len(blocks) == 4  # web and math, then web and late
    assert area == pytest.approx(846 * 250, rel=1e-3)
    assert float(blocks[0]["height"]) == pytest.approx(0.8 * 250, abs=1)
    assert "read 'math' 7.4 times" in text.replace("&#39;", "'")


def test_names_are_escaped_in_the_page(folder):
    (folder / "odd.yaml").write_text(
        "name: <b>bold</b>\ntotal_tokens: 640\nsources: [{name: <script>, path: data/web, weight: 1}]"
    )
    mix(folder, "inspect", "odd.yaml", "--seq-len", 64, "--html", "odd.html")
    text = (folder / "odd.html").read_text()
    assert "<script>" not in text
    assert "<b>" not in text


def test_explain_names_the_documents_of_a_step(folder):
    windows = json.loads(
        mix(folder, "explain", "mix.yaml", "--seq-len", 64, "--step", 5, "--batch-size", 8, "--json").stdout
    )
    plan = plan_of(folder)
    assert [window["sample"] for window in windows] == list(range(32, 40))
    found = plan.locate(np.arange(32, 40))
    for row, window in enumerate(windows):
        stream = np.load(folder / f"{window['source']}.npy")
        assert window["start"] == found.start[row] == 1000 * window["shard"] + window["offset"]
        assert (window["epoch"], window["window"]) == (found.epoch[row], found.window[row])
        assert window["stop"] == window["start"] + 65
        ends = np.flatnonzero(stream == EOS) + 1  # by a scan of all tokens
        numbers = np.searchsorted(ends, [window["start"], window["stop"] - 1], side="right")
        expected = [f"{window['source']}-{number}" for number in range(numbers[0], numbers[1] + 1)]
        assert [document["id"] for document in window["documents"]] == expected
        borders = [document["start"] for document in window["documents"]] + [window["stop"]]
        assert borders[0] == window["start"]
        assert set(borders[1:-1]) <= set(ends.tolist())
    one = json.loads(mix(folder, "explain", "mix.yaml", "--seq-len", 64, "--sample", 33, "--json").stdout)
    assert one == [windows[1]]
    text = mix(folder, "explain", "mix.yaml", "--seq-len", 64, "--sample", 33).stdout
    assert text.startswith(f"sample 33: {one[0]['source']}, epoch 0, window {one[0]['window']}")
    assert all(document["id"] in text for document in one[0]["documents"])


def test_show_prints_every_token_with_borders(folder):
    plan = plan_of(folder)
    (start,) = plan.locate(np.array([7])).start
    source = plan.sources[plan.locate(np.array([7])).source[0]].name
    stream = np.load(folder / f"{source}.npy")[start : start + 65]
    lines = mix(folder, "show", "mix.yaml", "--seq-len", 64, "--sample", 7).stdout.splitlines()
    assert lines[0].startswith("══ sample 7: ")
    texts = [line for line in lines if not line.startswith(("══", "──"))]
    words = " ".join(texts).split()
    assert words == ["<eos>" if token == EOS else f"w{token}" for token in stream]
    assert all(text.endswith("<eos>") for text in texts[:-1])
    assert len(texts) == sum(line.startswith("── ") for line in lines)


def test_selectors_must_be_clear(folder):
    for wrong in ([], ["--sample", 1, "--step", 2], ["--step", 2], ["--step", 0, "--batch-size", 4], ["--sample", -1]):
        error = mix(folder, "explain", "mix.yaml", "--seq-len", 64, *wrong, status=2).stderr
        assert "give --sample G (from 0), or --step N (from 1) with --batch-size B" in error


def test_verify_reads_val_too_and_fails_on_a_flipped_byte(folder, tmp_path):
    web = mix(folder, "verify", "data/web").stdout
    assert re.search(r"data/web: 30 shards, [\d,]+ documents, 30,000 tokens: all well\n", web)
    assert "data/web/val: 1 shards" in web
    write_dataset(tmp_path / "bad", 5000)
    shard = tmp_path / "bad" / "shard-00002.bin"
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(content)
    result = mix(folder, "verify", "data/math", tmp_path / "bad", status=1).stdout
    assert "data/math: 1 shards" in result
    assert "shard-00002.bin: the checksum differs" in result


def test_help_teaches(folder):
    for command in ("inspect", "explain", "show", "verify"):
        assert f"minigpt-mix {command} " in mix(folder, command, "--help").stdout.split("Examples")[1]


def test_mistakes_end_in_one_message(folder):
    assert mix(folder, "inspect", "nowhere.yaml", status=2).stderr == "error: nowhere.yaml: no such file\n"
    error = mix(folder, "inspect", "mix.yaml", "--seq-len", 5000, status=2).stderr
    assert "source 'math' (data/math) holds 1,000 tokens" in error
    assert "largest seq_len that fits is 500" in error


def test_amounts():
    numbers = [0, 999, 1000, 9_999, 12_345, 999_999, 1.5e6, 2e12, 3.456e14]
    assert [amount(n) for n in numbers] == [
        "0",
        "999",
        "1.00 K",
        "10.0 K",
        "12.3 K",
        "1.00 M",
        "1.50 M",
        "2.00 T",
        "346 T",
    ]


def test_the_general_mixture_of_the_repository(tmp_path, monkeypatch):
    """Loads, names the total and StarCoder's share, and is met exactly by datasets of any size."""
    import shards

    mixer = shards.DatasetMixer.from_yaml(MIXTURE1)
    assert mixer.config.total_tokens == 2_000_000_000_000
    for source in mixer.config.sources:
        write_dataset(tmp_path / source.path.split("/")[-1], 600)
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path))
    realised = mixer.validate_mixture(max_seq_length=128)
    assert sum(realised.values()) == pytest.approx(1)
    assert realised["starcoder"] == pytest.approx(0.1066, abs=1e-6)
