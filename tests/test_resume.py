"""What a run may change when it goes on, what it must not, and what it does with damaged or foreign checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from training_runs import (
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

STEPS, STOPPED = 24, 16
SECTIONS = {
    "training": {"max_steps": STEPS, "warmup_steps": 2},
    "checkpointing": {"save_steps": 8},
    "logging": {"log_steps": 1, "eval_steps": 8},
}


def slow(case):
    """A case that a faster one is much like."""
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of 24 steps of 8 windows, with checkpoints at 8, 16 and 24."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    mixture = write_sources(folder / "data")
    status, output = train_here(write_experiment(folder, mixture, **SECTIONS))
    assert status == 0, output
    return SimpleNamespace(run=folder / "run", mixture=mixture, data=folder / "data")


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run in a folder of its own, stopped at step 16."""
    shutil.copytree(whole.run, tmp_path / "run")
    shutil.rmtree(step_folder(tmp_path / "run", STEPS))
    (tmp_path / "run" / "results.json").unlink()
    config = write_experiment(tmp_path, whole.mixture, **SECTIONS)
    return SimpleNamespace(folder=tmp_path, run=tmp_path / "run", config=config, mixture=copy.deepcopy(whole.mixture))


def snapshot(run: Path) -> dict[str, str]:
    """Hash of every file of a run, but for its log."""
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(stopped, *overrides: str) -> str:
    """The message that the command ends with; the run must be as it was."""
    before = snapshot(stopped.run)
    status, output = train_here(stopped.config, *overrides)
    assert status == 2, output
    assert "Traceback" not in output
    assert snapshot(stopped.run) == before
    assert output.count("error:") == 1
    return output[output.index("error:") :]


def goes_on(stopped, *overrides: str) -> str:
    status, output = train_here(stopped.config, *overrides)
    assert status == 0, output
    assert f"at step {STOPPED}" in output
    assert results(stopped.run)["step"] >= STOPPED
    return output


def write_mixture(stopped, mixture) -> None:
    (stopped.folder / "mixture.yaml").write_text(yaml.safe_dump(mixture, sort_keys=False))


# Refused


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("experiment.seed=8", "experiment.seed: 7, now 8"),
        ("model.overrides.hidden_size=64", "model.hidden_size: 32, now 64"),
        ("model.overrides.num_hidden_layers=3", "model.num_hidden_layers: 2, now 3"),
        ("model.overrides.tie_word_embeddings=false", "model.tie_word_embeddings: True, now False"),
        ("model.overrides.rope_theta=500.0", "model.rope_theta: 10000.0, now 500.0"),
        ("training.betas=[0.9, 0.99]", "training.betas: [0.9, 0.95], now [0.9, 0.99]"),
        ("training.eps=1e-6", "training.eps: 1e-08, now 1e-06"),
        ("training.weight_decay=0.2", "training.weight_decay: 0.1, now 0.2"),
        ("training.batch_size=2", "training.global_batch: 8, now 4"),
        ("training.gradient_accumulation_steps=4", "training.global_batch: 8, now 16"),
        ("data.max_seq_length=16", "data.seq_len: 32, now 16"),
        ("data.document_mask=true", "data.document_mask: False, now True"),
    ],
)
def test_another_run_is_refused(stopped, override, line):
    message = refusal(stopped, override)
    assert f"{step_folder(stopped.run, STOPPED)}: this checkpoint belongs to a different run" in message
    assert f"\n  {line}\n" in message
    assert "resume_from_checkpoint=never" in message


def test_every_difference_is_named(stopped):
    message = refusal(stopped, "experiment.seed=8", "training.eps=1e-6", "data.max_seq_length=16")
    assert all(name in message for name in ("experiment.seed: 7, now 8", "training.eps: 1e-08", "data.seq_len: 32"))


def test_another_past_of_the_mixture_is_refused(stopped):
    mixture = stopped.mixture
    write_mixture(stopped, {**mixture, "seed": 4})
    assert "data.seed: 3, now 4" in refusal(stopped)

    other = copy.deepcopy(mixture)
    other["sources"][0]["weight"] = 0.5
    write_mixture(stopped, other)
    assert "data.phases.0.weights: [['code', 3006477107], ['prose', 1288490189]], now [['code'," in refusal(stopped)

    write_mixture(stopped, {**mixture, "sources": mixture["sources"][::-1]})
    assert ", now [['prose', 1288490189], ['code', 3006477107]]" in refusal(stopped)

    early = {"from": 64 * SEQ_LEN, "weights": {"code": 1}}  # sample 64 of the 128 that were drawn
    write_mixture(stopped, {**mixture, "phases": [early]})
    assert "data.phases.1: None, now {'start': 64, 'weights': [['code', 4294967296]]}" in refusal(stopped)


def test_other_data_at_the_same_place_is_refused(stopped, whole):
    shutil.copytree(whole.data, stopped.folder / "data")
    for source in stopped.mixture["sources"]:
        source["path"] = str(stopped.folder / "data" / source["name"])
    write_mixture(stopped, stopped.mixture)
    path = stopped.folder / "data" / "prose"
    old = json.loads((path / "dataset.json").read_text())["fingerprint"]
    shutil.rmtree(path)
    sources = texts()
    write_tokens(path, train_tokenizer([*sources["code"], *sources["prose"]]), sources["prose"][5:])
    new = json.loads((path / "dataset.json").read_text())["fingerprint"]
    assert f"data.sources.prose: {old}, now {new}" in refusal(stopped)


def test_a_run_that_ends_before_its_checkpoint_is_refused(stopped):
    assert "stands at step 16, but the run ends at training.max_steps, 10 steps" in refusal(
        stopped, "training.max_steps=10"
    )


def test_two_processes_do_not_write_one_run(stopped):
    from shards.files import lock_folder

    lock = lock_folder(stopped.run)
    assert "another process is writing here" in refusal(stopped)
    lock.close()
    goes_on(stopped)


# Allowed


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.batch_size=2", "training.gradient_accumulation_steps=4"],
        slow(["training.batch_size=8", "training.gradient_accumulation_steps=1", "data.num_workers=0"]),
        ["parallel.strategy=fsdp", "data.num_workers=3", "data.prefetch_factor=5", "training.world_size=1"],
        slow(["experiment.name=renamed", "experiment.tags=[new]", "checkpointing.save_total_limit=1"]),
        slow(["model.overrides.gradient_checkpointing=true", "model.overrides.use_flash_attention=false"]),
    ],
    ids=lambda overrides: overrides[0] if overrides else "nothing",
)
def test_layout_and_names_may_change(stopped, whole, overrides):
    """And the curve stays the same; in another folder, too, which this is."""
    goes_on(stopped, *overrides)
    assert losses(stopped.run)[:STOPPED] == losses(whole.run)[:STOPPED]
    assert losses(stopped.run) == pytest.approx(losses(whole.run), rel=1e-5)
    if not overrides:
        assert rows(stopped.run) == rows(whole.run)
        assert results(stopped.run) == results(whole.run)


def test_logging_and_learning_rate_may_change(stopped, whole):
    output = goes_on(
        stopped,
        *("training.learning_rate=1e-3", "training.lr_scheduler=linear", "training.grad_clip=0.5"),
        *("logging.log_steps=3", "logging.eval_steps=null", "checkpointing.save_steps=5", "training.max_steps=26"),
    )
    assert "changed since the last start: training.learning_rate: 0.003, now 0.001" in output
    found, before = rows(stopped.run), rows(whole.run)
    cut = next(index for index, row in enumerate(before) if row["step"] > STOPPED)
    assert found[:cut] == before[:cut]
    assert [row["step"] for row in found[cut:]] == [18, 21, 24, 26, 26]
    assert found[cut]["lr"] == pytest.approx(1e-3 * (1 - 0.9 * (18 - 2) / (26 - 2)))
    resolved = yaml.safe_load((stopped.run / "config.yaml").read_text())
    assert resolved["training"]["learning_rate"] == 1e-3


def test_the_future_of_the_mixture_may_change(stopped, whole):
    """Other weights, and a new source that enters, from a point that no sample has passed."""
    tokenizer = train_tokenizer([*texts()["code"], *texts()["prose"]])
    write_tokens(stopped.folder / "late", tokenizer, texts()["prose"][::-1][:100])
    mixture = stopped.mixture
    mixture["sources"].insert(1, {"name": "late", "path": str(stopped.folder / "late")})
    mixture["phases"] = [{"from": 128 * SEQ_LEN, "weights": {"late": 1, "code": 1}}]
    write_mixture(stopped, mixture)
    goes_on(stopped)
    state = json.loads((step_folder(stopped.run, STEPS) / "state.json").read_text())
    before = json.loads((step_folder(whole.run, STOPPED) / "state.json").read_text())
    assert state["position"]["late"]["draws"] == 32
    assert state["position"]["code"]["draws"] == before["position"]["code"]["draws"] + 32
    assert state["position"]["prose"]["draws"] == before["position"]["prose"]["draws"]
    assert losses(stopped.run)[STOPPED:] != losses(whole.run)[STOPPED:]


def test_data_may_move(stopped, whole):
    shutil.copytree(whole.data, stopped.folder / "moved")
    for source in stopped.mixture["sources"]:
        source["path"] = str(stopped.folder / "moved" / source["name"])
    write_mixture(stopped, stopped.mixture)
    goes_on(stopped)
    assert rows(stopped.run) == rows(whole.run)


# resume_from_checkpoint


def test_a_finished_run_is_left_as_it_is(whole):
    before = snapshot(whole.run / "checkpoints"), rows(whole.run), results(whole.run)
    status, output = train_here(whole.run.parent / "experiment.yaml")
    assert status == 0
    assert "done: the run ends at training.max_steps" in output
    assert (snapshot(whole.run / "checkpoints"), rows(whole.run), results(whole.run)) == before


def test_auto_is_the_newest(stopped, whole):
    goes_on(stopped, "checkpointing.resume_from_checkpoint=auto")
    assert rows(stopped.run) == rows(whole.run)


def test_never_starts_anew_and_keeps_what_was_there(stopped, whole):
    status, output = train_here(stopped.config, "checkpointing.resume_from_checkpoint=never", "training.max_steps=5")
    assert status == 0, output
    assert [row["step"] for row in rows(stopped.run)] == [0, 1, 2, 3, 4, 5, 5]
    kept = stopped.run / "checkpoints" / "superseded-1"
    assert {path.name for path in kept.iterdir()} == {"step-00000008", "step-00000016", "metrics.jsonl"}
    checkpoint_tensors(kept / "step-00000016")
    status, _ = train_here(stopped.config, "checkpointing.resume_from_checkpoint=never", "training.max_steps=5")
    assert status == 0
    assert (stopped.run / "checkpoints" / "superseded-2" / "step-00000005").exists()


def test_a_path_starts_a_branch_that_goes_on_from_itself(stopped, whole, tmp_path):
    path = step_folder(whole.run, 8)
    from_path = f"checkpointing.resume_from_checkpoint={path}"
    branch = f"checkpointing.output_dir={tmp_path / 'branch'}"
    status, output = train_here(stopped.config, from_path, branch, "training.max_steps=12")
    assert status == 0, output
    assert f"resuming from {path} at step 8" in output
    status, output = train_here(stopped.config, from_path, branch)  # the same command: its own newest checkpoint
    assert status == 0, output
    assert f"resuming from {step_folder(tmp_path / 'branch', 12)} at step 12" in output
    assert [row["step"] for row in rows(tmp_path / "branch") if "loss" in row] == list(range(9, STEPS + 1))


def test_a_path_in_the_folder_rolls_back(stopped, whole):
    status, output = train_here(stopped.config, f"checkpointing.resume_from_checkpoint={step_folder(stopped.run, 8)}")
    assert status == 0, output
    assert rows(stopped.run) == rows(whole.run)
    assert results(stopped.run) == results(whole.run)
    assert (stopped.run / "checkpoints" / "superseded-1" / "step-00000016").exists()


def test_a_path_to_the_last_step_has_nothing_to_do(stopped, whole, tmp_path):
    path = step_folder(whole.run, STEPS)
    options = [f"checkpointing.resume_from_checkpoint={path}", f"checkpointing.output_dir={tmp_path / 'new'}"]
    status, output = train_here(stopped.config, *options)
    assert status == 0, output
    assert results(tmp_path / "new")["weights_sha256"] == results(whole.run)["weights_sha256"]


def test_a_path_without_a_checkpoint_is_refused(stopped):
    override = f"checkpointing.resume_from_checkpoint={stopped.folder}"
    assert f"{stopped.folder}: no checkpoint here (state.json is missing)" in refusal(stopped, override)


# Damage


def damage_truncate(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1000])


def damage_missing(checkpoint: Path) -> None:
    next(checkpoint.glob("*.distcp")).unlink()


def damage_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"nothing")


def damage_no_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def damage_one_byte(checkpoint: Path) -> None:
    """Sizes do not tell: the hash does."""
    path = next(checkpoint.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [slow(damage_truncate), damage_missing, damage_metadata, slow(damage_no_metadata), damage_one_byte]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(stopped, whole, damage):
    checkpoint = step_folder(stopped.run, STOPPED)
    damage(checkpoint)
    status, output = train_here(stopped.config)
    assert status == 0, output
    assert f"note: {checkpoint} is passed over: " in output
    assert "step-00000008 at step 8" in output
    assert rows(stopped.run) == rows(whole.run)
    assert results(stopped.run) == results(whole.run)
    assert (stopped.run / "checkpoints" / "superseded-1" / checkpoint.name).exists()


def test_where_all_are_damaged_nothing_starts_anew(stopped):
    for step in (8, STOPPED):
        damage_missing(step_folder(stopped.run, step))
    message = refusal(stopped)
    assert "no checkpoint here can be gone on from (step-00000016: __0_0.distcp is missing)" in message
    assert "resume_from_checkpoint=never" in message


def test_a_checkpoint_of_old_loads(stopped, whole):
    """Its state says nothing of files; the optimiser had no guard."""
    path = step_folder(stopped.run, STOPPED) / "state.json"
    state = json.loads(path.read_text())
    for name in ("rollbacks", "resumable", "finite", "files"):
        del state[name]
    path.write_text(json.dumps(state))
    goes_on(stopped)
    assert results(stopped.run) == results(whole.run)


def test_a_state_that_is_no_state_is_refused(stopped):
    path = step_folder(stopped.run, STOPPED) / "state.json"
    for content in ("{", "[]", '{"step": 16}', '{"steps": 3}'):
        path.write_text(content)
        assert f"{path}: not readable as a checkpoint's state" in refusal(stopped)


def test_a_full_disk_keeps_the_earlier_checkpoints(stopped, whole):
    """A limit on the size of files stands for the full disk."""
    before = {step: snapshot(step_folder(stopped.run, step)) for step in (8, 16)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = next(step_folder(stopped.run, 16).glob("*.distcp")).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        status, output = train_here(stopped.config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2, output
    assert "Traceback" not in output
    assert f"{step_folder(stopped.run, 24)}: the checkpoint could not be written" in output
    assert {step: snapshot(step_folder(stopped.run, step)) for step in (8, 16)} == before
    assert not list((stopped.run / "checkpoints").glob(".step-*"))  # what was written is given back
    goes_on(stopped)
    assert rows(stopped.run) == rows(whole.run)
    assert results(stopped.run) == results(whole.run)


def test_leftovers_of_a_killed_save_go(stopped):
    leftover = stopped.run / "checkpoints" / ".step-00000019.tmp"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    goes_on(stopped)
    assert not leftover.exists()
