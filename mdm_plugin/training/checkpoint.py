"""Checkpoints: a directory per step, which exists under its name only when it is whole."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.training.distributed import World, adapter_names, initialize_parameters
from mdm_plugin.training.ema import EMA
from mdm_plugin.training.weights import (
    Weights,
    load_adapters,
    save_adapters,
    save_weights,
    set_config,
)

_STEP = re.compile(r"step_(\d+)")
AVERAGE = "ema"


class Checkpointer:
    """Writes ``output_dir/step_N`` and reads it back.

    step_N holds the weights (model.safetensors and the tokenizer; if they came from a Hugging Face
    checkpoint, that checkpoint's files, names, configuration and tokenizer), optimizer/
    (torch.distributed.checkpoint, sharded), state.json (step, schedule, data place, seed) and
    config.yaml (resolved). A model with adapters is written as PEFT's adapter_model.safetensors
    and adapter_config.json, and merged besides; an average of the weights goes to ema/. A step is
    written under another name, synced to disk and renamed: a kill at any moment leaves the
    earlier checkpoints whole and no half one among them. Several nodes need a shared file system.

    Args:
        output_dir: where checkpoints go.
        checkpoint_dir: a directory with the safetensors files to start from: a Hugging Face
            checkpoint (LLaDA, Dream, Llama, Qwen), or one of ours; None for random weights.
        checkpoint_files: their names; None for those of its index, else model.safetensors, or
            where there is none, all.
        save_adapter_weights_only: of a model with adapters, leave out the merged weights.
        keep_last_n: older checkpoints are removed; None keeps all.

    Raises:
        UserError: if the directory or a file does not exist, or cannot be read as weights.
        ValueError: if ``keep_last_n`` is less than 1.
    """

    def __init__(
        self,
        output_dir: str,
        checkpoint_dir: str | None = None,
        checkpoint_files: list[str] | None = None,
        save_adapter_weights_only: bool = False,
        keep_last_n: int | None = None,
    ) -> None:
        if keep_last_n is not None and keep_last_n < 1:
            raise ValueError(f"keep_last_n is {keep_last_n}: use 1 or more, or null for all")
        self.output_dir = Path(output_dir).expanduser()
        self.save_adapter_weights_only = save_adapter_weights_only
        self.keep_last_n = keep_last_n
        self.weights: Weights | None = None
        if checkpoint_dir is not None:
            names = list(checkpoint_files) if checkpoint_files else None
            self.weights = Weights(Path(checkpoint_dir).expanduser(), names)

    def steps(self) -> list[Path]:
        """The whole checkpoints, oldest step first."""
        if not self.output_dir.is_dir():
            return []
        found = ((_STEP.fullmatch(d.name), d) for d in self.output_dir.iterdir() if d.is_dir())
        return [d for _, d in sorted((int(m[1]), d) for m, d in found if m)]

    def to_resume(self, resume_from_checkpoint: bool | str) -> Path | None:
        """The checkpoint that the config asks for: the newest (True), the one named, or none.

        Raises:
            UserError: if it does not exist or is not a checkpoint.
        """
        if resume_from_checkpoint is False:
            return None
        if resume_from_checkpoint is True:
            steps = self.steps()
            if not steps:
                raise UserError(
                    f"resume_from_checkpoint: {self.output_dir} holds no checkpoint to resume from"
                )
            return steps[-1]
        directory = Path(resume_from_checkpoint).expanduser()
        if not (directory / "state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {directory} is not a checkpoint (step_N)")
        return directory

    def set_aside(self) -> Path | None:
        """Move an earlier run's checkpoints into a directory of their own, ``earlier_K``."""
        steps = self.steps()
        if not steps:
            return None
        number = 1
        while (aside := self.output_dir / f"earlier_{number}").exists():
            number += 1
        aside.mkdir()
        for step in steps:
            step.rename(aside / step.name)
        return aside

    def save(
        self,
        world: World,
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        state: Mapping[str, Any],
        cfg: DictConfig,
        tokenizer: ChatTokenizer,
        ema: EMA | None = None,
    ) -> Path:
        """Write step_N, then remove what ``keep_last_n`` leaves over. Called on every rank."""
        final = self.output_dir / f"step_{step}"
        staging = self.output_dir / f".staging_step_{step}"
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        _barrier(world)
        self._save_model(model, world, staging, tokenizer)
        if ema is not None:
            with ema.applied():
                self._save_model(model, world, staging / AVERAGE, tokenizer)
        if world.rank == 0:
            # torchao's optimizers keep the learning rate as a tensor, and so do their schedules.
            text = json.dumps({**state, "step": step}, indent=2, default=float)
            (staging / "state.json").write_text(text)
            OmegaConf.save(cfg, staging / "config.yaml")
        optimizer_state = get_optimizer_state_dict(model, optimizer)
        with _without_notice_of_one_process():
            dcp.save(
                {"optimizer": optimizer_state},
                checkpoint_id=staging / "optimizer",
                no_dist=world.size == 1,
            )
        _barrier(world)
        if world.rank == 0:
            for file in staging.rglob("*"):
                _sync(file)
            _sync(staging)
            if final.exists():  # a resumed run comes by the same step again
                self._remove(final)
            staging.rename(final)
            _sync(self.output_dir)
            for old in self.steps()[: -self.keep_last_n] if self.keep_last_n else []:
                self._remove(old)
        _barrier(world)
        return final

    def _save_model(
        self, model: nn.Module, world: World, directory: Path, tokenizer: ChatTokenizer
    ) -> None:
        adapters = adapter_names(model)
        if adapters:
            save_adapters(model, world, directory, self.weights)
        if not (adapters and self.save_adapter_weights_only):
            save_weights(model, world, directory, self.weights)
        carried = self.weights is not None and self.weights.naming is not None
        if world.rank == 0 and (tokenizer.mask_token_added or not carried):
            tokenizer.save(directory)
        if world.rank == 0 and tokenizer.mask_token_added and carried:
            set_config(directory, mask_token_id=tokenizer.mask_id)

    def load_weights(self, model: nn.Module, seed: int = 0, checkpoint: Path | None = None) -> None:
        """Fill the model's parameters: from ``checkpoint``, else from ``checkpoint_dir``.

        Adapters come from ``checkpoint`` over the weights of ``checkpoint_dir``. What neither
        holds is random, by ``seed``.

        Raises:
            UserError: if a file does not hold what the model needs.
        """
        adapters = adapter_names(model)
        if checkpoint and not adapters:
            Weights(checkpoint).load(model)
            return
        if self.weights:
            self.weights.load(model)
            initialize_parameters(model, seed, only=adapters)
        else:
            initialize_parameters(model, seed)
        if checkpoint:
            load_adapters(model, checkpoint, self.weights)

    def load_average(self, model: nn.Module, checkpoint: Path, ema: EMA) -> None:
        """Fill ``ema`` from ``checkpoint``.

        Raises:
            UserError: if it holds no average.
        """
        if not (checkpoint / AVERAGE).is_dir():
            raise UserError(
                f"ema: {checkpoint} was written without it: leave it out, or start a new run from "
                "its weights with checkpointer.checkpoint_dir"
            )
        with ema.applied():
            if adapter_names(model):
                load_adapters(model, checkpoint / AVERAGE, self.weights)
            else:
                Weights(checkpoint / AVERAGE).load(model)

    @staticmethod
    def load_state(checkpoint: Path) -> dict[str, Any]:
        """A checkpoint's state.json."""
        return json.loads((checkpoint / "state.json").read_text())

    @staticmethod
    def load_schedule(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
        """Fill a schedule's state; its learning rates become tensors again where they are."""
        stored = dict(state)
        for name, own in scheduler.state_dict().items():
            if isinstance(own, list) and any(isinstance(x, Tensor) for x in own):
                stored[name] = [torch.tensor(x) for x in state[name]]
        scheduler.load_state_dict(stored)

    @staticmethod
    def load_optimizer(
        world: World, checkpoint: Path, model: nn.Module, optimizer: Optimizer
    ) -> None:
        """Fill the optimizer's state, sharded as the model is now. Called on every rank."""
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        with _without_notice_of_one_process():
            dcp.load(state, checkpoint_id=checkpoint / "optimizer", no_dist=world.size == 1)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    def _remove(self, directory: Path) -> None:
        # Renamed first: a kill halfway leaves no half checkpoint under a checkpoint's name.
        doomed = self.output_dir / f".removed_{directory.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _without_notice_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
