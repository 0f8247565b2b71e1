"""The README.md of an exported model: what it is, what it was trained on, how it is loaded."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from train.metrics import read_metrics
from train.models import BaseModelConfig
from train.run_state import RunState

_TRAINING = (
    *("max_steps", "batch_size", "gradient_accumulation_steps", "optimizer", "learning_rate", "lr_scheduler"),
    *("warmup_steps", "min_lr_ratio", "weight_decay", "betas", "grad_clip", "mixed_precision"),
)

_TAG = "- minigpt"  # as it stands in the front matter


def model_card(
    run: Path,
    checkpoint: Path,
    config: BaseModelConfig,
    parameters: tuple[int, int],
    architecture: str | None,
    dtype: str,
) -> str:
    """Text of the card.

    Args:
        run: the run folder, or one that `minigpt-import` made.
        checkpoint: which of its checkpoints was exported.
        config: of the model.
        parameters: all, and those that a token uses.
        architecture: class of transformers that loads it; None for a file of torch.
        dtype: of the weights in the file.
    """
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    state = RunState.read(checkpoint)
    front: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": [_TAG.removeprefix("- "), config.model_type]}
    if architecture is not None:
        front["library_name"] = "transformers"
    total, active = parameters
    imported = "seq_len" not in manifest
    facts = {
        "Architecture": f"{architecture or 'no architecture of transformers'} (model_type {config.model_type})",
        "Parameters": f"{total:,}" + (f", {active:,} of them used for a token" if active != total else ""),
        "Layers, hidden size, vocabulary": f"{config.num_hidden_layers}, {config.hidden_size}, {config.vocab_size:,}",
        "Context": f"{config.max_position_embeddings:,} tokens",
        "Weights": dtype if imported else f"{dtype} (trained with float32 master weights)",
        **_training_facts(run, manifest, state),
    }
    sections = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {manifest['name']}",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        _data(manifest, state),
        _settings(run),
        "## Use\n\n" + (_with_transformers() if architecture else _with_torch()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_card(text: str) -> bool:
    """Whether `model_card` wrote this text."""
    front = text.removeprefix("---\n").partition("\n---\n")[0]
    return text.startswith("---\n") and _TAG in front.splitlines()


def _training_facts(run: Path, manifest: dict[str, Any], state: RunState) -> dict[str, str]:
    if "seq_len" not in manifest:
        return {"Imported from": str(state.origin)}
    facts = {
        "Trained on": f"{state.next_sample * manifest['seq_len']:,} tokens, in {state.step:,} steps of "
        f"{manifest['global_batch'] * manifest['seq_len']:,}"
    }
    log = run / "metrics.jsonl"
    rows = [row for row in (read_metrics(log) if log.exists() else []) if row["step"] <= state.step]
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        last = validated[-1]
        bits = f", {last['val_bpb']:.4f} bits per byte" if "val_bpb" in last else ""
        facts["Validation"] = f"loss {last['val_loss']:.4f}{bits} (step {last['step']:,})"
    return facts


def _data(manifest: dict[str, Any], state: RunState) -> str:
    """Shares of the sources in what the model has seen."""
    phases = manifest.get("data", {}).get("plan", {}).get("phases")
    if not phases or not state.next_sample:
        return ""
    shares: dict[str, Fraction] = {}
    for number, phase in enumerate(phases):
        later = phases[number + 1]["start"] if number + 1 < len(phases) else state.next_sample
        samples = max(0, min(later, state.next_sample) - phase["start"])
        whole = sum(Fraction(weight) for _, weight in phase["weights"])
        for source, weight in phase["weights"]:
            shares[source] = shares.get(source, Fraction(0)) + samples * Fraction(weight) / whole
    sources = manifest["data"]["sources"]
    rows = [
        f"| {source} | {float(share / state.next_sample):.1%} | `{sources[source]['fingerprint']}` |"
        for source, share in shares.items()
        if share
    ]
    return "## Data\n\n| source | share of tokens | fingerprint |\n|---|---|---|\n" + "\n".join(rows)


def _settings(run: Path) -> str:
    """The training section of the experiment, as it was resolved."""
    path = run / "config.yaml"
    if not path.exists():
        return ""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    start = config["model"].get("from_pretrained")
    begin = f"The weights at the start were those of `{start}`.\n\n" if start else ""
    training = {name: config["training"][name] for name in _TRAINING if name in config["training"]}
    text = yaml.safe_dump({"seed": config["experiment"]["seed"], **training}, sort_keys=False)
    return f"## Training\n\n{begin}```yaml\n{text}```"


def _with_transformers() -> str:
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

This is a base model: it continues text and follows no instructions."""


def _with_torch() -> str:
    return """`model.pth` is a dictionary of tensors with Hugging Face's names, `model.yaml` the model. In minigpt:

```python
from train.models.hf import load_pretrained

model = load_pretrained("PATH")
```

This is a base model: it continues text and follows no instructions."""
