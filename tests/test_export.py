"""minigpt-export and minigpt-import: runs to Hugging Face folders and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import VOCAB, build_model, tokens
from test_parity import ALL, MINIMIND2_MOE, MINIMIND3, V3, VARIANTS
from training_runs import ROOT, step_folder, texts, train_here, train_tokenizer, write_experiment, write_sources
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from shards.errors import UserError
from tools.export import app
from tools.generate import continue_prompts, load
from tools.hub_export import export_pretrained
from tools.hub_files import parse_size
from tools.hub_import import import_pretrained
from train.load import load_run
from train.models import BaseModelForCausalLM
from train.models.hf import load_pretrained
from train.stored_weights import StoredWeights, write_weights


def write_run(run: Path, model: BaseModelForCausalLM) -> Path:
    """A run folder of step 0 with a model's weights, as an import makes it."""
    state = model.state_dict()
    write_weights(run / "checkpoints", {k: tuple(v.shape) for k, v in state.items()}, state.__getitem__, "a test")
    (run / "model.yaml").write_text(yaml.safe_dump(model.config.model_dump(exclude_none=True)))
    tokenizer = train_tokenizer(texts()["prose"][:20], vocab_size=VOCAB)
    (run / "tokenizer.json").write_text(tokenizer.to_str())
    data = {"vocab_size": VOCAB, "eos_id": 0, "bos_id": None}
    (run / "manifest.json").write_text(json.dumps({"name": "tiny", "parameters": model.get_num_params(), "data": data}))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 20 steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    experiment = write_experiment(folder / "e", write_sources(folder / "data"))
    status, output = train_here(experiment, "training.max_steps=20")
    assert status == 0, output
    return folder / "e" / "run"


def export(*arguments: object) -> tuple[int, str]:
    """The command: exit status, and all that it printed or the message that it ended with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    problem = str(result.exception) if isinstance(result.exception, UserError) else ""
    return result.exit_code, result.output + problem


# What is written


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_transformers_computes_the_same_and_the_way_back_too(fields, tmp_path):
    """Checkpoint -> export -> transformers; export -> import -> checkpoint, bit by bit; every variant."""
    model = build_model({**fields, "vocab_size": VOCAB}).eval()
    write_run(tmp_path / "run", model)
    made = export_pretrained(tmp_path / "run", tmp_path / "out", dtype="float32")
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(other).__name__ == made.architecture
    assert not any(info.values())
    ids = tokens(2, 30)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    parameters, checkpoint = import_pretrained(tmp_path / "out", tmp_path / "back")
    assert parameters == model.get_num_params()
    stored = StoredWeights(checkpoint)
    assert stored.shapes.keys() == model.state_dict().keys()
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in model.state_dict().items())
    again, tokenizer_json, eos_id = load_run(tmp_path / "back")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert tokenizer_json == (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert eos_id == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_and_shards(dtype, tmp_path):
    """Shards hold what one file holds; biases of routers stay float32; offsets are aligned."""
    model = build_model({**V3, "vocab_size": VOCAB, "hidden_size": 40, "n_routed_experts": 12})
    write_run(tmp_path / "run", model)
    one = export_pretrained(tmp_path / "run", tmp_path / "one", dtype=dtype)
    many = export_pretrained(tmp_path / "run", tmp_path / "many", dtype=dtype, max_shard_size=15_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert one.files == ["model.safetensors"]
    assert many.files == [f"model-{n:05d}-of-{len(many.files):05d}.safetensors" for n in range(1, len(many.files) + 1)]
    assert len(many.files) > 5
    parts = {file: load_file(tmp_path / "many" / file) for file in many.files}
    assert index["weight_map"] == {name: file for file, tensors in parts.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values()) == many.size
    for file, tensors in parts.items():
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        assert sum(sizes) <= 15_000 or len(sizes) == 1, file
        assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())
    for name, tensor in whole.items():
        assert tensor.dtype == (torch.float32 if "bias" in name else getattr(torch, dtype))
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "many", attn_implementation="eager")
    assert {parameter.dtype for parameter in other.parameters()} == {getattr(torch, dtype)}


def test_a_tensor_of_one_row_is_written_whole(tmp_path):
    """Heads of one key and sizes that leave odd numbers of bytes."""
    model = build_model({**VARIANTS["llama, one key head, biases"], "vocab_size": VOCAB + 1, "intermediate_size": 5})
    write_run(tmp_path / "run", model)
    export_pretrained(tmp_path / "run", tmp_path / "out")
    half = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16().float()) for name, tensor in model.state_dict().items())


def test_a_run_is_exported_with_everything(trained, tmp_path):
    """By the command, with its check; the folder's files say what they should, and generate text."""
    status, output = export(trained, "--out", tmp_path / "out", "--check")
    assert status == 0, output
    assert re.search(r"LlamaForCausalLM, .* of bfloat16 in 1 file", output)
    assert re.search(r"logits of transformers differ by at most \S+ \(tolerance \S+\): equal", output)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["eos_token_id"], generation["eos_token_id"], config["dtype"]) == (0, 0, "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|endoftext|>", 0, 0)
    assert tokenizer.decode(tokenizer("def main():")["input_ids"]) == "def main():"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    results = json.loads((trained / "results.json").read_text())
    for text in ("| code | 70.0% |", "| prose | 30.0% |", "5,120 tokens, in 20 steps of 256", "37,536"):
        assert text in card
    assert f"loss {results['val_loss']:.4f}" in card
    assert "learning_rate: 0.003" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    inputs = tokenizer("def ", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    import_pretrained(tmp_path / "out", tmp_path / "back")
    text = continue_prompts(tmp_path / "back", ["def "], max_new_tokens=8, temperature=0)[0]
    assert text == tokenizer.decode(written[0], skip_special_tokens=True)


def test_a_checkpoint_of_a_run(trained, tmp_path):
    """`RUN/checkpoints/step-…` is exported, not the newest, and float32 is the master weights to the bit."""
    checkpoint = step_folder(trained, 10)
    status, output = export(checkpoint, "--out", tmp_path / "out", "--dtype", "float32", "--check")
    assert status == 0, output
    assert "rounding the weights to float32 moved them by at most 0.00e+00" in output
    expected, _, _ = load_run(trained, checkpoint)
    found = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    assert "2,560 tokens, in 10 steps" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_transformers_lacks(tmp_path):
    model = build_model({**MINIMIND2_MOE, "vocab_size": VOCAB, "n_shared_experts": 2})
    run = write_run(tmp_path / "run", model)
    with pytest.raises(UserError, match=r"minimind 2 with experts.*--format pth"):
        export_pretrained(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    status, output = export(run, "--out", tmp_path / "out", "--format", "pth", "--dtype", "float32", "--check")
    assert status == 0, output
    assert "logits of minigpt differ by at most 0.00e+00" in output
    tensors = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert tensors["model.layers.0.mlp.shared_experts.1.down_proj.weight"].shape == (32, 48)  # minimind's own names
    assert torch.equal(load_pretrained(tmp_path / "out")(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    import_pretrained(tmp_path / "out", tmp_path / "back")
    again, _, eos_id = load_run(tmp_path / "back")
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    assert eos_id == 0
    writer, again_writer = load(tmp_path / "out"), load(tmp_path / "back")
    assert writer.stop_ids == again_writer.stop_ids == (0,)
    assert load(step_folder(tmp_path / "back", 0)).stop_ids == (0,)


def test_a_torch_file_loads_strictly(tmp_path):
    """PyTorch asks for a tied head as well, and the file has it."""
    model = build_model({**MINIMIND3, "vocab_size": VOCAB})
    run = write_run(tmp_path / "run", model)
    export_pretrained(run, tmp_path / "out", file_format="pth", dtype="float32")
    export_pretrained(run, tmp_path / "native")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32, attn_implementation="eager")
    other.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True), strict=True)
    torch.testing.assert_close(other(tokens(1, 9)).logits, model(tokens(1, 9)).logits, rtol=0, atol=1e-5)


# What goes wrong


def test_the_check_finds_a_wrong_configuration(trained, tmp_path, monkeypatch):
    from tools import hub_export

    right = hub_export.hf_config
    monkeypatch.setattr(hub_export, "hf_config", lambda *a: {**right(*a), "rms_norm_eps": 0.1})
    status, output = export(trained, "--out", tmp_path / "out", "--check")
    assert status == 1
    assert "NOT EQUAL" in output


def test_a_killed_export_leaves_nothing(trained, tmp_path):
    """SIGKILL at the third tensor; the next call makes the folder."""
    code = (
        "import os, signal, sys; from pathlib import Path; from tools import hub_export\n"
        "read, calls = hub_export.StoredWeights.read, []\n"
        "def dying(self, name):\n"
        "    calls.append(name)\n"
        "    return read(self, name) if len(calls) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "hub_export.StoredWeights.read = dying\n"
        "hub_export.export_pretrained(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(trained), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    export_pretrained(trained, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_export_that_fails_leaves_nothing(trained, tmp_path, monkeypatch):
    def damaged(self: StoredWeights, name: str) -> torch.Tensor:
        raise UserError("a damaged file")

    export_pretrained(trained, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(StoredWeights, "read", damaged)
    with pytest.raises(UserError, match="a damaged file"):
        export_pretrained(trained, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


def test_what_may_be_overwritten(trained, tmp_path):
    export_pretrained(trained, tmp_path / "out")
    with pytest.raises(UserError, match=r"exists and is not empty.*--overwrite"):
        export_pretrained(trained, tmp_path / "out")
    export_pretrained(trained, tmp_path / "out", dtype="float32", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    for folder in (tmp_path / "thesis", trained):
        with pytest.raises(UserError, match="does not look like a folder that this command made"):
            export_pretrained(trained, folder, overwrite=True)
    (tmp_path / "empty").mkdir()
    export_pretrained(trained, tmp_path / "empty")


def test_only_their_own_work_is_overwritten(trained, tmp_path):
    """Neither command replaces what it reads, what the other made, or a model that was downloaded."""
    export_pretrained(trained, tmp_path / "out")
    import_pretrained(tmp_path / "out", tmp_path / "back")
    export_pretrained(tmp_path / "back", tmp_path / "again")
    (tmp_path / "downloaded").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "downloaded" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    (tmp_path / "downloaded" / "README.md").write_text("---\ntags:\n- chat\n---\n\nnot ours\n- minigpt\n")
    for name in ("back", "downloaded"):
        with pytest.raises(UserError, match="does not look like a folder that this command made"):
            export_pretrained(tmp_path / "back", tmp_path / name, overwrite=True)
    for folder in (tmp_path / "out", tmp_path / "downloaded", trained):
        with pytest.raises(UserError, match="does not look like a folder that this command made"):
            import_pretrained(tmp_path / "out", folder, overwrite=True)
    export_pretrained(trained, tmp_path / "again", overwrite=True)
    import_pretrained(tmp_path / "downloaded", tmp_path / "back", overwrite=True)
    assert (tmp_path / "downloaded" / "model.safetensors").exists()
    assert "master weights" in (tmp_path / "again" / "README.md").read_text()


def test_float16_that_overflows_is_said(tmp_path):
    model = build_model({**ALL["llama, wide heads"], "vocab_size": VOCAB})
    model.norm.weight.data[3] = 70_000.0
    write_run(tmp_path / "run", model)
    with pytest.raises(UserError, match=r"model\.norm\.weight: a value is beyond float16's.*bfloat16"):
        export_pretrained(tmp_path / "run", tmp_path / "out", dtype="float16")
    export_pretrained(tmp_path / "run", tmp_path / "out")


def test_sources_that_are_none(trained, tmp_path):
    problems: dict[str, str] = {
        "nowhere": "no such folder",
        "empty": r"no run folder \(manifest.json is missing\)",
        "run": "the run has no checkpoint yet",
        "alone": "a checkpoint outside of its run folder",
    }
    for name in ("empty", "run", "alone"):
        (tmp_path / name).mkdir()
    for name in ("manifest.json", "config.yaml", "tokenizer.json"):
        (tmp_path / "run" / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "alone" / "state.json").write_bytes((step_folder(trained, 10) / "state.json").read_bytes())
    for name, message in problems.items():
        status, output = export(tmp_path / name, "--out", tmp_path / "out")
        assert status == 1, output  # the runner's: the command itself ends with 2
        assert re.search(message, output)
    status, output = export(trained, "--out", tmp_path / "out", "--max-shard-size", "big")
    assert "'big' is not a size" in output


def test_a_damaged_checkpoint_is_said(tmp_path):
    run = write_run(tmp_path / "run", build_model({**MINIMIND3, "vocab_size": VOCAB}))
    data = next(step_folder(run, 0).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="the checkpoint cannot be read"):
        export_pretrained(run, tmp_path / "out")
    wrong = {**yaml.safe_load((run / "model.yaml").read_text()), "hidden_size": 64}
    (run / "model.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(UserError, match="not a checkpoint of this run's model"):
        export_pretrained(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_imports_that_do_not_fit_leave_nothing(trained, tmp_path):
    export_pretrained(trained, tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        import_pretrained(tmp_path / "hub", tmp_path / "out")
    (tmp_path / "tokenizer.json").rename(tmp_path / "hub" / "tokenizer.json")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"missing: model\.layers\.2\."):
        import_pretrained(tmp_path / "hub", tmp_path / "out")
    assert os.listdir(tmp_path) == ["hub"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2000), ("30B", 30)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


# Memory


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path):
    """A model of 1 GB passes out and in with 0.4 GB beyond what a tiny one takes; loaded, with its own size as well."""
    code = (
        "import sys; from pathlib import Path; from tools.hub_export import export_pretrained\n"
        "from tools.hub_import import import_pretrained\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1e6\n"
        "small, large = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for folder in (small, large):\n"
        "    export_pretrained(folder / 'run', folder / 'out', dtype='float32', max_shard_size=4 * 10**8)\n"
        "    import_pretrained(folder / 'out', folder / 'back')\n"
        "    print(peak())\n"
        "from train.models.hf import load_pretrained\n"
        "model = load_pretrained(large / 'out')\n"
        "print(peak())"
    )
    sizes: dict[str, dict[str, Any]] = {"small": {}, "large": {"hidden_size": 1024, "intermediate_size": 4096}}
    for name, fields in sizes.items():
        layers = 16 if fields else 2
        model = build_model(
            {**VARIANTS["llama, as many heads"], **fields, "vocab_size": VOCAB, "num_hidden_layers": layers}
        )
        write_run(tmp_path / name / "run", model)
        size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 1e9
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large, loaded = map(float, done.stdout.split())
    assert large - small < 0.4, (small, large)
    assert loaded - small < size / 1e9 + 0.4, (small, loaded)
