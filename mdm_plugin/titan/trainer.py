"""torchtitan's Trainer for masked diffusion: what it refuses, and what it does besides."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from mdm_plugin.errors import UserError
from mdm_plugin.evaluation import nelbo
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.titan.data import MaskedLoader, at_length, read_rows
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.training.distributed import World
from mdm_plugin.training.probe import fit, probe, probe_due, write_fit


class Denoiser(nn.Module):
    """torchtitan's model called as an ``MDMTransformer`` is, at the length that training has."""

    def __init__(self, model: nn.Module, loss: MaskedLoss, length: int) -> None:
        super().__init__()
        self.model, self.loss, self.length = model, loss, length

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
        self.rows = read_rows("validator", config, chat)
        ranks = given["dp_world_size"]
        self.arguments = {
            "mask_id": chat.mask_id,
            "pad_id": chat.pad_id,
            "batch_size": given["local_batch_size"],
            "draws": config.draws,
            "shift": self.loss.mdm.shift,
            "chunk_size": self.loss.mdm.chunk_size,
            "rank": given["dp_rank"],
            "ranks": ranks,
            "group": given["parallel_dims"].get_mesh("batch").get_group() if ranks > 1 else None,
        }

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log val/nelbo_nats_per_token; called on every rank."""
        model = Denoiser(model_parts[0], self.loss, self.length)
        device = next(model.parameters()).device
        nats = nelbo(model, self.rows, device=device, **self.arguments).nats
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
        dims, loader = self.parallel_dims, self.dataloader
        group = dims.get_mesh("batch").get_group() if dims.dp_enabled else None
        self.world = World(loader.rank, loader.ranks, self.device, None, group, averages=False)
        micro_batches = self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches
        loader.begin(self.loss_fn, self.world, micro_batches)
        self.loss_fn.vocab_size = size = cast(Any, self.model_config).vocab_size
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
        """torchtitan's, after a probe where one is due."""
        if probe_due(self.dataloader.timesteps, self.step - 1):
            self.fit_timesteps(self.step - 1)
        super().train_step(data_iterator)
        if self.metrics_processor.should_log(self.step):
            masked, eligible = self.world.sum(self.dataloader.masked).tolist()
            figures = {
                "train/importance_weight_mean": float(self.dataloader.importance.mean()),
                "train/importance_weight_max": float(self.dataloader.importance.max()),
                "train/masked_fraction": masked / eligible,
            }
            self.metrics_processor.logger.log(figures, self.step)

    def fit_timesteps(self, step: int) -> None:
        """P-POTS: probe the model, and fit the density of t to what it shows."""
        loader = self.dataloader
        parts = (loader.loss.mdm, loader.timesteps, loader.masking, loader.batches)
        measured = probe(
            Denoiser(self.model_parts[0], self.loss_fn, loader.length),
            *parts,
            loader.tokenizer.mask_id,
            self.world,
            step,
            norm=lambda model: dist_utils.clip_grad_norm_(list(model.parameters()), math.inf),
        )
        report = fit(loader.timesteps, measured, self.world)
        if torch.distributed.get_rank() == 0:
            write_fit(report, Path(self.config.dump_folder) / f"timesteps_step_{step}.json")
        logger.info(
            f"step {step}: fitted the density of t to {measured.forwards} forwards, "
            f"KL {report['kl']:.4f} (uniform {report['kl_uniform']:.4f})"
        )

    def state_dict(self) -> dict[str, Any]:
        timesteps: dict[str, Any] = getattr(self.dataloader.timesteps, "state_dict", dict)()
        return {**super().state_dict(), "timesteps": json.dumps(timesteps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if hasattr(self.dataloader.timesteps, "load_state_dict"):
            self.dataloader.timesteps.load_state_dict(json.loads(state_dict["timesteps"]))


def refusal(config: Any) -> str | None:
    """Why a config cannot be trained, in a line; None where it can."""
    parallel, probes = config.parallelism, "ParetoOptimal" in config.dataloader.timesteps
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
    if pipelined and (config.validator.enable or probes):
        key = "validator.enable" if config.validator.enable else "dataloader.timesteps"
        return f"{key}: no rank of a pipeline has the whole model, to probe or validate it"
    return None
