"""Rewards: functions of (completion, row), called so that none of them can end a run."""

import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from mdm_plugin.config.components import instantiate
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.reasoning import reasoning_gym_task

Function = Callable[[str, Mapping[str, Any]], float]


class Reward(NamedTuple):
    """A part of the reward: a function of (completion, row), and what it counts."""

    name: str
    weight: float
    function: Function


class Rewarded(NamedTuple):
    """The rewards of n completions.

    total: [n], fp64, the weighted sum; NaN where a part failed. parts: [n] of each, by name.
    failures: (number of the completion, line that says what happened).
    """

    total: Tensor
    parts: dict[str, Tensor]
    failures: list[tuple[int, str]]


def read_rewards(cfg: DictConfig) -> list[Reward]:
    """``cfg.rewards``: name → a component that gives a function, with its ``weight`` (1).

    Raises:
        UserError: if there is none, or one gives no function.
    """
    found = []
    for name in cfg.rewards:
        part = cfg.rewards[name]
        if not isinstance(part, DictConfig) or "_component_" not in part:
            raise UserError(f"rewards.{name}: give it a _component_, and a weight if that is not 1")
        given = DictConfig({name: {k: v for k, v in part.items() if k != "weight"}})
        function, weight = instantiate(given, str(name), where="rewards."), part.get("weight", 1.0)
        if not callable(function):
            raise UserError(
                f"rewards.{name}: {part._component_} gives a {type(function).__name__}: return a "
                "function of (completion, row)"
            )
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"rewards.{name}.weight: {weight}: use a number")
        found.append(Reward(str(name), float(weight), function))
    if not found:
        raise UserError("rewards: name at least one")
    return found


def reward_answers(
    rewards: Sequence[Reward],
    completions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    timeout: float,
) -> Rewarded:
    """What each completion to a row is worth.

    A function that raises, takes longer than ``timeout`` seconds, or gives no finite number is a
    failure: the completion has no reward, and the others have theirs. It must be called on the
    main thread for the timeout to hold.
    """
    parts = {x.name: torch.full((len(rows),), math.nan, dtype=torch.float64) for x in rewards}
    failures = []
    for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
        for reward in rewards:
            try:
                with _limit(timeout):
                    value = float(reward.function(text, row))
                if not math.isfinite(value):
                    raise ValueError(f"it gave {value}")
                parts[reward.name][i] = value
            except (Exception, SystemExit, _TooLong) as error:  # a user's own may raise anything
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                failures.append((i, f"rewards.{reward.name}: {reason}"))
    total = torch.stack([x.weight * parts[x.name] for x in rewards]).sum(0)
    return Rewarded(total, parts, failures)


class _TooLong(BaseException):
    """No Exception: a reward that catches those is ended all the same."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise within it after so many seconds, on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong(f"no answer within reward_timeout, {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def verified(verifier: str) -> Function:
    """1 for what a verifier calls right, else 0; ``verifier`` is the dotted path of one."""
    part = DictConfig({"verifier": {"_component_": verifier}})
    verify = instantiate(part, "verifier", where="rewards.")
    return lambda completion, row: float(verify(completion, row))


def reasoning_gym(task: str) -> Function:
    """The full or partial marks of reasoning-gym's own verifier; rows have an ``entry``."""
    _, verify = reasoning_gym_task(task, {"size": 1})
    return lambda completion, row: float(verify(completion, row))


def matches(pattern: str) -> Function:
    """1 where the whole completion matches a regular expression, else 0: a format.

    Raises:
        ValueError: if it is none.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern is no regular expression: {error}") from error
    return lambda completion, row: float(compiled.fullmatch(completion.strip()) is not None)


def brevity(characters: int) -> Function:
    """1 for an empty completion, falling to 0 at so many characters, and 0 beyond.

    Raises:
        ValueError: if ``characters`` is below 1.
    """
    if characters < 1:
        raise ValueError(f"characters is {characters}: use 1 or more")
    return lambda completion, row: max(0.0, 1 - len(completion) / characters)


BASELINES = ("mean", "leave_one_out", "none")


def advantages(
    rewards: Tensor, group: int, *, baseline: str = "mean", by_deviation: bool = False
) -> tuple[Tensor, Tensor]:
    """How much an answer is to be made likelier: by how much better it is than a baseline.

    Args:
        rewards: [P·G], fp64, the G answers to a prompt together; NaN for no reward.
        group: G.
        baseline: ``mean``: of the group (Dr. GRPO). ``leave_one_out``: of the other answers (RLOO),
            G/(G − 1) times r − mean. ``none``: 0, so that the advantage is the reward itself: with
            rewards of 0 and 1, fine-tuning on the answers that are right (expert iteration).
        by_deviation: divide by the group's standard deviation (GRPO).

    Returns:
        Advantages [P·G], 0 for an answer without a reward; and [P], whether a group's rewards are
        not all the same: with a baseline the others teach nothing.
    """
    by_group = rewards.view(-1, group)
    known = ~by_group.isnan()
    count = known.sum(1, keepdim=True).clamp(min=1)
    values = by_group.nan_to_num(0.0)
    change = torch.where(known, values - values.sum(1, keepdim=True) / count, 0)
    differs = (change.abs() > 1e-12).any(1)
    if baseline == "none":
        return values.flatten(), differs
    variance = change.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    if baseline == "leave_one_out":
        change = change * count / (count - 1).clamp(min=1)
    if by_deviation:
        change = change / variance.sqrt().clamp(min=1e-6)
    return torch.where(differs[:, None], change, 0).flatten(), differs


def check_advantages(baseline: str, by_deviation: bool, group: int, where: str = "") -> None:
    """Refuse what gives no advantages; ``where`` precedes the keys.

    Raises:
        UserError: naming the key.
    """
    if baseline not in BASELINES:
        raise UserError(f"{where}baseline: {baseline}: use {', '.join(BASELINES)}")
    if baseline != "none" and group < 2:
        raise UserError(
            f"{where}group_size: 1: an answer is judged beside the others to its prompt: use 2 or "
            "more, or baseline: none"
        )
    if baseline == "none" and by_deviation:
        raise UserError(f"{where}by_deviation: goes with a baseline, and baseline is none")
