"""torchtitan's data loader: our rows, with t and the masks drawn by the recipe's own functions."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from mdm_plugin.contract import TimestepSampler
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.titan.loss import MaskedLoss
from mdm_plugin.training.corruption import corrupted_step
from mdm_plugin.training.estimators import as_estimator, as_objective, check_estimator, derived
from mdm_plugin.training.step import global_normalizer


def component(spec: str, key: str, *positional: Any, **more: Any) -> Any:
    """What a config names: ``dotted.path`` or ``dotted.path={"argument": value}``, as torchtitan's
    overrides do; ``key`` is the config's.

    Raises:
        UserError: if there is no such component, or it does not take the arguments.
    """
    path, _, arguments = spec.partition("=")
    module, _, name = path.strip().rpartition(".")
    try:
        given = json.loads(arguments) if arguments.strip() else {}
        return getattr(importlib.import_module(module), name)(*positional, **given, **more)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{key}: {spec}: {str(error).splitlines()[0]}") from error


def read_sampler(config: Any) -> TimestepSampler:
    """The sampler of t that a loader's config names.

    Raises:
        UserError: if there is none, or it is no ``TimestepSampler``.
    """
    key = "dataloader.timesteps"
    return derived(key, component(config.timesteps, key), TimestepSampler)


def open_rows(part: str, config: Any, tokenizer: ChatTokenizer) -> Rows:
    """The rows that ``config.dataset`` reads from ``config.dataset_path``; ``part`` for messages.

    Raises:
        UserError: if there is no path, or the rows are not right.
    """
    if not config.dataset_path:
        raise UserError(f"{part}.dataset_path: missing: name a file or data set of rows")
    return component(config.dataset, f"{part}.dataset", tokenizer, source=config.dataset_path)


class MaskedLoader(BaseDataLoader):
    """Micro-batches with their masks drawn. A row's noise depends on (seed, step, its place in the
    global batch) alone; the state is the number of the next step: a run goes on exactly, on any
    number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset: str = "mdm_plugin.data.chat_dataset"
        """Dotted path of what reads rows, with arguments: path={"column": "text"}."""
        timesteps: str = "mdm_plugin.timesteps.Stratified"
        """The sampler of t, likewise."""
        masking: str = "mdm_plugin.masking.FixedCount"
        """The sampler of masks, likewise."""
        objective: str = "mdm_plugin.objectives.ELBO"
        """Which t are to count how much, likewise."""
        train_eos_padding: bool = True
        """LLaDA: EOS fills the rows of a global batch and is learnt; else filling is ignored."""
        shuffle: bool = True
        seed: int = 0
        """Of the order and of all noise."""

    def __init__(self, config: Config, **given: Any) -> None:
        self.config, self.length, self.step = config, given["seq_len"], 0
        self.ranks, self.rank = given["dp_world_size"], given["dp_rank"]
        self.batch_size = given["local_batch_size"]
        self.timesteps = read_sampler(config)
        self.masking = component(config.masking, "dataloader.masking")
        key = "dataloader.objective"
        self.objective = as_objective(component(config.objective, key), key)
        path = given["tokenizer"].tokenizer_path
        self.tokenizer = ChatTokenizer(path, max_seq_len=self.length)
        self.rows = open_rows("dataloader", config, self.tokenizer)

    def begin(self, loss: MaskedLoss, world: World, accumulation: int, steps: int) -> None:
        """What the trainer knows, before the first batch: the loss, the ranks, how many
        micro-batches each of them has in a step, and how many steps there are.

        Raises:
            UserError: if the parts of the estimator do not go together.
        """
        self.loss, self.world, self.steps = loss, world, steps
        self.estimator = as_estimator(
            self.timesteps, self.masking, loss.mdm, self.tokenizer.mask_id, "dataloader."
        )
        self.aim(self.step)
        check_estimator(self.estimator, causal=False, where="dataloader.")
        self.batches = GlobalBatches(
            self.rows,
            Split(self.batch_size, self.ranks, self.rank, accumulation),
            Padding(
                self.tokenizer.pad_id,
                self.tokenizer.eos_id if self.config.train_eos_padding else None,
                max_len=self.length,
            ),
            seed=self.config.seed,
            shuffle=self.config.shuffle,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """input and positions [B, L], and targets [M, 4] for ``MaskedLoss``, which gets the step's
        normaliser too; and labels [B, L], which torchtitan counts."""
        while True:
            step, self.step = self.step, self.step + 1
            self.aim(step)
            self.drawn = corrupted_step(self.batches, step, self.estimator)
            self.loss.normalizer = global_normalizer(self.drawn, self.world)
            for batch in self.drawn:
                targets = batch.targets
                tokens, positions, places = at_length(
                    batch.noisy, batch.attend, targets.positions, self.length
                )
                labels = torch.full((tokens.numel(),), IGNORE_INDEX)
                labels[places] = targets.labels
                columns = (places, targets.labels, targets.rows, targets.weights)
                packed = torch.stack([x.double() for x in columns], 1)
                inputs = {"input": tokens, "positions": positions, "targets": packed}
                yield inputs, labels.view_as(tokens)

    def aim(self, step: int) -> None:
        """Have the estimator estimate what is minimised at ``step``."""
        w = self.objective(min(1.0, step / max(1, self.steps - 1)))
        self.estimator = self.estimator._replace(w=w)

    def figures(self) -> dict[str, float]:
        """Of the step last drawn, over all ranks; called on every rank."""
        weights = torch.cat([x.importance for x in self.drawn])
        masked = sum(len(x.targets.labels) for x in self.drawn)
        eligible = sum(x.views * x.eligible for x in self.drawn)
        sums = torch.tensor([masked, eligible, float(weights.sum()), len(weights)])
        masked_all, eligible_all, weight, rows = self.world.sum(sums).tolist()
        return {
            "train/importance_weight_mean": weight / rows,
            "train/importance_weight_max": float(self.world.max(weights.max())),
            "train/masked_fraction": masked_all / eligible_all,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


def at_length(
    tokens: Tensor, attend: Tensor | None, places: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch [B, L] filled up: tokens and positions [B, length], and new places.

    attend: [B, 1, L], bool, false at padding; places: [M], of the flattened [B · L]. Positions
    begin anew where a row's padding does: it is a document of its own.
    """
    count, short = tokens.shape
    real = tokens.new_ones(count, short, dtype=torch.bool) if attend is None else attend[:, 0]
    real = F.pad(real, (0, length - short))
    column = torch.arange(length, device=tokens.device).expand(count, -1)
    positions = torch.where(real, column, column - real.sum(1, keepdim=True))
    places = places // short * length + places % short
    return F.pad(tokens, (0, length - short)), positions, places
