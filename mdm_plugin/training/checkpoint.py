"""Checkpoints: a directory per step, which exists under its name only when it is whole."""

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
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
from mdm_plugin.training.manifest import sync, verify, write_manifest
from mdm_plugin.training.secrets import redacted
from mdm_plugin.training.weights import (
    Weights,
    Write,
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
    written under another name, a manifest of its files' sizes and SHA-256 last, synced to disk and
    renamed: a kill at any moment leaves the earlier checkpoints whole and no half one among them,
    and what was damaged later is noticed. Several nodes need a shared file system.

    Args:
        output_dir: where checkpoints go.
        checkpoint_dir: a directory with the safetensors files to start from: a Hugging Face
            checkpoint (LLaDA, Dream, Llama, Qwen), or one of ours; None for random weights.
        checkpoint_files: their names; None for those of its index, else model.safetensors, or
            where there is none, all.
        save_adapter_weights_only: of a model with adapters, leave out the merged weights.
        keep_last_n: older ones are removed; None keeps all, or with ``keep_best_n`` the newest.
        keep_best_n: of those that were validated, the ones of the lowest NELBO are kept too.
        asynchronous: training goes on while a checkpoint is written, from a copy in CPU memory: of
            each rank's part of the optimizer's state, and on rank 0 of all weights.

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
        keep_best_n: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        for name, value in (("keep_last_n", keep_last_n), ("keep_best_n", keep_best_n)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: use 1 or more, or null")
        self.output_dir = Path(output_dir).expanduser()
        self.save_adapter_weights_only = save_adapter_weights_only
        self.keep_last_n, self.keep_best_n = keep_last_n, keep_best_n
        self.asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(1) if asynchronous else None
        self._pending: tuple[int, Future[None]] | None = None
        self._group: Any = None
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

    def to_resume(self, resume_from_checkpoint: bool | str, world: World) -> Path | None:
        """The checkpoint that the config asks for: the newest whole one (True), the one named, or
        none. Called on every rank; rank 0 compares all files with their manifest.

        Raises:
            UserError: if it does not exist, is not a checkpoint, or is damaged.
        """
        found: list[Any] = [None, None]
        if world.rank == 0:
            try:
                found[0] = self._to_resume(resume_from_checkpoint)
            except UserError as error:
                found[1] = str(error)
        if world.size > 1:
            dist.broadcast_object_list(found, 0)
        if found[1]:
            raise UserError(found[1])
        return found[0]

    def _to_resume(self, resume_from_checkpoint: bool | str) -> Path | None:
        if resume_from_checkpoint is False:
            return None
        if resume_from_checkpoint is True:
            steps = self.steps()
            if not steps:
                raise UserError(
                    f"resume_from_checkpoint: {self.output_dir} holds no checkpoint to resume from"
                )
            for step in reversed(steps):
                try:
                    verify(step)
                except UserError as error:
                    print(f"{step.name} is damaged and left out: {error}", file=sys.stderr)
                else:
                    return step
            raise UserError(
                f"resume_from_checkpoint: no checkpoint in {self.output_dir} is whole: start anew, "
                "from weights that are"
            )
        directory = Path(resume_from_checkpoint).expanduser()
        if not (directory / "state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {directory} is not a checkpoint (step_N)")
        try:
            verify(directory)
        except UserError as error:
            raise UserError(f"resume_from_checkpoint: {directory} is damaged: {error}") from error
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
        """Write step_N, then remove what is not to be kept. Called on every rank.

        Raises:
            UserError: if it, or an asynchronous one before it, could not be written. The
                checkpoints before are whole.
        """
        self.wait(world)
        final = self.output_dir / f"step_{step}"
        staging = self.output_dir / f".staging_step_{step}"
        files = chain(
            self._model_files(model, world, staging, tokenizer),
            self._average_files(model, world, staging / AVERAGE, tokenizer, ema),
        )
        # torchao's optimizers keep the learning rate as a tensor, and so do their schedules.
        text = json.dumps({**state, "step": step}, indent=2, default=float)

        def write_rest() -> None:
            (staging / "state.json").write_text(text)
            OmegaConf.save(redacted(cfg), staging / "config.yaml")

        def begin() -> None:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

        def finish() -> None:
            write_manifest(staging)
            if final.exists():  # a resumed run comes by the same step again
                self._remove(final)
            staging.rename(final)
            sync(self.output_dir)
            for old in self._superfluous():
                self._remove(old)

        own = Attempts(world.rank == 0)
        own.call(begin)
        self._agree(world, step, own, staging)
        optimizer_state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        target: dict[str, Any] = {
            "checkpoint_id": staging / "optimizer",
            "no_dist": world.size == 1,
        }
        if self._thread is None:
            for write in files:
                own.call(write)
            own.call(write_rest)
            with _without_notice_of_one_process():
                own.call(lambda: dcp.save(optimizer_state, **target), everywhere=True)
            self._agree(world, step, own, staging)
            own.call(finish)
            self._agree(world, step, own, staging)
            return final
        if world.size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        later = [*files, write_rest]
        with _without_notice_of_one_process():
            saving = dcp.async_save(optimizer_state, process_group=self._group, **target)
        assert isinstance(saving, Future)

        def complete() -> None:
            for write in later:
                own.call(write)
            own.call(saving.result, everywhere=True)
            own.call(finish)
            if own.error:
                raise own.error

        self._pending = step, self._thread.submit(complete)
        return final

    def wait(self, world: World) -> None:
        """Wait for an asynchronous checkpoint to be whole. Called on every rank.

        Raises:
            UserError: if it could not be written.
        """
        if self._pending is None:
            return
        (step, done), self._pending = self._pending, None
        own = Attempts(True)
        own.call(done.result)
        self._agree(world, step, own, self.output_dir / f".staging_step_{step}")

    @staticmethod
    def _agree(world: World, step: int, own: "Attempts", staging: Path) -> None:
        """Stop on all ranks if one has failed."""
        failed = world.sum(torch.tensor(float(own.error is not None)))
        if not failed:
            return
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        reason = "another rank failed" if own.error is None else _reason(own.error)
        raise UserError(
            f"output_dir: step_{step} could not be saved: {reason}: the checkpoints before it are "
            "whole; make room, and go on with resume_from_checkpoint=True"
        ) from own.error

    def _superfluous(self) -> list[Path]:
        """The checkpoints that neither ``keep_last_n`` nor ``keep_best_n`` keeps."""
        steps = self.steps()
        if self.keep_last_n is None and self.keep_best_n is None:
            return []
        kept = set(steps[-(self.keep_last_n or 1) :])
        if self.keep_best_n:
            values = ((self.load_state(step).get("val_nelbo"), step) for step in steps)
            validated = sorted((value, step) for value, step in values if value is not None)
            kept |= {step for _, step in validated[: self.keep_best_n]}
        return [step for step in steps if step not in kept]

    def _average_files(
        self,
        model: nn.Module,
        world: World,
        directory: Path,
        tokenizer: ChatTokenizer,
        ema: EMA | None,
    ) -> Iterator[Write]:
        if ema is not None:
            with ema.applied():
                yield from self._model_files(model, world, directory, tokenizer)

    def _model_files(
        self, model: nn.Module, world: World, directory: Path, tokenizer: ChatTokenizer
    ) -> Iterator[Write]:
        adapters = adapter_names(model)
        if adapters:
            yield from save_adapters(model, world, directory, self.weights)
        if not (adapters and self.save_adapter_weights_only):
            yield from save_weights(model, world, directory, self.weights, self.asynchronous)
        carried = self.weights is not None and self.weights.naming is not None
        if world.rank == 0 and (tokenizer.mask_token_added or not carried):
            yield partial(tokenizer.save, directory)
        if world.rank == 0 and tokenizer.mask_token_added and carried:
            yield partial(set_config, directory, mask_token_id=tokenizer.mask_id)

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

    def load_rest(
        self,
        world: World,
        checkpoint: Path,
        state: Mapping[str, Any],
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        ema: EMA | None,
        timesteps: Any,
    ) -> None:
        """Fill all but the weights, as ``checkpoint`` and its ``state`` have it. On every rank.

        Raises:
            UserError: if it holds no average, and there is an ``ema``.
        """
        self.load_optimizer(world, checkpoint, model, optimizer)
        if scheduler:
            self.load_schedule(scheduler, state["lr_scheduler"])
        if ema:
            self.load_average(model, checkpoint, ema)
        if state["timesteps"] and hasattr(timesteps, "load_state_dict"):
            timesteps.load_state_dict(state["timesteps"])

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


class Attempts:
    """Calls until the first that fails; its error is kept, for ranks to agree before they stop.

    Without it, one rank would stop, and the others wait for it in their next collective.
    """

    def __init__(self, here: bool) -> None:
        self.here = here
        self.error: BaseException | None = None

    def call(self, function: Callable[[], Any], everywhere: bool = False) -> None:
        """Call on this rank if it is the one to, or on all; not after an error of its own."""
        # What all ranks do together is done after an error too: the others wait for it.
        if everywhere or (self.here and self.error is None):
            try:
                function()
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                self.error = self.error or error


def _reason(error: BaseException) -> str:
    """The system's word for it if there is one, with the file; else the first line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return f"{seen.strerror} ({seen.filename})" if seen.filename else seen.strerror
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
