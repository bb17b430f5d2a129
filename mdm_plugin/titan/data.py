"""torchtitan's tokenizer and data loader: our rows, with t and the masks drawn."""

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
from torchtitan.components.tokenizer import BaseTokenizer

from mdm_plugin.data import GlobalBatches, Rows
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.noise import keyed_generator
from mdm_plugin.titan.loss import packed
from mdm_plugin.training.distributed import World
from mdm_plugin.training.step import Corrupted, corrupt, global_normalizer


def component(spec: str, key: str, *positional: Any, **more: Any) -> Any:
    """What a config names: ``dotted.path`` or ``dotted.path={"argument": value}``.

    torchtitan's own way of naming overrides. ``key`` is the config's, for messages.

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


class MaskedTokenizer(BaseTokenizer):
    """``ChatTokenizer`` of a Hugging Face directory, as torchtitan asks for it."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()
        self.path = tokenizer_path
        self.chat = ChatTokenizer(tokenizer_path)
        self.eos_id = self.chat.eos_id

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return self.chat.encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.chat.decode(*args, **kwargs)

    def get_vocab_size(self) -> int:
        return self.chat.vocab_size


class MaskedLoader(BaseDataLoader):
    """Micro-batches with their masks drawn, by the recipe's own functions.

    A row's noise depends on (seed, step, its place in the global batch) alone; the state is the
    number of the next step, so that a run goes on exactly, on any number of ranks.

    ``begin`` has to be called before the first batch.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        dataset: str = "mdm_plugin.data.chat_dataset"
        """Dotted path of what reads rows, with arguments: path={"column": "text"}."""
        timesteps: str = "mdm_plugin.timesteps.Stratified"
        """The sampler of t, likewise."""
        masking: str = "mdm_plugin.masking.Bernoulli"
        """The sampler of masks, likewise."""
        train_eos_padding: bool = True
        """LLaDA: EOS fills the rows of a global batch and is learnt; else filling is ignored."""
        shuffle: bool = True
        seed: int = 0
        """Of the order and of all noise."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: MaskedTokenizer,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        if not config.dataset_path:
            raise UserError("dataloader.dataset_path: missing: name a file or data set of rows")
        self.config, self.seq_len, self.batch_size = config, seq_len, local_batch_size
        self.ranks, self.rank, self.step = dp_world_size, dp_rank, 0
        self.timesteps = component(config.timesteps, "dataloader.timesteps")
        self.masking = component(config.masking, "dataloader.masking")
        self.tokenizer = ChatTokenizer(tokenizer.path, max_seq_len=seq_len)
        self.rows: Rows = component(
            config.dataset, "dataloader.dataset", self.tokenizer, source=config.dataset_path
        )
        if hasattr(self.timesteps, "update"):
            raise UserError(
                f"dataloader.timesteps: {config.timesteps} learns from the losses of each step, "
                "which torchtitan's pipelines do not give back: use ParetoOptimal, or the recipe"
            )

    def begin(self, loss: MDMLoss, world: World, accumulation: int) -> None:
        """What the trainer knows: the loss, the ranks, and micro-batches per rank and step."""
        self.loss, self.world = loss, world
        self.batches = GlobalBatches(
            self.rows,
            batch_size=self.batch_size,
            ranks=self.ranks,
            rank=self.rank,
            accumulation=accumulation,
            seed=self.config.seed,
            shuffle=self.config.shuffle,
            pad_id=self.tokenizer.pad_id,
            eos_padding_id=self.tokenizer.eos_id if self.config.train_eos_padding else None,
            max_len=self.seq_len,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            step, self.step = self.step, self.step + 1
            key = (self.config.seed, "t", step)
            t, importance = self.timesteps(self.batches.size, keyed_generator(*key))
            parts = (self.masking, self.loss, self.tokenizer.mask_id)
            density = getattr(self.timesteps, "density", None)
            self.importance = importance
            drawn = [
                corrupt(batch, t, importance, *parts, density)
                for batch in self.batches.micro_batches(step)
            ]
            normalizer = global_normalizer(drawn, self.world).cpu()
            eligible = sum(x.eligible * len(x.row_weight) // len(x.t) for x in drawn)
            self.masked_fraction = sum(len(x.targets.labels) for x in drawn) / eligible
            for batch in drawn:
                yield self.laid_out(batch, normalizer)

    def laid_out(self, batch: Corrupted, normalizer: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A micro-batch at the fixed length, as torchtitan takes it.

        Returns:
            input and positions, [B, L], and targets, [M, 4], whose weights are divided by
            ``normalizer``; and labels [B, L], which torchtitan counts.
        """
        tokens, positions, places = at_length(
            batch.noisy, batch.attend, batch.targets.positions, self.seq_len
        )
        weights = batch.targets.weights / normalizer
        targets = batch.targets._replace(positions=places, weights=weights)
        labels = torch.full((tokens.numel(),), IGNORE_INDEX)
        labels[places] = targets.labels
        inputs = {"input": tokens, "positions": positions, "targets": packed(targets)}
        return inputs, labels.view_as(tokens)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]


def at_length(
    tokens: Tensor, attend: Tensor | None, places: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch [B, L] filled up: tokens and positions [B, length], and places in the new [B · length].

    attend: [B, 1, L], bool, false at padding; places: [M], of the flattened [B · L]. Positions begin
    anew where a row's padding does: it is a document of its own.
    """
    count, short = tokens.shape
    real = tokens.new_ones(count, short, dtype=torch.bool) if attend is None else attend[:, 0]
    real = F.pad(real, (0, length - short))
    column = torch.arange(length, device=tokens.device).expand(count, -1)
    positions = torch.where(real, column, column - real.sum(1, keepdim=True))
    places = places // short * length + places % short
    return F.pad(tokens, (0, length - short)), positions, places
