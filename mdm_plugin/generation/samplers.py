"""Which of a step's predictions stay: the samplers, each a small class of one method.

- ``Remasking``: a number of positions per step, those first in an order (LLaDA, Dream);
- ``Threshold``: all that the model is sure enough of (Fast-dLLM);
- ``Stable``: all that it is sure of and has stopped changing its mind about (KLASS).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What a sampler chooses from: B rows, the n positions of the block being written.

    number, steps: number of the step in its block, from 0, and how many there are to be; steps is
        0 where the sampler decides that.
    masked: [B, n], bool, positions still to be filled.
    first: [B], how many positions of the block were masked at its start.
    prediction: [B, n], the tokens proposed; here and below, of masked positions.
    model: [B, n, V], the model's probabilities.
    sampled: [B, n, V], those that the predictions were drawn from: after temperature, top-p, top-k.
    uniform: [B, n], U(0, 1) numbers of the rows' own.
    """

    number: int
    steps: int
    masked: Tensor
    first: Tensor
    prediction: Tensor
    model: Tensor
    sampled: Tensor
    uniform: Tensor


class Sampler(Protocol):
    """Which of a block's masked positions are written next.

    ``needs_steps``: it goes by ``Decoding``'s steps. Another writes as many as it is sure of.
    """

    needs_steps: bool

    def __call__(self, step: Candidates, late: Tensor) -> Tensor: ...


def low_confidence(x: Candidates) -> Tensor:
    """The model's probability of the prediction (LLaDA, arXiv 2502.09992, Algorithm 5)."""
    return x.model.gather(-1, x.prediction[..., None])[..., 0]


def random(x: Candidates) -> Tensor:
    """Any order (LLaDA, Algorithm 4)."""
    return x.uniform


def maskgit_plus(x: Candidates) -> Tensor:
    """Its probability under what it was drawn from (Dream, arXiv 2508.15487; MaskGIT)."""
    return x.sampled.gather(-1, x.prediction[..., None])[..., 0]


def entropy(x: Candidates) -> Tensor:
    """Minus the entropy of what it was drawn from (Dream)."""
    return (x.sampled * (x.sampled + 1e-10).log()).sum(-1)


def margin(x: Candidates) -> Tensor:
    """The best token's probability over the second's (Dream's top-k margin)."""
    best = x.sampled.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


ORDERS: dict[str, Callable[[Candidates], Tensor]] = {
    f.__name__: f for f in (low_confidence, random, maskgit_plus, entropy, margin)
}
"""Name → how sure the model is of each position; the surest are written first."""


def _order(name: str) -> Callable[[Candidates], Tensor]:
    if name not in ORDERS:
        raise ValueError(f"order is {name!r}: use one of {', '.join(ORDERS)}")
    return ORDERS[name]


def _score(order: Callable[[Candidates], Tensor], x: Candidates, late: Tensor) -> Tensor:
    """Of the masked positions; those to come ``late`` below all others, filled ones at −inf."""
    score = order(x).double()
    score = torch.where(late, score - 1e6, score)
    return score.masked_fill(~x.masked, -torch.inf)


def _first(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [B] positions of highest score, [B, n]; never one at −inf."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < count[:, None]) & (score > -torch.inf)


class Remasking:
    """Each step fills a number of positions, the first in ``order``; the rest stay masked.

    Args:
        order: ``low_confidence``, ``random``, ``maskgit_plus``, ``entropy`` or ``margin``.
        schedule: how many a step: ``even``, with the remainder in the first steps (LLaDA);
            ``linear``, ⌊masked · (1 − s/t)⌋ for t on an even grid from 1 to 1e-3 and s the
            next point, and all in the last step (Dream).

    Raises:
        ValueError: on an unknown order or schedule.
    """

    needs_steps = True

    def __init__(self, order: str = "low_confidence", schedule: str = "even") -> None:
        if schedule not in ("even", "linear"):
            raise ValueError(f"schedule is {schedule!r}: use even or linear")
        self.order, self.schedule = _order(order), schedule

    def __call__(self, step: Candidates, late: Tensor) -> Tensor:
        if self.schedule == "even":
            count = step.first // step.steps + (step.number < step.first % step.steps)
        elif step.number == step.steps - 1:
            count = step.first
        else:
            grid = torch.linspace(1, 1e-3, step.steps + 1)
            t, s = grid[step.number], grid[step.number + 1]
            count = (step.masked.sum(1) * (1 - s / t).to(step.masked.device)).int()
        return _first(_score(self.order, step, late), count)


class Threshold:
    """Each step fills all positions whose score is at least ``threshold``, or else the best one.

    Parallel decoding by confidence (Fast-dLLM, arXiv 2505.22618).

    Args:
        threshold: of the score, in (0, 1] for probabilities.
        order: as in ``Remasking``.

    Raises:
        ValueError: on an unknown order.
    """

    needs_steps = False

    def __init__(self, threshold: float = 0.9, order: str = "low_confidence") -> None:
        self.threshold, self.order = threshold, _order(order)

    def __call__(self, step: Candidates, late: Tensor) -> Tensor:
        score = _score(self.order, step, late)
        return (score >= self.threshold) | _first(score, step.masked.any(1).long())


class Stable:
    """Each step fills the positions that the model is sure of and that have settled.

    A position has settled when the KL divergence of its distribution from the step before's was
    below ``kl_threshold`` in the last ``history`` steps. If there is none, the ``at_least`` most
    confident are filled. (KLASS, arXiv 2511.05664.)

    Args:
        threshold: of the model's probability of the prediction.
        kl_threshold: in nats.
        history: steps, 1 or more.
        at_least: positions per step, 1 or more.

    Raises:
        ValueError: on a history or number below 1.
    """

    needs_steps = False

    def __init__(
        self,
        threshold: float = 0.9,
        kl_threshold: float = 0.01,
        history: int = 2,
        at_least: int = 1,
    ) -> None:
        if history < 1 or at_least < 1:
            raise ValueError(f"history is {history}, at_least {at_least}: use 1 or more")
        self.threshold, self.kl_threshold = threshold, kl_threshold
        self.history, self.at_least = history, at_least
        self._before, self._settled = torch.empty(0), torch.empty(0)

    def __call__(self, step: Candidates, late: Tensor) -> Tensor:
        now = step.model.clamp(min=1e-12).log()
        if step.number == 0:
            self._settled = torch.zeros_like(step.prediction)
        else:
            kl = (step.model * (now - self._before)).sum(-1)
            self._settled = torch.where(kl < self.kl_threshold, self._settled + 1, 0)
        self._before = now
        score = _score(low_confidence, step, late)
        chosen = (score > self.threshold) & (self._settled >= self.history)
        fallback = _first(score, torch.full_like(step.first, self.at_least))
        return torch.where(chosen.any(1, keepdim=True), chosen, fallback)
