"""From a checked experiment file to the parts of a run: the plan, the model, the sizes, and where to resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from shards.describe import summarize
from shards.errors import UserError
from shards.loader import WindowLoader
from shards.mixture import MixtureConfig, MixturePlan, load_mixture
from shards.settings import validate
from train.batches import DeviceLoader
from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.distributed import Ranks
from train.flops import flops_per_token
from train.hardware import multiplies_bf16, peak_flops
from train.layout import Layout, make_layout
from train.models import BaseModelConfig, BaseModelForCausalLM, ModelRegistry
from train.optim import Optimizer
from train.rollback import ROLLBACKS, with_rollbacks
from train.run_folder import RunFolder
from train.run_state import RunState, differences
from train.speed import Speed
from train.start_weights import load_start_weights, start_config, start_folder, start_tokenizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
        global_batch: windows per step, over all ranks.
        accumulation: micro-batches per step on each rank.
        world_size: data ranks that the global batch is meant for, not necessarily those present.
        parameters: of the whole model, whatever part of it this rank will have.
        flops_per_token, flops_per_token_full: of the whole model, see `train.flops`.
        ending: what ends the run, in words.
        checkpoint: the checkpoint to resume from.
    """

    config: ExperimentConfig
    layout: Layout
    plan: MixturePlan
    model: BaseModelForCausalLM
    global_batch: int
    accumulation: int
    world_size: int
    total_steps: int
    ending: str
    checkpoints: Checkpoints
    checkpoint: Path | None
    parameters: int
    flops_per_token: int
    flops_per_token_full: int

    @property
    def ranks(self) -> Ranks:
        """The ranks that are here."""
        return self.layout.ranks

    @property
    def fills(self) -> bool:
        """Whether the weights are drawn from the seed: no checkpoint and no pretrained model sets them."""
        return self.checkpoint is None and self.config.model.from_pretrained is None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share."""
        training = self.config.training
        optional: dict[str, Any] = {}
        if training.optimizer == "muon":
            optional["muon_momentum"] = training.muon_momentum
        if training.optimizer_state_dtype != "fp32":
            optional["optimizer_state_dtype"] = training.optimizer_state_dtype
        runtime = {"use_flash_attention", "gradient_checkpointing", "initializer_range"}
        runtime |= {"router_bias_update_rate", "aux_loss_alpha", "router_aux_loss_coef"}  # they may follow a schedule
        return {
            "experiment": {"seed": self.config.experiment.seed},
            "model": self.model.config.model_dump(mode="json", exclude=runtime),
            "training": {
                "optimizer": training.optimizer,
                "betas": list(training.betas),
                "eps": training.eps,
                "weight_decay": training.weight_decay,
                **optional,
                "global_batch": self.global_batch,
            },
            "data": {"document_mask": self.config.data.document_mask},
        }

    def state_at(
        self, step: int, next_sample: int, skipped_steps: int = 0, rollbacks: Sequence[dict[str, int]] = ()
    ) -> RunState:
        """The run's state after `step` updates."""
        resume_from = self.config.checkpointing.resume_from_checkpoint
        return RunState(
            step=step,
            next_sample=next_sample,
            plan=self.plan.fingerprint(next_sample),
            past=self.plan.past(next_sample),
            position=self.plan.position(next_sample),
            identity=self.identity(),
            world_size=self.world_size,
            skipped_steps=skipped_steps,
            rollbacks=list(rollbacks),
            origin=None if resume_from in (None, "auto", "never") else resume_from,
        )

    def resume(self, model: BaseModelForCausalLM, optimizer: Optimizer, run: RunFolder) -> RunState:
        """Load the checkpoint to resume from or the pretrained weights, if there are any, and say what the run will do.

        Raises:
            UserError: the checkpoint belongs to a different run, or is damaged.
        """
        state = self.state_at(0, 0)
        if self.checkpoint is not None:
            state = RunState.read(self.checkpoint)
            state.check_resumable(self.plan, self.identity(), self.checkpoint)
            if state.step > self.total_steps:
                raise UserError(
                    f"{self.checkpoint} stands at step {state.step:,}, but {self.ending}; raise that, or start anew"
                )
            self.checkpoints.load(self.checkpoint, model, optimizer)
            if self.past_steps(state):
                state = with_rollbacks(state, run.path)
        elif self.config.model.from_pretrained is not None:
            load_start_weights(model, self.config.model.from_pretrained, self.ranks.host_group)
        if not self.ranks.agree(state.step) or not self.ranks.agree(state.next_sample):
            raise UserError(
                f"{self.checkpoints.folder}: the ranks see different checkpoints; do they all share this file system?"
            )
        if self.ranks.is_first and (aside := self.checkpoints.set_aside(self.past_steps(state))):
            run.say(f"checkpoints that this run does not go on from, and a copy of the metrics, are now in {aside}")
        self._describe(run, state)
        if state.rollbacks or (run.path / ROLLBACKS).exists():
            run.write_json(ROLLBACKS, state.rollbacks)
        run.write_start(self.config, self.plan, self.parameters, self.global_batch, str(self.layout))
        return state

    def loader(self, state: RunState) -> DeviceLoader:
        """This rank's steps from a state on."""
        config, total = self.config, self.plan.total_samples
        left_out = sum(rollback["next_sample"] - rollback["first_sample"] for rollback in state.rollbacks)
        loader = WindowLoader(
            self.plan,
            batch_size=config.training.batch_size,
            accumulation=self.accumulation,
            rank=self.layout.data_rank,
            world_size=self.layout.data_size,
            next_sample=state.next_sample,
            stop_sample=None if total is None else total + left_out,
            document_mask=config.data.document_mask,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor,
            pin_memory=config.data.pin_memory and self.ranks.device.type == "cuda",
        )
        return DeviceLoader(loader, self.ranks.device)

    def speed(self, step: int) -> Speed:
        """A clock for the steps behind `step`."""
        peak = self.config.logging.peak_tflops
        return Speed(
            step,
            self.total_steps,
            self.global_batch * self.plan.seq_len,
            flops_per_token=self.flops_per_token,
            flops_per_token_full=self.flops_per_token_full,
            peak=peak_flops(self.ranks.device) if peak is None else peak * 1e12,
            devices=self.ranks.world_size,
            device=self.ranks.device,
        )

    def past_steps(self, state: RunState) -> int:
        """Steps that this folder has the past of: none where the checkpoint is another run's."""
        own = self.checkpoint is not None and self.checkpoint.resolve().parent == self.checkpoints.folder.resolve()
        return state.step if own else 0

    def _describe(self, run: RunFolder, state: RunState) -> None:
        config, tokens = self.config, self.global_batch * self.plan.seq_len
        run.say(
            f"{config.experiment.name}: {self.parameters:,} parameters, {self.ranks.world_size} rank(s) on "
            f"{self.ranks.device.type}, {self.layout}, "
            f"{config.training.mixed_precision}"
        )
        run.say(
            f"{self.ending}; a step is {self.global_batch} windows of {self.plan.seq_len:,} tokens = {tokens:,} tokens"
        )
        run.say(
            f"the ranks share a step as {self.layout.data_size} data rank(s) x {self.accumulation} micro-batch(es) "
            f"x {config.training.batch_size} windows"
        )
        if config.training.mixed_precision == "bf16" and not multiplies_bf16(self.ranks.device):
            run.say("note: this processor emulates bf16, slowly; training.mixed_precision=fp32 is faster on it")
        run.say(str(self.model.attention_kernel(self.ranks.device, documents=config.data.document_mask)))
        for warning in summarize(self.plan)["warnings"]:
            run.say(f"note: {warning}")
        if self.checkpoint is None:
            if config.model.from_pretrained is not None:
                run.say(f"starting from the weights in {start_folder(config.model.from_pretrained)}")
            return
        run.say(f"resuming from {self.checkpoint} at step {state.step}")
        if previous := run.previous_config():
            for line in differences(previous, config.model_dump(mode="json")):
                run.say(f"  changed since the last start: {line}")


def prepare(config: ExperimentConfig, ranks: Ranks) -> Setup:
    """Open everything that a run needs and check that it fits together; the model stays on the meta device.

    Raises:
        UserError: with the file and field that has to change.
    """
    layout = make_layout(config, ranks)
    model_config = load_model_config(config)
    with torch.device("meta"):
        model = ModelRegistry.create_model(model_config.model_type, model_config)
    checkpoints = Checkpoints(Path(config.checkpointing.output_dir), config.checkpointing, layout, partial(_say, ranks))
    checkpoint = checkpoints.find(config.checkpointing.resume_from_checkpoint)
    first_world_size = RunState.read(checkpoint).world_size if checkpoint else layout.data_size
    world_size = config.training.world_size or first_world_size
    global_batch, accumulation = share_batch(config, world_size, layout)

    mixture = load_data_config(config)
    seq_len = config.data.max_seq_length or model_config.max_position_embeddings
    if seq_len > model_config.max_position_embeddings:
        raise UserError(
            f"data.max_seq_length {seq_len:,} is more than the model's max_position_embeddings "
            f"{model_config.max_position_embeddings:,}"
        )
    if seq_len % layout.tp:
        raise UserError(f"data.max_seq_length {seq_len:,} has to be a multiple of parallel.tp {layout.tp}")
    max_steps = config.training.max_steps
    if max_steps is None and mixture.total_tokens is None:
        raise UserError("nothing says when the run ends: give training.max_steps, or total_tokens in the mixture")
    plan = MixturePlan.build(mixture, seq_len, total_samples=max_steps and max_steps * global_batch)
    _check_vocabulary(plan, model_config)
    if config.model.from_pretrained is not None and checkpoint is None:
        _check_tokenizer(plan, start_tokenizer(config.model.from_pretrained))
    total_steps, ending = run_length(max_steps, mixture, plan, global_batch)
    if config.training.warmup_steps >= total_steps:
        raise UserError(
            f"training.warmup_steps is {config.training.warmup_steps:,}, but {ending}: the learning rate would never "
            "reach its peak"
        )
    config = _resolve(config, model_config, mixture)
    return Setup(
        config,
        layout,
        plan,
        model,
        global_batch,
        accumulation,
        world_size,
        total_steps,
        ending,
        checkpoints,
        checkpoint,
        parameters=model.get_num_params(),
        flops_per_token=flops_per_token(model, seq_len),
        flops_per_token_full=flops_per_token(model, seq_len, full_attention=True),
    )


def _say(ranks: Ranks, message: str) -> None:
    """Until the run's folder is open."""
    if ranks.is_first:
        print(message, flush=True)


def load_model_config(config: ExperimentConfig) -> BaseModelConfig:
    """The model's configuration: the file or the inline fields, with the overrides on top."""
    section = config.model
    path = section.config_path or (section.from_pretrained if section.config is None else None)
    if section.config is not None:
        fields = {"model_type": section.type, **section.config, **section.overrides}
        model_config = ModelRegistry.parse_config(fields, "model.config")
    elif section.config_path is not None:
        model_config = ModelRegistry.load_config(section.config_path, section.overrides)
    else:
        model_config = start_config(str(section.from_pretrained), section.overrides)
    if multiple := section.pad_vocab_multiple:
        padded = -(-model_config.vocab_size // multiple) * multiple
        model_config = model_config.model_copy(update={"vocab_size": padded})
    found = model_config.model_type
    if section.type not in (None, found, ModelRegistry.family_of(found, "model")):
        ModelRegistry.family_of(str(section.type), "model.type")
        raise UserError(f"model.type is {section.type}, but {path or 'model.config'} describes model_type {found}")
    return model_config


def load_data_config(config: ExperimentConfig) -> MixtureConfig:
    """The mixture: the file or the inline fields."""
    if config.data.config_path is not None:
        return load_mixture(config.data.config_path)
    return validate(MixtureConfig, config.data.config, "data.config")


def _resolve(config: ExperimentConfig, model: BaseModelConfig, mixture: MixtureConfig) -> ExperimentConfig:
    """The same experiment with the fields of the files that it refers to in place, so that it stands alone."""
    fields = model.model_dump(mode="json")
    inlined = {"config_path": None, "config": fields, "overrides": {}, "pad_vocab_multiple": None}
    model_section = config.model.model_copy(update=inlined)
    mixture_fields = mixture.model_dump(mode="json", by_alias=True, exclude_none=True)
    data_section = config.data.model_copy(update={"config_path": None, "config": mixture_fields})
    return config.model_copy(update={"model": model_section, "data": data_section})


def share_batch(config: ExperimentConfig, world_size: int, layout: Layout) -> tuple[int, int]:
    """Global batch, and micro-batches per rank with the ranks that are here."""
    size, accumulation = config.training.batch_size, config.training.gradient_accumulation_steps
    global_batch, here = size * accumulation * world_size, layout.data_size
    if global_batch % (size * here):
        raise UserError(
            f"the global batch is {global_batch} windows (batch_size {size} x gradient_accumulation_steps "
            f"{accumulation} x world_size {world_size}), which {here} data rank(s) with batch_size {size} "
            f"cannot share evenly; start with a number of ranks that divides {global_batch // size}, or change "
            "training.batch_size"
        )
    if (micro_batches := global_batch // (size * here)) < layout.pp:
        raise UserError(
            f"a pipeline of {layout.pp} stages needs at least {layout.pp} micro-batches per step, and a rank has "
            f"{micro_batches}: raise training.gradient_accumulation_steps to a multiple of {layout.pp} or more"
        )
    return global_batch, micro_batches


def _check_vocabulary(plan: MixturePlan, model_config: BaseModelConfig) -> None:
    """Refuse data whose ids the model does not have, and a model with far more ids than the tokenizer."""
    data, model = plan.vocab_size, model_config.vocab_size
    path = plan.sources[0].dataset.path
    if model < data:
        raise UserError(
            f"the data ({path}) was tokenized with a vocabulary of {data:,} ids, but the model's vocab_size is "
            f"{model:,}; use the model's tokenizer, or set vocab_size to {data} (model.overrides.vocab_size={data})"
        )
    # Rounding up for speed and reserved ids stays within this (DeepSeek-V2: 100,015 ids, vocab_size 102,400).
    if model > data * 1.1 + 1024:
        raise UserError(
            f"the model's vocab_size is {model:,}, but the data ({path}) was tokenized with a vocabulary of only "
            f"{data:,} ids: this looks like another tokenizer; set model.overrides.vocab_size={data} if it is meant"
        )


def _check_tokenizer(plan: MixturePlan, path: Path) -> None:
    """Refuse data that was tokenized with another vocabulary than that of the pretrained model, where it is known."""
    if not path.exists():
        return
    dataset = plan.sources[0].dataset
    try:
        theirs = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # whatever the library raises
        raise UserError(f"{path}: not readable as a tokenizer: {error}") from error
    if theirs != Tokenizer.from_str(dataset.tokenizer_json().decode()).get_vocab():
        raise UserError(
            f"the data ({dataset.path}) was tokenized with other ids than the pretrained model has ({path}): tokenize "
            f"it with minigpt-prep tokenize --tokenizer {path}"
        )


def run_length(max_steps: int | None, mixture: MixtureConfig, plan: MixturePlan, global_batch: int) -> tuple[int, str]:
    """Steps of the run, and what ends it."""
    by_tokens = None
    if mixture.total_tokens is not None:
        by_tokens = mixture.total_tokens // plan.seq_len // global_batch
        if by_tokens == 0:
            raise UserError(
                f"mixture '{mixture.name}': total_tokens {mixture.total_tokens:,} is less than one step of "
                f"{global_batch * plan.seq_len:,} tokens"
            )
    if max_steps is not None and (by_tokens is None or max_steps <= by_tokens):
        return max_steps, f"the run ends at training.max_steps, {max_steps:,} steps"
    assert by_tokens is not None
    return by_tokens, f"the run ends at the mixture's total_tokens, {mixture.total_tokens:,} = {by_tokens:,} steps"
