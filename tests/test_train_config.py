"""Experiment files: every field, every mistake."""

from __future__ import annotations

import re

import pytest
import yaml
from training_runs import ROOT, write_experiment

from shards.errors import UserError
from train.config import ExperimentConfig, load_experiment
from train.prepare import load_data_config, load_model_config

EXP001 = ROOT / "configs/experiments/active/exp001_llama7b_pretrain.yaml"
MIXTURE = {"sources": [{"name": "web", "path": "data/web", "weight": 1}]}


def test_the_original_experiment_loads_field_for_field(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_experiment(EXP001)
    loaded = config.model_dump(mode="json")
    content = yaml.safe_load(EXP001.read_text())
    assert content.keys() == {
        *("experiment", "model", "data", "training", "parallel", "checkpointing", "logging", "evaluation"),
    }
    for section, fields in content.items():
        for name, value in fields.items():
            assert loaded[section][name] == value, f"{section}.{name}"
    assert config.training.max_steps == 500_000
    assert config.training.learning_rate == 3e-4
    assert config.training.betas == (0.9, 0.95)
    assert config.evaluation.metrics == ("perplexity", "loss")
    assert config.strategy == "fsdp"  # from parallel

    model = load_model_config(config)
    assert (model.use_flash_attention, model.gradient_checkpointing) == (True, True)  # the overrides
    assert model.num_hidden_layers == 32
    mixture = load_data_config(config)
    assert mixture.total_tokens == 2_000_000_000_000
    assert {source.name: source.weight for source in mixture.sources}["starcoder"] == 0.1066


def test_the_resolved_file_loads_to_the_same(tmp_path):
    config = load_experiment(EXP001, ["parallel.strategy=fsdp"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_experiment(tmp_path / "config.yaml") == config
    resolved = yaml.safe_load(config.to_yaml())
    assert resolved["training"]["compile"] is True  # defaults are written out
    assert resolved["data"]["max_seq_length"] is None


def test_overrides_are_yaml_and_win(tmp_path):
    path = write_experiment(tmp_path, MIXTURE)
    config = load_experiment(
        path,
        [
            "training.learning_rate=1e-4",
            "--training.max_steps=2_000",
            "training.betas=[0.8, 0.9]",
            "experiment.tags=[a, b]",
            "checkpointing.resume_from_checkpoint=never",
            "logging.eval_steps=null",
            "parallel.strategy=fsdp",
            "model.overrides.hidden_size=64",
            "data.config.seed=5",
            "data.config_path=null",
            f"data.config.sources={MIXTURE['sources']}",
            "evaluation.datasets=[{name: v, path: data/v}]",
        ],
    )
    assert config.training.learning_rate == 1e-4
    assert config.training.max_steps == 2000
    assert config.training.betas == (0.8, 0.9)
    assert config.experiment.tags == ("a", "b")
    assert config.checkpointing.resume_from_checkpoint == "never"
    assert config.logging.eval_steps is None
    assert config.strategy == "fsdp"  # wins over use_ddp
    assert load_model_config(config).hidden_size == 64
    assert load_data_config(config).seed == 5
    assert config.evaluation.datasets[0].path == "data/v"


def test_use_ddp_gives_the_default_strategy(tmp_path):
    path = write_experiment(tmp_path, MIXTURE)
    assert load_experiment(path, ["training.use_ddp=false"]).strategy == "fsdp"
    assert load_experiment(path, ["training.use_ddp=false", "parallel.strategy=ddp"]).strategy == "ddp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learing_rate=1", "training.learing_rate: unknown key 'learing_rate'; did you mean 'learning_rate'?"),
        ("trainin.batch_size=1", "trainin: unknown key 'trainin'; did you mean 'training'?"),
        ("data.documentmask=true", "data.documentmask: unknown key 'documentmask'; did you mean 'document_mask'?"),
        ("paralel.strategy=ddp", "paralel: unknown key 'paralel'; did you mean 'parallel'?"),
        (
            "evaluation.datasets=[{nam: a, path: b}]",
            "evaluation.datasets.0.nam: unknown key 'nam'; did you mean 'name'?",
        ),
        ("training.batch_size=many", "training.batch_size: Input should be a valid integer"),
        ("training.batch_size=0", "training.batch_size: Input should be greater than or equal to 1 (given: 0)"),
        ("training.learning_rate=-1e-4", "training.learning_rate: Input should be greater than 0 (given: -0.0001)"),
        ("training.learning_rate=.nan", "training.learning_rate: Input should be a finite number (given: nan)"),
        ("training.learning_rate=.inf", "training.learning_rate: Input should be a finite number"),
        ("training.max_steps=1.5", "training.max_steps: Input should be a valid integer"),
        ("training.betas=[0.9]", "training.betas.1: required, but not given"),
        ("training.betas=[0.9, 1.0]", "betas must be at least 0 and below 1, not [0.9, 1.0]"),
        (
            "training.lr_scheduler=cosin",
            "training.lr_scheduler: Input should be 'cosine', 'wsd', 'linear' or 'constant'",
        ),
        ("training.optimizer=sgd", "training.optimizer: Input should be 'adamw' or 'muon' (given: 'sgd')"),
        ("logging.log_steps=500", "it and logging.log_steps are at most 100, or training.max_skips is null"),
        ("training.max_skips=101", "it and logging.log_steps are at most 100, or training.max_skips is null"),
        ("checkpointing.save_optimizer_every=35", "save_optimizer_every 35 is no multiple of save_steps"),
        ("profile.steps=[3, 2]", "steps are the first and the last step to profile, not [3, 2]"),
        ("training.mixed_precision=fp16", "training.mixed_precision: Input should be 'bf16' or 'fp32' (given: 'fp16')"),
        ("training.decay_steps=5", "decay_steps belongs to lr_scheduler wsd, not cosine"),
        ("training.min_lr_ratio=2", "training.min_lr_ratio: Input should be less than or equal to 1 (given: 2)"),
        ("parallel.strategy=zero", "parallel.strategy: Input should be 'ddp', 'fsdp' or 'hsdp' (given: 'zero')"),
        ("experiment.name=", "experiment.name: Input should be a valid string"),
        ("experiment.stage=sft", "experiment.stage: Input should be 'pretrain' or 'midtrain' (given: 'sft')"),
        ("model.from_scratch=false", "from_scratch: false needs weights to start from"),
        ("model.config_path=null", "give config_path (a model file), config (its fields) or from_pretrained"),
        ("model.config={}", "give either config_path (a model file) or config (its fields), not both"),
        ("model={from_pretrained: x, from_scratch: true}", "from_scratch: true and from_pretrained contradict"),
        ("data.config={}", "give either config_path (a mixture file) or config (its fields)"),
        ("checkpointing.output_dir=null", "checkpointing.output_dir: Input should be a valid string"),
        (
            "checkpointing.save_total_limit=0",
            "checkpointing.save_total_limit: Input should be greater than or equal to 1",
        ),
        ("evaluation.metrics=[loss, accuracy]", "evaluation.metrics.1: Input should be 'loss', 'perplexity' or 'bpb'"),
        (
            "evaluation.datasets=[{name: a, path: b}, {name: a, path: c}]",
            "evaluation: two datasets are called 'a'; a name must be unique",
        ),
        ("training", "'training': an override is written section.field=value"),
        ("=5", "'=5': an override is written section.field=value"),
        ("training.batch_size.deep=1", "'training.batch_size.deep=1': batch_size is a value, not a section"),
        ("training.betas=[0.9", "'training.betas=[0.9': not valid YAML"),
    ],
)
def test_mistakes(tmp_path, override, message):
    path = write_experiment(tmp_path, MIXTURE)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_experiment(path, [override])
    if not str(caught.value).startswith("'"):
        assert str(path) in str(caught.value)


def test_all_problems_in_one_message(tmp_path):
    path = write_experiment(tmp_path, MIXTURE)
    with pytest.raises(UserError) as caught:
        load_experiment(path, ["training.batch_size=x", "logging.log_step=1", "checkpointing={}"])
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert "checkpointing.output_dir: required, but not given" in message
    assert "did you mean 'log_steps'?" in message


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_experiment(tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    for content, message in (
        ("a: [", "broken.yaml: not valid YAML"),
        ("- a", "expected a mapping (key: value) at the top level, found list"),
        ("training: {batch_size: 1}\ntraining: {batch_size: 2}", "duplicate key 'training'"),
        ("training: 5", "training: Input should be a valid dictionary"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=re.escape(message)):
            load_experiment(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_experiment(path)


def test_model_type_must_be_that_of_the_file(tmp_path):
    config = load_experiment(write_experiment(tmp_path, MIXTURE), ["model.type=qwen"])
    with pytest.raises(UserError, match=r"model\.type is qwen, but .*model\.yaml describes model_type llama"):
        load_model_config(config)
    inline = {"type": "lama", "config_path": None, "config": {"vocab_size": 5}}
    config = load_experiment(write_experiment(tmp_path, MIXTURE, model=inline))
    with pytest.raises(UserError, match=r"model\.config: unknown model_type 'lama'; did you mean 'llama'\?"):
        load_model_config(config)


def test_sections_that_are_not_given_have_their_defaults(tmp_path):
    path = tmp_path / "short.yaml"
    content = yaml.safe_load(write_experiment(tmp_path, MIXTURE).read_text())
    for section in ("logging", "evaluation"):
        del content[section]
    content["parallel"] = None
    path.write_text(yaml.safe_dump(content))
    config = load_experiment(path)
    assert isinstance(config, ExperimentConfig)
    assert config.logging.log_steps == 10
    assert config.evaluation.datasets == ()
    assert config.strategy == "ddp"
