"""One run from end to end: what it writes, what ends it, how its global batch is shared, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from small_models import shard_alone
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import (
    MODEL,
    SEQ_LEN,
    checkpoint_tensors,
    losses,
    results,
    rows,
    step_folder,
    texts,
    train_here,
    train_tokenizer,
    write_experiment,
    write_sources,
    write_tokens,
)

from shards.errors import UserError
from shards.mixture import MixtureConfig, MixturePlan
from train.checkpoint import weights_sha256
from train.config import load_experiment
from train.distributed import Ranks
from train.evaluate import Validation
from train.load import load_run
from train.optim import Optimizer, create_optimizer
from train.parallel import initialize
from train.passes import Passes
from train.prepare import load_model_config, prepare

ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The sources and their mixture."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    return SimpleNamespace(folder=folder, mixture=write_sources(folder))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run with every log, on an experiment whose files are gone afterwards."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_experiment(
        folder,
        data.mixture,
        checkpointing={"save_steps": 4, "save_total_limit": 3},
        logging={"log_steps": 3, "eval_steps": 10, "use_tensorboard": True},
        evaluation={"metrics": ["loss", "bpb", "perplexity"], "max_tokens": 1024},
    )
    status, output = train_here(config, plot=True)
    assert status == 0, output
    for name in ("model.yaml", "mixture.yaml"):
        (folder / name).rename(folder / f"{name}.moved")
    return SimpleNamespace(run=folder / "run", config=config, output=output)


def train(config, *overrides: str) -> str:
    status, output = train_here(config, *overrides)
    assert status == 0, output
    return output


def refused(config, *overrides: str) -> str:
    status, output = train_here(config, *overrides)
    assert status == 2, output
    assert "Traceback" not in output
    assert output.count("error:") == 1
    return output


# What a run writes


def test_metrics(finished):
    found = rows(finished.run, timed=True)
    training = [row for row in found if "loss" in row]
    validation = [row for row in found if "val_loss" in row]
    assert [row["step"] for row in training] == list(range(3, 31, 3))
    assert [row["step"] for row in validation] == [0, 10, 20, 30]
    for row in training:
        assert row["tokens"] == row["step"] * 8 * SEQ_LEN
        assert row["next_sample"] == row["step"] * 8
        assert row["skipped_steps"] == 0
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
    rates = {row["step"]: row["lr"] for row in training}
    assert rates[3] == pytest.approx(3e-3 * 3 / 5)
    assert rates[30] == pytest.approx(3e-4)
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert validation[0]["val_loss"] == pytest.approx(math.log(400), rel=0.02)  # the start knows nothing
    assert validation[-1]["val_loss"] < validation[0]["val_loss"] - 0.5
    for row in validation:
        assert row["val"].keys() == {"code", "prose"}
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]))
        low, high = sorted(one["loss"] for one in row["val"].values())
        assert low < row["val_loss"] < high


def test_results(finished):
    last = rows(finished.run)[-1]
    found = results(finished.run)
    assert found["step"] == 30
    assert found["val_loss"] == last["val_loss"]
    assert found["val"] == last["val"]
    assert found["loss"] == losses(finished.run)[-1]
    assert found["initial_val_bpb"] == rows(finished.run)[0]["val_bpb"]
    assert len(found["weights_sha256"]) == 64


def test_run_folder(finished, data):
    run = finished.run
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["seed"] == 7
    assert manifest["global_batch"] == 8
    assert manifest["seq_len"] == SEQ_LEN
    assert manifest["parameters"] == sum(
        tensor.numel() for name, tensor in checkpoint_tensors(step_folder(run, 30)).items() if name.startswith("model.")
    )
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["hardware"]["world_size"] == 1
    for name in ("code", "prose"):
        dataset = json.loads((data.folder / name / "dataset.json").read_text())
        assert manifest["data"]["sources"][name]["fingerprint"] == dataset["fingerprint"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = (run / "logs" / "train.log").read_text()
    assert all(line in log for line in finished.output.splitlines() if line.startswith("step "))


def test_the_output_names_everything(finished):
    assert "tiny: 37,536 parameters, 1 rank(s) on cpu" in finished.output
    assert "30 steps; a step is 8 windows of 32 tokens = 256 tokens" in finished.output
    for name in ("results.json", "loss.png", "metrics.jsonl", "checkpoints/step-00000030"):
        assert str(finished.run / name) in finished.output
    assert "ETA" in finished.output


def test_the_folder_stands_alone(finished):
    """Its config.yaml starts the same run, without the files that the experiment referred to."""
    config = load_experiment(finished.run / "config.yaml")
    assert load_model_config(config).model_dump(include=MODEL.keys()) == MODEL
    again = finished.run.parent / "again"
    train(finished.run / "config.yaml", f"checkpointing.output_dir={again}")
    assert results(again) == results(finished.run)


def test_save_total_limit(finished):
    assert sorted(path.name for path in (finished.run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (24, 28, 30)
    ]


def test_state_says_where_the_data_stands(finished, data):
    state = json.loads((step_folder(finished.run, 28) / "state.json").read_text())
    assert (state["step"], state["next_sample"], state["world_size"]) == (28, 224, 1)
    plan = MixturePlan.build(MixtureConfig.model_validate(data.mixture), SEQ_LEN)
    assert state["plan"] == plan.fingerprint(224)
    assert {name: position["draws"] for name, position in state["position"].items()} == dict(
        zip(["code", "prose"], plan.counts(224), strict=True)
    )
    assert all({"epoch", "shard", "offset"} <= position.keys() for position in state["position"].values())


def test_tensorboard_mirrors_the_metrics(finished):
    events = EventAccumulator(str(finished.run / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "val_loss", "val_bpb", "val/code/loss"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"])) for row in rows(finished.run) if "loss" in row]


def test_the_trained_model_loads(finished, data):
    model, tokenizer, end = load_run(finished.run)
    assert weights_sha256(step_folder(finished.run, 30)) == results(finished.run)["weights_sha256"]
    stored = checkpoint_tensors(step_folder(finished.run, 30))
    assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in model.named_parameters())
    assert tokenizer == (data.folder / "code" / "tokenizer.json").read_bytes()
    assert end == 0
    older, _, _ = load_run(finished.run, step_folder(finished.run, 24))
    assert not torch.equal(older.embed_tokens.weight, model.embed_tokens.weight)


# What ends it, and how a step is shared


def test_total_tokens_end_the_run(data, tmp_path):
    mixture = {**data.mixture, "total_tokens": 5 * 256 + 100}  # five steps and a bit
    config = write_experiment(tmp_path, mixture, training={"warmup_steps": 1})
    assert "the run ends at the mixture's total_tokens, 1,380 = 5 steps" in train(config)
    assert results(tmp_path / "run")["step"] == 5
    assert "the run ends at training.max_steps, 3 steps" in train(
        config, "training.max_steps=3", f"checkpointing.output_dir={tmp_path / 'short'}"
    )
    assert results(tmp_path / "short")["step"] == 3


def test_accumulation_does_not_change_the_curve(finished, data, tmp_path):
    for size, accumulation in ((8, 1), (1, 8)):
        folder = tmp_path / str(size)
        training = {"batch_size": size, "gradient_accumulation_steps": accumulation}
        config = write_experiment(folder, data.mixture, training=training, logging={"log_steps": 3})
        train(config)
        assert losses(folder / "run") == pytest.approx(losses(finished.run), rel=1e-5)


def test_world_size_sets_the_global_batch(finished, data, tmp_path):
    """One rank does the work of the two that the experiment is for."""
    training = {"world_size": 2, "gradient_accumulation_steps": 1}
    config = write_experiment(tmp_path, data.mixture, training=training, logging={"log_steps": 3})
    assert "1 data rank(s) x 2 micro-batch(es) x 4 windows" in train(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished.run), rel=1e-5)


def test_ranks_that_cannot_share_the_batch_are_refused(data, tmp_path):
    config = load_experiment(write_experiment(tmp_path, data.mixture, training={"gradient_accumulation_steps": 3}))
    config = config.model_copy(update={"training": config.training.model_copy(update={"world_size": 2})})
    for ranks, accumulation in ((1, 6), (2, 3), (3, 2), (6, 1)):
        assert prepare(config, Ranks(0, ranks, ALONE.device, None)).accumulation == accumulation
    with pytest.raises(UserError, match=r"global batch is 24 windows .*, which 4 data rank.* divides 6"):
        prepare(config, Ranks(0, 4, ALONE.device, None))


# Options


def test_document_mask(data, tmp_path):
    """On short documents: most windows hold a border."""
    tokenizer = train_tokenizer([*texts()["code"], *texts()["prose"]])
    short = [text[start : start + 40] for text in texts()["code"] for start in range(0, len(text), 40)]
    write_tokens(tmp_path / "short", tokenizer, short[100:])
    write_tokens(tmp_path / "short" / "val", tokenizer, short[:100])
    mixture = {"sources": [{"name": "short", "path": str(tmp_path / "short"), "weight": 1}]}
    config, curves, initial = write_experiment(tmp_path, mixture), [], []
    for mask in ("true", "false"):
        run = tmp_path / mask
        train(config, f"data.document_mask={mask}", f"checkpointing.output_dir={run}")
        curves.append(losses(run))
        initial.append(results(run)["initial_val_loss"])
    assert curves[0][-1] < curves[0][0] - 0.5
    assert curves[0][0] != curves[1][0]
    assert initial[0] != initial[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)


def test_bf16_is_close_to_fp32(data, finished, tmp_path):
    config = write_experiment(tmp_path, data.mixture, training={"mixed_precision": "bf16"}, logging={"log_steps": 3})
    train(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(finished.run), rel=2e-3)
    assert losses(tmp_path / "run") != losses(finished.run)
    assert all(t.dtype == torch.float32 for t in checkpoint_tensors(step_folder(tmp_path / "run", 30)).values())


def test_deterministic_runs(data, finished, tmp_path):
    config = write_experiment(tmp_path, data.mixture, training={"deterministic": True}, logging={"log_steps": 3})
    try:
        train(config)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "run") == losses(finished.run)


def test_sharded_bf16_weights_are_saved_in_full(data, tmp_path):
    """Validation gathers weights in bf16; what is saved and hashed afterwards are the float32 ones."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        overrides = ["training.mixed_precision=bf16", "parallel.strategy=fsdp"]
        config = load_experiment(write_experiment(tmp_path, data.mixture), overrides)
        setup = prepare(config, ALONE)
        model = setup.model
        model.compute_dtype = torch.bfloat16
        shard_alone(model)
        model.to_empty(device="cpu")
        initialize(model, 7)
        optimizer = create_optimizer(model, config.training, setup.layout)
        before = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        passes = Passes(model, setup.layout, batch_size=4, length=SEQ_LEN)
        Validation(config.evaluation, setup.plan, 4, False, setup.layout).run(passes)
        assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())  # or this tests nothing
        setup.checkpoints.save(setup.state_at(1, 8), model, optimizer, wait=True)
        stored = checkpoint_tensors(step_folder(tmp_path / "run", 1))
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in before.items())
    finally:
        torch.distributed.destroy_process_group()


def test_without_validation_data_there_is_one_notice(data, tmp_path):
    for name in ("code", "prose"):
        shutil.copytree(data.folder / name, tmp_path / name)
        shutil.rmtree(tmp_path / name / "val")
    sources = [{**source, "path": str(tmp_path / source["name"])} for source in data.mixture["sources"]]
    output = train(write_experiment(tmp_path, {**data.mixture, "sources": sources}))
    assert output.count("no validation:") == 1
    assert not any("val_loss" in row for row in rows(tmp_path / "run"))


def test_a_step_with_a_bad_gradient_is_skipped_and_counted(data, tmp_path, monkeypatch):
    step = Optimizer.step
    calls = []

    def sabotaged(self, rate):
        calls.append(rate)
        if len(calls) == 4:
            next(iter(self.parameters.values())).grad.view(-1)[0] = float("nan")
        return step(self, rate)

    monkeypatch.setattr(Optimizer, "step", sabotaged)
    output = train(write_experiment(tmp_path, data.mixture))
    assert "1 step(s) so far were skipped" in output
    found = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["skipped_steps"] for row in found] == [0] * 3 + [1] * 27
    assert found[3]["grad_norm"] is None  # NaN, which JSON does not have
    assert found[-1]["loss"] < found[0]["loss"] - 0.5


# Refusals


def test_files_that_are_missing(data, tmp_path):
    config = write_experiment(tmp_path, data.mixture)
    assert f"{tmp_path}/none.yaml: no such file" in refused(config, f"model.config_path={tmp_path}/none.yaml")
    assert f"{tmp_path}/none.yaml: no such file" in refused(config, f"data.config_path={tmp_path}/none.yaml")
    assert "none.yaml: no such file" in refused(tmp_path / "none.yaml")
    gone = [{"name": "gone", "path": str(tmp_path / "gone"), "weight": 1}]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"sources": gone}))
    assert f"source 'gone': {tmp_path}/gone has no dataset.json" in refused(config)
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_fit_the_data(data, tmp_path):
    config = write_experiment(tmp_path, data.mixture)
    assert "data.max_seq_length 33 is more than the model's max_position_embeddings 32" in refused(
        config, "data.max_seq_length=33"
    )
    long = ["model.overrides.max_position_embeddings=1_000_000"]
    assert "too few for windows of 1,000,000" in refused(config, *long)
    assert "tokenized with a vocabulary of 400 ids, but the model's vocab_size is 399" in refused(
        config, "model.overrides.vocab_size=399"
    )
    assert "looks like another tokenizer" in refused(config, "model.overrides.vocab_size=32000")
    assert "nothing says when the run ends" in refused(config, "training.max_steps=null")
    assert "has no dataset.json" in refused(config, f"evaluation.datasets=[{{name: v, path: {tmp_path}}}]")
    assert "training.warmup_steps is 30, but the run ends at" in refused(config, "training.warmup_steps=30")
    assert "training.backend is nccl, but this machine has no CUDA device" in refused(config, "training.backend=nccl")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rounded_up_vocabularies_are_fine(data, tmp_path):
    config = write_experiment(tmp_path, data.mixture)
    train(config, "model.overrides.vocab_size=512", "training.max_steps=6")


def test_max_epochs_that_cannot_be_met(data, tmp_path):
    mixture = json.loads(json.dumps(data.mixture))
    mixture["sources"][1]["max_epochs"] = 0.01
    message = refused(write_experiment(tmp_path, mixture))
    assert "max_epochs is exceeded" in message
    assert "'prose': max_epochs 0.01 allows" in message


def test_damaged_data(data, tmp_path):
    shutil.copytree(data.folder / "code", tmp_path / "code")
    sources = [{"name": "code", "path": str(tmp_path / "code"), "weight": 1}]
    config = write_experiment(tmp_path, {"sources": sources})
    path = tmp_path / "code" / "shard-00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    assert f"{path}: {len(content) - 2:,} bytes, but dataset.json says {len(content):,}" in refused(config)
    path.write_bytes(b"\xff\xff" * (len(content) // 2))  # the right size: ids that the model does not have
    message = refused(config)
    assert f"the shard is damaged; run minigpt-mix verify {tmp_path / 'code'}" in message
    path.unlink()
    assert "shard-00001.bin is missing" in refused(config)


def test_other_tokenizers(data, tmp_path):
    write_tokens(tmp_path / "other", train_tokenizer(texts()["prose"][:50], 300), texts()["prose"][:50])
    other = {"name": "other", "path": str(tmp_path / "other"), "weight": 1}
    config = write_experiment(tmp_path, {**data.mixture, "sources": [*data.mixture["sources"], other]})
    assert "were made with different tokenizers" in refused(config)
    config = write_experiment(tmp_path, data.mixture)
    override = f"evaluation.datasets=[{{name: v, path: {tmp_path / 'other'}}}]"
    assert "validation set 'v'" in (message := refused(config, override))
    assert "another tokenizer than the training data" in message


def test_wandb_that_is_not_installed(data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    message = refused(write_experiment(tmp_path, data.mixture), "logging.use_wandb=true")
    assert "wandb is not installed: pip install wandb, or logging.use_wandb=false" in message
    assert not (tmp_path / "run").exists()
