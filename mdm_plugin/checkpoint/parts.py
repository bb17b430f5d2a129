"""What a run's state is made of: things with ``state_dict`` and ``load_state_dict``."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer, MDMTransformer

OPTIMIZER, AVERAGE = "optimizer", "ema"


class Average(Stateful):
    """An average of the weights, which the model can be given for a time (``training.EMA``)."""

    def applied(self) -> AbstractContextManager[None]:
        """The model has the average for its weights in here; what is loaded then is the average."""
        raise NotImplementedError


class Run(NamedTuple):
    """What a checkpoint is of.

    world: the ranks.
    model, tokenizer: written for others to use: weights in Hugging Face's layout.
    cfg: written as config.yaml, its secrets left out.
    parts: name → what else has a state. ``optimizer`` is written by torch.distributed.checkpoint,
        each rank its part; an ``Average`` as weights, in a directory of its name; every other one's
        state is numbers and texts, and goes to state.json.
    """

    world: World
    model: MDMTransformer
    tokenizer: ChatTokenizer
    cfg: DictConfig
    parts: Mapping[str, Stateful]

    def averages(self) -> dict[str, Average]:
        """The parts that are averages of the weights."""
        return {name: x for name, x in self.parts.items() if isinstance(x, Average)}

    def state(self) -> dict[str, dict[str, Any]]:
        """Each part's kind, and its state where that is not written elsewhere."""
        found: dict[str, dict[str, Any]] = {}
        for name, part in self.parts.items():
            inner = name != OPTIMIZER and not isinstance(part, Average)
            found[name] = {"kind": kind(part), "state": part.state_dict() if inner else None}
        return found

    def load_state(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill the parts whose states are in ``stored``, which ``state`` gave."""
        for name, part in self.parts.items():
            if name in stored and (state := stored[name]["state"]):
                part.load_state_dict(state)


class OptimizerState(Stateful):
    """An optimizer's state by parameters' names, sharded as the model is now."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict)


class ScheduleState(Stateful):
    """A schedule's state. torchao's optimizers keep learning rates as tensors, and so do their
    schedules: they are written as numbers, and become tensors again."""

    def __init__(self, schedule: LRScheduler) -> None:
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = dict(state_dict)
        for name, own in self.schedule.state_dict().items():
            if isinstance(own, list) and any(isinstance(x, Tensor) for x in own):
                stored[name] = [torch.tensor(x) for x in state_dict[name]]
        self.schedule.load_state_dict(stored)


def kind(part: Stateful) -> str:
    """What a part is: the class of what it keeps the state of."""
    inner: object = part
    if isinstance(part, OptimizerState):
        inner = part.optimizer
    elif isinstance(part, ScheduleState):
        inner = part.schedule
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


def check_parts(
    parts: Mapping[str, Stateful], stored: Mapping[str, Mapping[str, Any]], checkpoint: Path
) -> None:
    """Check that a checkpoint has the state of just these parts.

    Parts without any state, in the checkpoint and now, may differ.

    Raises:
        UserError: naming the part that is missing, or of another kind.
    """
    now = {name: kind(part) for name, part in parts.items() if _has_state(name, part)}
    then = {name: str(x["kind"]) for name, x in stored.items() if x["state"] is None or x["state"]}
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise UserError(
                f"{name}: {checkpoint} was written with {_short(then.get(name))}, and the config "
                f"has {_short(now.get(name))}: restore it, or start a new run from its weights "
                "with checkpointer.checkpoint_dir"
            )


def check_states(parts: Mapping[str, Stateful]) -> None:
    """Check that what goes to state.json can: now, and not at the first checkpoint.

    Raises:
        UserError: naming the part whose state holds something else than numbers and texts.
    """
    for name, part in parts.items():
        if name == OPTIMIZER or isinstance(part, Average):
            continue
        try:
            json.dumps(part.state_dict(), default=float)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name}: the state_dict of {_short(kind(part))} goes to a JSON file: give "
                f"numbers, texts, lists and dicts ({error})"
            ) from error


def _has_state(name: str, part: Stateful) -> bool:
    return name == OPTIMIZER or isinstance(part, Average) or bool(part.state_dict())


def _short(kind: str | None) -> str:
    return "none" if kind is None else kind.rpartition(".")[2]
