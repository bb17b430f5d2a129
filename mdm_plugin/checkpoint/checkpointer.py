"""Checkpoints: a directory per step, which exists under its name only when it is whole."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mdm_plugin.checkpoint.adapters import load_adapters, merge_adapters, save_adapters
from mdm_plugin.checkpoint.files import ADAPTER, Write
from mdm_plugin.checkpoint.parts import Run, check_parts
from mdm_plugin.checkpoint.saving import save_weights, set_config
from mdm_plugin.checkpoint.staging import (
    Attempts,
    Staging,
    load_optimizer,
    reason_of,
    remove,
    save_optimizer,
    without_notice_of_one_process,
)
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.parameters import adapter_names, initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer

_STEP = re.compile(r"step_(\d+)")
_ANEW = "start a new run from its weights with checkpointer.checkpoint_dir and another output_dir"


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
        adapter_checkpoint: a directory with adapters of these weights to start from, in PEFT's
            files, such as a step_N. A model with adapters takes them for its own, another one has
            them merged into its weights.
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
        adapter_checkpoint: str | None = None,
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
        self._pending: tuple[Staging, Future[None]] | None = None
        self._group: Any = None
        self.weights: Weights | None = None
        if checkpoint_dir is not None:
            names = list(checkpoint_files) if checkpoint_files else None
            self.weights = Weights(Path(checkpoint_dir).expanduser(), names)
        self.adapters = Path(adapter_checkpoint).expanduser() if adapter_checkpoint else None
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.adapters is None:
            return
        if not (self.adapters / ADAPTER).is_file():
            raise UserError(
                f"checkpointer.adapter_checkpoint: {self.adapters} has no {ADAPTER}: name a step_N "
                "of a run with adapters"
            )
        if self.weights is None:
            raise UserError(
                "checkpointer.adapter_checkpoint: given, and checkpoint_dir is not: name the "
                "weights that they belong to"
            )
        if (self.weights.directory / ADAPTER).is_file():
            raise UserError(
                f"checkpointer.checkpoint_dir: {self.weights.directory} holds weights with "
                "adapters merged already: name the base's directory, or no adapter_checkpoint"
            )

    def source_files(self) -> list[Path]:
        """The files of ``checkpoint_dir`` and ``adapter_checkpoint`` that fill a model."""
        files = sorted(set(self.weights.where.values())) if self.weights else []
        return [*files, *([self.adapters / ADAPTER] if self.adapters else [])]

    def steps(self) -> list[Path]:
        """The whole checkpoints, oldest step first."""
        if not self.output_dir.is_dir():
            return []
        found = ((_STEP.fullmatch(d.name), d) for d in self.output_dir.iterdir() if d.is_dir())
        return [d for _, d in sorted((int(m[1]), d) for m, d in found if m)]

    def save(self, run: Run, step: int, facts: Mapping[str, Any]) -> Path:
        """Write step_N, then remove what is not to be kept. Called on every rank.

        Args:
            run: what to write.
            step: N.
            facts: numbers and texts that go to state.json besides.

        Raises:
            UserError: if it, or an asynchronous one before it, could not be written. The
                checkpoints before are whole.
        """
        self.wait(run.world)
        staging = Staging(self.output_dir, step)
        state = json.dumps({**facts, "step": step, "parts": run.state()}, indent=2)
        own = Attempts(run.world.rank == 0)
        own.call(staging.begin)
        self._agree(run.world, own, staging)
        write_state: Write = partial(staging.write_state, state, run.cfg)
        files = chain(
            self._model_files(run, staging.directory, {}),
            self._average_files(run, staging.directory),
            iter([write_state]),
        )
        if self._thread is None:
            self._save_now(run, own, staging, files)
        else:
            self._save_later(run, own, staging, list(files))
        return staging.final

    def _save_now(self, run: Run, own: Attempts, staging: Staging, files: Iterator[Write]) -> None:
        for write in files:
            own.call(write)
            del write  # it holds a file's tensors, and the next file's are gathered now
        with without_notice_of_one_process():
            own.call(partial(save_optimizer, run, staging), everywhere=True)
        self._agree(run.world, own, staging)
        own.call(partial(self._finish, staging))
        self._agree(run.world, own, staging)

    def _save_later(self, run: Run, own: Attempts, staging: Staging, files: list[Write]) -> None:
        """From copies in memory, by a thread; what it comes to is known to ``wait``."""
        if run.world.size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        with without_notice_of_one_process():
            saving = save_optimizer(run, staging, self._group, asynchronous=True)

        def complete() -> None:
            for write in files:
                own.call(write)
            own.call(saving.result, everywhere=True)
            own.call(partial(self._finish, staging))
            if own.error:
                raise own.error

        assert self._thread is not None
        self._pending = staging, self._thread.submit(complete)

    def _finish(self, staging: Staging) -> None:
        staging.finish()
        for old in self._superfluous(staging.final):
            remove(old)

    def wait(self, world: World) -> None:
        """Wait for an asynchronous checkpoint to be whole. Called on every rank.

        Raises:
            UserError: if it could not be written.
        """
        if self._pending is None:
            return
        (staging, done), self._pending = self._pending, None
        own = Attempts(True)
        own.call(done.result)
        self._agree(world, own, staging)

    @staticmethod
    def _agree(world: World, own: Attempts, staging: Staging) -> None:
        """Stop on all ranks if one has failed."""
        failed = world.sum(torch.tensor(float(own.error is not None)))
        if not failed:
            return
        if world.rank == 0:
            shutil.rmtree(staging.directory, ignore_errors=True)
        reason = "another rank failed" if own.error is None else reason_of(own.error)
        raise UserError(
            f"output_dir: {staging.final.name} could not be saved: {reason}: the checkpoints "
            "before it are whole; make room, and go on from there: resume_from_checkpoint=auto"
        ) from own.error

    def _superfluous(self, written: Path) -> list[Path]:
        """Of the checkpoints up to ``written``, those that neither ``keep_last_n`` nor
        ``keep_best_n`` keeps. Later ones are damaged: this run has gone back behind them."""
        steps = self.steps()
        steps = steps[: steps.index(written) + 1]
        if self.keep_last_n is None and self.keep_best_n is None:
            return []
        kept = set(steps[-(self.keep_last_n or 1) :])
        if self.keep_best_n:
            values = ((self.load_state(step).get("val_nelbo"), step) for step in steps)
            validated = sorted((value, step) for value, step in values if value is not None)
            kept |= {step for _, step in validated[: self.keep_best_n]}
        return [step for step in steps if step not in kept]

    def _average_files(self, run: Run, directory: Path) -> Iterator[Write]:
        for name, average in run.averages().items():
            yield from self._model_files(run, directory / name, average.weights())

    def _model_files(
        self, run: Run, directory: Path, instead: Mapping[str, Tensor]
    ) -> Iterator[Write]:
        """What writes the model, with the tensors of ``instead`` for the parameters they name."""
        world, model, tokenizer = run.world, run.model, run.tokenizer
        adapters = adapter_names(model)
        if adapters:
            yield from save_adapters(model, world, directory, self.weights, instead)
        if not (adapters and self.save_adapter_weights_only):
            yield from save_weights(
                model, world, directory, self.weights, self.asynchronous, instead
            )
        carried = self.weights is not None and self.weights.naming is not None
        if world.rank == 0 and (tokenizer.mask_token_added or not carried):
            yield partial(tokenizer.save, directory)
        if world.rank == 0 and tokenizer.mask_token_added and carried:
            yield partial(set_config, directory, mask_token_id=tokenizer.mask_id)

    def load_weights(
        self, model: MDMTransformer, seed: int = 0, checkpoint: Path | None = None
    ) -> None:
        """Fill the model's parameters: from ``checkpoint``, else from ``checkpoint_dir``.

        Adapters come from ``checkpoint``, else from ``adapter_checkpoint``, over the weights of
        ``checkpoint_dir``. What none of them holds is random, by ``seed``.

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
        if source := checkpoint or self.adapters:
            if adapters:
                load_adapters(model, source, self.weights)
            elif self.weights:
                merge_adapters(model, source, self.weights)

    @staticmethod
    def load_state(checkpoint: Path) -> dict[str, Any]:
        """A checkpoint's state.json.

        Raises:
            UserError: if it is another version's.
        """
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        if "parts" not in state:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was written by an earlier version: {_ANEW}"
            )
        return state

    def load(self, run: Run, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Fill all but the weights, as ``checkpoint`` and its ``state`` have it. On every rank.

        Raises:
            UserError: if it lacks a part, has one more, or one of another kind.
        """
        check_parts(run.parts, state["parts"], checkpoint, _ANEW)
        load_optimizer(run, checkpoint)
        run.load_state(state["parts"])
        for name, average in run.averages().items():
            if adapter_names(run.model):
                load_adapters(run.model, checkpoint / name, self.weights, average.weights())
            else:
                Weights(checkpoint / name).load(run.model, average.weights())
