"""The experiment file: sections and field names, their defaults, and `key=value` overrides.

Every field is checked; an unknown one is an error that names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, model_validator

from shards.errors import UserError
from shards.settings import Settings, load_yaml, parse_yaml, validate


class ExperimentSection(Settings):
    """Who the run is."""

    name: str = Field(min_length=1)
    description: str = ""
    tags: tuple[str, ...] = Field((), strict=False)  # a YAML list
    seed: int = 42
    stage: Literal["pretrain", "midtrain"] = "pretrain"  # which entry file of train/ runs it


class ModelSection(Settings):
    """The model: a file (`config_path`) or its fields inline (`config`), with `overrides` on top.

    With `from_pretrained` training starts from the weights of a Hugging Face folder, a run folder (its newest
    checkpoint) or one checkpoint of a run; its model description is the model file where no other is given.
    """

    type: str | None = None  # family or model_type, to be sure that the file is of it; None: whatever it is
    config_path: str | None = None
    config: dict[str, Any] | None = None
    from_scratch: bool | None = None
    from_pretrained: str | None = None
    pad_vocab_multiple: int | None = Field(None, ge=1)  # round vocab_size up to a multiple of this: faster on GPUs
    overrides: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.config_path is not None and self.config is not None:
            raise ValueError("give either config_path (a model file) or config (its fields), not both")
        if self.config_path is None and self.config is None and self.from_pretrained is None:
            raise ValueError("give config_path (a model file), config (its fields) or from_pretrained (a folder)")
        if self.from_scratch is False and self.from_pretrained is None:
            raise ValueError("from_scratch: false needs weights to start from: from_pretrained, a Hugging Face folder")
        if self.from_scratch and self.from_pretrained is not None:
            raise ValueError("from_scratch: true and from_pretrained contradict each other")
        return self


class DataSection(Settings):
    """The mixture: a file (`config_path`) or its fields inline (`config`), and how windows are served."""

    config_path: str | None = None
    config: dict[str, Any] | None = None
    max_seq_length: int | None = Field(None, ge=1)  # tokens; None: the model's max_position_embeddings
    document_mask: bool = False
    num_workers: int = Field(1, ge=0)  # threads that prepare batches; 0: none
    prefetch_factor: int = Field(2, ge=1)  # steps that each keeps ready
    pin_memory: bool = True  # on GPUs; without effect on CPUs

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.config_path is None) == (self.config is None):
            raise ValueError("give either config_path (a mixture file) or config (its fields)")
        return self


class TrainingConfig(Settings):
    """The optimisation. A step is one update over batch_size * gradient_accumulation_steps * world_size windows."""

    model_config = ConfigDict(allow_inf_nan=False)

    batch_size: int = Field(ge=1)  # windows per rank and micro-batch
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)  # None: the mixture's total_tokens decides
    optimizer: Literal["adamw", "muon"] = "adamw"
    optimizer_state_dtype: Literal["fp32", "bf16"] = "fp32"
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, ge=0)  # largest gradient norm; 0: no limit
    skip_sigma: float | None = Field(6.0, gt=0)  # skip a step whose norm is so many deviations high; None: never
    max_skips: int | None = Field(10, ge=1)  # of the last 100 steps; as many roll the run back; None: never
    lr_scheduler: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=1)  # of wsd; None: a tenth of the run
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "full", "selective"] | None = None  # None: as the model file says
    compile: bool = True
    deterministic: bool = False
    use_ddp: bool = True
    world_size: int | None = Field(None, ge=1)  # data ranks that the global batch is for; None: of the first start
    backend: Literal["nccl", "gloo"] | None = None  # None: nccl on GPUs, gloo on CPUs
    hang_timeout: float = Field(60.0, gt=0)  # seconds within which a silent rank is reported, with its stacks

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, not {list(self.betas)}")
        if self.decay_steps is not None and self.lr_scheduler != "wsd":
            raise ValueError(f"decay_steps belongs to lr_scheduler wsd, not {self.lr_scheduler}")
        if self.optimizer_state_dtype == "bf16" and self.betas[1] > 0.99:
            raise ValueError("optimizer_state_dtype bf16 rounds changes of the second moment away at betas[1] > 0.99")
        return self

    def wsd_decay_steps(self, total_steps: int) -> int:
        """Steps over which the wsd schedule falls."""
        return self.decay_steps or max(1, total_steps // 10)


class ParallelSection(Settings):
    """How ranks share the work: dp_replicate x dp_shard x tp x pp ranks.

    `ddp`: each data rank holds the model; `fsdp`: each holds a slice of it; `hsdp`: groups of `dp_shard` ranks hold
    slices, `dp_replicate` groups the same. Sizes that are not given follow from the number of ranks.
    """

    strategy: Literal["ddp", "fsdp", "hsdp"]
    dp_replicate: int | None = Field(None, ge=1)
    dp_shard: int | None = Field(None, ge=1)
    tp: int = Field(1, ge=1)  # ranks that share every matrix and every sequence
    pp: int = Field(1, ge=1)  # stages of a pipeline over the layers


class CheckpointingSection(Settings):
    """Where the run folder is, and what is kept in it."""

    output_dir: str
    save_steps: int = Field(1000, ge=1)
    save_optimizer_every: int | None = Field(None, ge=1)  # steps; between them only weights are saved; None: always
    async_save: bool = True  # write while training goes on
    save_total_limit: int | None = Field(5, ge=1)  # None: keep all
    resume_from_checkpoint: str | None = None  # null or auto: the newest here; a path; never: start a new run


class LoggingSection(Settings):
    """What is written while the run goes on."""

    peak_tflops: float | None = Field(None, gt=0)  # of one device, for the MFU; None: from a table of GPUs
    log_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(500, ge=1)  # None: only before the first and after the last step
    use_wandb: bool = False
    wandb_mode: Literal["online", "offline"] = "online"
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_run_name: str | None = None
    use_tensorboard: bool = False
    tensorboard_dir: str | None = None  # None: OUTPUT_DIR/tensorboard


class ProfileSection(Settings):
    """A profile of some steps: a Chrome trace and a memory snapshot in `logs/profile/`."""

    steps: tuple[int, int] = Field(strict=False)  # first and last

    @model_validator(mode="after")
    def _in_order(self) -> ProfileSection:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps are the first and the last step to profile, not {list(self.steps)}")
        return self


class EvaluationDataset(Settings):
    """A token dataset to validate on."""

    name: str
    path: str


class EvaluationSection(Settings):
    """Validation. Without datasets it runs on the `val/` part of every source that has one."""

    datasets: tuple[EvaluationDataset, ...] = Field((), strict=False)
    metrics: tuple[Literal["loss", "perplexity", "bpb"], ...] = Field(("loss", "bpb"), strict=False)
    max_tokens: int = Field(2**20, ge=1)  # of each dataset, evenly spread over it

    @model_validator(mode="after")
    def _unique_names(self) -> EvaluationSection:
        names = [dataset.name for dataset in self.datasets]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two datasets are called '{repeated.pop()}'; a name must be unique")
        return self


class ExperimentConfig(Settings):
    """One file that defines a run."""

    experiment: ExperimentSection
    model: ModelSection
    data: DataSection
    training: TrainingConfig
    checkpointing: CheckpointingSection
    logging: LoggingSection = Field(default_factory=lambda: LoggingSection.model_validate({}))
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection.model_validate({}))
    parallel: ParallelSection | None = None
    profile: ProfileSection | None = None

    @model_validator(mode="after")
    def _check_saving(self) -> ExperimentConfig:
        if self.training.max_skips is not None and max(self.training.max_skips, self.logging.log_steps) > 100:
            raise ValueError(
                "training.max_skips counts among the last 100 steps, at each row of the log: it and logging.log_steps "
                "are at most 100, or training.max_skips is null"
            )
        every, steps = self.checkpointing.save_optimizer_every, self.checkpointing.save_steps
        if every is not None and every % steps:
            raise ValueError(f"checkpointing.save_optimizer_every {every} is no multiple of save_steps {steps}")
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> ExperimentConfig:
        if self.experiment.stage == "midtrain" and self.model.from_pretrained is None:
            raise ValueError(
                "experiment.stage midtrain starts from trained weights: give model.from_pretrained (a run folder, one "
                "of its checkpoints or a Hugging Face folder)"
            )
        return self

    @property
    def strategy(self) -> Literal["ddp", "fsdp", "hsdp"]:
        """`parallel.strategy`, or else what `training.use_ddp` says."""
        if self.parallel is not None:
            return self.parallel.strategy
        return "ddp" if self.training.use_ddp else "fsdp"

    def to_yaml(self) -> str:
        """The resolved file, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file and apply `section.field=value` overrides, whose values are YAML.

    Raises:
        UserError: the file is missing, a key is unknown, a value has the wrong type, an override is malformed.
    """
    data = load_yaml(path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"'{override}': an override is written section.field=value, as in training.max_steps=100")
        *parents, name = key.removeprefix("--").split(".")
        section = data
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"'{override}': {parent} is a value, not a section")
        section[name] = parse_yaml(value, f"'{override}'")
    return validate(ExperimentConfig, data, str(path))
