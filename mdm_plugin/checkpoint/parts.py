"""What a run's state is made of: things with ``state_dict`` and ``load_state_dict``."""

import json
from collections.abc import Mapping
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
    """An average of the weights (``training.EMA``)."""

    def weights(self) -> Mapping[str, Tensor]:
        """The average of each trained parameter, by its name, sharded as it is."""
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
            state = None if _has_files(name, part) else as_json(name, part)
            found[name] = {"kind": kind(part), "state": state}
        return found

    def load_state(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill the parts whose states are in ``stored``, which ``state`` gave."""
        for name, part in self.parts.items():
            if name in stored and (state := stored[name]["state"]):
                try:
                    part.load_state_dict(state)
                except (ValueError, KeyError, TypeError, RuntimeError) as error:
                    raise UserError(
                        f"{name}: the checkpoint's state does not fit what the config gives: "
                        f"{error}: restore its arguments"
                    ) from error


class OptimizerState(Stateful):
    """An optimizer's state by parameters' names, sharded as the model is now."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer)
        for group in state["param_groups"]:
            group.pop("param_names", None)  # no state: "params" has the names already
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict)


class ScheduleState(Stateful):
    """A schedule's state. torchao's optimizers keep learning rates as tensors, and so do their
    schedules: they are written as numbers, and become tensors again.

    Args:
        schedule: of the learning rate.
        name: the config's component: schedules of many kinds are of one class.
    """

    def __init__(self, schedule: LRScheduler, name: str) -> None:
        self.schedule, self.name = schedule, name

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = dict(state_dict)
        for name, own in self.schedule.state_dict().items():
            if isinstance(own, list) and any(isinstance(x, Tensor) for x in own):
                stored[name] = [torch.tensor(x) for x in state_dict[name]]
        self.schedule.load_state_dict(stored)


def kind(part: Stateful) -> str:
    """What a part is: the class of what it keeps the state of, or the config's name of it."""
    if isinstance(part, ScheduleState):
        return part.name
    inner: object = part.optimizer if isinstance(part, OptimizerState) else part
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


def check_parts(
    parts: Mapping[str, Stateful],
    stored: Mapping[str, Mapping[str, Any]],
    checkpoint: Path,
    advice: str,
) -> None:
    """Check that a checkpoint has the state of just these parts.

    Parts without any state, in the checkpoint and now, may differ.

    Args:
        parts: name → what is to be filled.
        stored: what ``Run.state`` gave.
        checkpoint: for the message.
        advice: how to begin anew, for the message.

    Raises:
        UserError: naming the part that is missing, or of another kind.
    """
    now = {name: kind(part) for name, part in parts.items()}
    then = {name: x["kind"] for name, x in stored.items()}
    held = {name for name, part in parts.items() if _has_files(name, part) or part.state_dict()}
    held |= {name for name, x in stored.items() if x["state"] is None or x["state"]}
    for name in sorted(held):
        if now.get(name) != then.get(name):
            raise UserError(
                f"{name}: {checkpoint} was written with {_short(then.get(name))}, and the config "
                f"has {_short(now.get(name))}: restore it, or {advice}"
            )


def as_json(name: str, part: Stateful) -> Any:
    """A part's state as JSON; learning rates that are tensors become numbers.

    Raises:
        UserError: if it holds something else than numbers, texts, lists and dicts of names.
    """
    state = part.state_dict()
    try:
        found = json.loads(json.dumps(state, default=float))
    except (TypeError, ValueError) as error:
        raise UserError(_refusal(name, part, str(error))) from error
    if not isinstance(part, ScheduleState) and repr(found) != repr(state):
        raise UserError(_refusal(name, part, "it would come back as another"))
    return found


def _refusal(name: str, part: Stateful, reason: str) -> str:
    return (
        f"{name}: the state_dict of {_short(kind(part))} goes to a JSON file: give numbers, texts, "
        f"lists, and dicts with texts for keys ({reason})"
    )


def check_states(parts: Mapping[str, Stateful]) -> None:
    """Check that what goes to state.json can: now, and not at the first checkpoint.

    Raises:
        UserError: naming the part whose state holds something else than numbers and texts.
    """
    for name, part in parts.items():
        if not _has_files(name, part):
            as_json(name, part)


def _has_files(name: str, part: Stateful) -> bool:
    """Whether a part's state is in files of its own, and not in state.json."""
    return name == OPTIMIZER or isinstance(part, Average)


def _short(kind: str | None) -> str:
    return "none" if kind is None else kind.rpartition(".")[2]
