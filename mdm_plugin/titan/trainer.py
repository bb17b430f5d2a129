"""torchtitan's Trainer for masked diffusion: what it refuses, and what it does besides."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer

from mdm_plugin.checkpoint.files import read_json
from mdm_plugin.checkpoint.parts import as_json, check_parts, check_states, kind
from mdm_plugin.contract import ProbePlan
from mdm_plugin.density import uniform_density
from mdm_plugin.distributed.world import World, end_groups_at_exit
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation import BoundEstimator
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.models.naming import BLOCK_LENGTH
from mdm_plugin.titan.data import MaskedLoader, at_length, open_rows, read_sampler
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.training.hidden import row_norms, token_norms
from mdm_plugin.training.probe import fit, fit_line, probe, probe_due, write_fit
from mdm_plugin.training.step import learn, row_losses, wants_norms


class Denoiser(nn.Module):
    """torchtitan's model called as an ``MDMTransformer`` is, at the length that training has."""

    def __init__(self, model: nn.Module, loss: MaskedLoss, length: int) -> None:
        super().__init__()
        self.model, self.loss, self.length = model, loss, length

    @property
    def tok_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_submodule("tok_embeddings")

    def forward(self, tokens: Tensor, *, mask: Any, positions: Tensor, head: Any, **_: Any) -> Any:
        """As ``MDMTransformer.forward`` with ``positions`` and ``head``."""
        tokens, place, positions = at_length(tokens, mask, positions, self.length)
        hidden = self.model(tokens, positions=place)
        return head(self.loss.head(), self.loss.picked(hidden, positions))


class MaskedValidator(BaseValidator):
    """The NELBO of a data set, by the recipe's estimator."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        dataset: str = "mdm_plugin.data.chat_dataset"
        dataset_path: str | None = None
        """Rows to validate on, as the loader's."""
        draws: int = 8
        """Forwards per row."""

    def __init__(self, config: Config, **given: Any) -> None:
        super().__init__(config)
        self.loss, self.length = given["loss_fn"], given["seq_len"]
        self.metrics, path = given["metrics_processor"], given["tokenizer"].tokenizer_path
        chat = ChatTokenizer(path, max_seq_len=self.length)
        self.rows = open_rows("validator", config, chat)
        ranks, rank = given["dp_world_size"], given["dp_rank"]
        group = given["parallel_dims"].get_mesh("batch").get_group() if ranks > 1 else None
        device = torch.device(device_type)
        self.estimator = BoundEstimator(
            chat,
            World(rank, ranks, device, None, group),
            given["local_batch_size"],
            config.draws,
            chunk_size=self.loss.mdm.chunk_size,
        )

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log val/nelbo_nats_per_token; called on every rank."""
        model = Denoiser(model_parts[0], self.loss, self.length)
        nats = self.estimator.nelbo(model, self.rows).nats
        self.metrics.logger.log({"val/nelbo_nats_per_token": nats}, step)
        logger.info(f"step {step}: val/nelbo_nats_per_token {nats:.4f}")


class MDMTrainer(Trainer):
    """Trainer whose loader draws t and masks, whose loss is ours, and which fits P-POTS."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        dataloader: MaskedLoader.Config = field(default_factory=MaskedLoader.Config)
        loss: MaskedLoss.Config = field(default_factory=MaskedLoss.Config)
        validator: MaskedValidator.Config = field(default_factory=MaskedValidator.Config)

        def __post_init__(self) -> None:
            if reason := refusal(self):
                raise ValueError(reason)
            Trainer.Config.__post_init__(self)

    dataloader: MaskedLoader
    loss_fn: MaskedLoss

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        end_groups_at_exit()
        dims, loader = self.parallel_dims, self.dataloader
        group = dims.get_mesh("batch").get_group() if dims.dp_enabled else None
        self.world = World(loader.rank, loader.ranks, self.device, None, group, averages=False)
        micro_batches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        loader.begin(self.loss_fn, self.world, micro_batches, config.training.steps)
        check_states({"dataloader.timesteps": loader.timesteps})
        model: Any = self.model_config
        size = self.loss_fn.vocab_size = model.vocab_size
        self.loss_fn.shift = model.shift
        if dims.tp_enabled:
            self.loss_fn.tensor_parallel = dims.get_mesh("tp").get_group()
        if (mask := loader.tokenizer.mask_id) >= size:
            raise UserError(
                f"hf_assets_path: the mask token is {mask}; the model has {size} tokens"
            )

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """torchtitan's, with our targets in the place of its labels."""
        targets = input_dict.pop("targets")
        inputs, labels, more = super().post_dataloading_process(input_dict, labels)
        return inputs, targets, more

    def train_step(self, data_iterator: Any) -> None:
        """torchtitan's, after a probe where one is due, and before what the sampler learns."""
        loader, loss, step = self.dataloader, self.loss_fn, self.step - 1
        loader.aim(step)
        if plan := probe_due(loader.estimator, step):
            self.fit_timesteps(plan, step)
        loss.kept = [] if loader.timesteps.learns else None
        if wants_norms(loader.timesteps):
            with token_norms(self.model_parts[0]) as norms:
                super().train_step(data_iterator)
            shown = [
                (x.t, row_norms(x, norm, loss.normalizer))
                for x, norm in zip(loader.drawn, norms, strict=True)
            ]
        else:
            super().train_step(data_iterator)
            shown = [
                (x.t, row_losses(x, ce))
                for x, ce in zip(loader.drawn, loss.kept or [], strict=loss.kept is not None)
            ]
        learn(loader.timesteps, shown, self.world)
        if self.metrics_processor.should_log(self.step):
            self.metrics_processor.logger.log(loader.figures(), self.step)

    def fit_timesteps(self, plan: ProbePlan, step: int) -> None:
        """Probe the model, and have the sampler of t take that in."""
        loader = self.dataloader
        measured = probe(
            Denoiser(self.model_parts[0], self.loss_fn, loader.length),
            loader.estimator,
            plan,
            loader.batches,
            self.world,
            step,
            norm=lambda model: dist_utils.clip_grad_norm_(list(model.parameters()), math.inf),
        )
        report = fit(loader.estimator, plan, measured, self.world)
        if torch.distributed.get_rank() == 0:
            write_fit(report, Path(self.config.dump_folder) / f"timesteps_step_{step}.json")
        logger.info(f"step {step}: {fit_line(report)}")

    def state_dict(self) -> dict[str, Any]:
        sampler = self.dataloader.timesteps
        state = {"kind": kind(sampler), "state": as_json("dataloader.timesteps", sampler)}
        state["objective"], state["steps"] = self.config.dataloader.objective, self.dataloader.steps
        return {**super().state_dict(), "timesteps": json.dumps(state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        stored, sampler = json.loads(state_dict["timesteps"]), self.dataloader.timesteps
        name, place = "dataloader.timesteps", Path(self.config.dump_folder)
        check_parts({name: sampler}, {name: stored}, place, "name another --dump_folder")
        sampler.load_state_dict(stored["state"])
        loader = self.dataloader
        if (then := stored["objective"]) != self.config.dataloader.objective:
            raise UserError(f"dataloader.objective: {place} was trained with {then}: restore it")
        moves = loader.objective(0.0) is not loader.objective(1.0)
        if moves and stored["steps"] != loader.steps:
            raise UserError(
                f"training.steps: {place} was to have {stored['steps']}, by which the objective "
                f"moves, and the config has {loader.steps}: restore it"
            )


def refusal(config: Any) -> str | None:
    """Why a config cannot be trained, in a line; None where it can."""
    if reason := in_blocks(Path(config.hf_assets_path) / "config.json"):
        return reason
    parallel = config.parallelism
    pipelined = parallel.pipeline_parallel_degree > 1
    if parallel.context_parallel_degree > 1:
        return (
            "parallelism.context_parallel_degree: targets are places in whole sequences, and "
            "torchtitan's balancing takes attention for causal: use tensor parallelism"
        )
    if parallel.expert_parallel_degree > 1:
        return "parallelism.expert_parallel_degree: the models here have no experts"
    if parallel.spmd_backend != "partial_dtensor":
        return (
            f"parallelism.spmd_backend: {parallel.spmd_backend} needs a newer FSDP2 than torch "
            "2.13's: use partial_dtensor"
        )
    if not config.training.disable_cuda_graphs:
        return "training.disable_cuda_graphs: shapes change with the masks of each step: set it"
    if pipelined and config.validator.enable:
        return "validator.enable: no rank of a pipeline has the whole model, to validate it"
    if pipelined:
        sampler = read_sampler(config.dataloader)
        if sampler.probe_plan(uniform_density()) or sampler.learns:
            return (
                "dataloader.timesteps: no rank of a pipeline has the whole model to probe, nor the "
                "losses to learn from: use a sampler that needs neither"
            )
    return None


def in_blocks(file: Path) -> str | None:
    """Why a checkpoint whose config.json this is cannot be trained here; None where it can."""
    stated = read_json(file) if file.is_file() else {}
    for key in BLOCK_LENGTH:
        if key in stated:
            return (
                f"hf_assets_path: {file} says {key} {stated[key]}: the model writes block by "
                "block, and torchtitan's rows have no clean copies beside them: use "
                "mdm_full_finetune"
            )
    return None
