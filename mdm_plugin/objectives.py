"""What is minimised: J_w = ∫₀¹ w(t)·L(t) dt, with L(t) the mean row loss at the masking rate t.

L(t) holds the factor 1/p(t), so w = 1 is the bound on the negative log-likelihood (the ELBO's
negative), and any other density w of t teaches some rates more than that bound asks for. Objective
and estimator are two choices: every sampler of t and every mask estimates the J_w that is declared
here without bias, by rates as by counts (``Density.count_cdf``).

An objective says w at each moment of training, so that it may move:

    w = objective(progress)        # a Density; progress from 0, the first step, to 1, the last

To add one, derive it from ``mdm_plugin.contract.Objective`` and name it in the config by its path.
"""

import torch
from torch import Tensor

from mdm_plugin.contract import Objective
from mdm_plugin.density import Density, uniform_density

KNOTS = 257  # of a density that is not piecewise linear by itself


class ELBO(Objective):
    """w(t) = 1: the bound on the negative log-likelihood itself (the paper's *Standard*)."""

    def __init__(self) -> None:
        self.density = uniform_density()

    def __call__(self, progress: float) -> Density:
        return self.density


def window(low: float, high: float) -> Density:
    """The uniform density on (low, high)."""
    edges = [(0.0, 0.0), (low, 0.0)] if low > 0 else []
    edges += [(low, 1.0), (high, 1.0)]
    edges += [(high, 0.0), (1.0, 0.0)] if high < 1 else []
    knots, values = zip(*edges, strict=True)
    return Density(*(torch.tensor(x, dtype=torch.float64) for x in (knots, values)))


def _check_window(low: float, high: float, names: str) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"{names} {low} and {high}: use 0 <= low < high <= 1")


class Window(Objective):
    """w(t) = 1/(high − low) on (low, high), and 0 elsewhere.

    The paper's *Clipped* (BD3-LM, Arriola et al. 2025), which draws t from a window: another
    objective than the ELBO, and exact for what it declares.

    Args:
        low, high: 0 ≤ low < high ≤ 1.

    Raises:
        ValueError: if they are not so.
    """

    def __init__(self, low: float = 0.4, high: float = 1.0) -> None:
        _check_window(low, high, "low and high")
        self.density = window(low, high)

    def __call__(self, progress: float) -> Density:
        return self.density


class Widening(Objective):
    """A window that moves during training, by default from (0.5, 1) to (0, 1): it ends at the ELBO.

        low(r) = (1 − r)·low + r·final_low,  high likewise,  r = min(progress / over, 1)

    Args:
        low, high: the window of the first step.
        final_low, final_high: that of the end.
        over: the share of training after which it rests, in (0, 1].

    Raises:
        ValueError: on a window that is none, or an ``over`` out of range.
    """

    def __init__(
        self,
        low: float = 0.5,
        high: float = 1.0,
        final_low: float = 0.0,
        final_high: float = 1.0,
        over: float = 1.0,
    ) -> None:
        _check_window(low, high, "low and high")
        _check_window(final_low, final_high, "final_low and final_high")
        if not 0 < over <= 1:
            raise ValueError(f"over is {over}: use more than 0, up to 1")
        self.first, self.final, self.over = (low, high), (final_low, final_high), over
        self.rest = window(final_low, final_high)

    def __call__(self, progress: float) -> Density:
        if progress >= self.over:
            return self.rest
        r = progress / self.over
        low, high = ((1 - r) * a + r * b for a, b in zip(self.first, self.final, strict=True))
        return window(low, high)


def _smooth(values: Tensor) -> Density:
    """A density by its values at equally spaced knots, linear between them."""
    return Density(torch.linspace(0, 1, len(values), dtype=torch.float64), values)


class Power(Objective):
    """w(t) ∝ t^a. With a = 1 it is the objective of the row loss (1/N)·Σ CE without the factor 1/p,
    times 2: the field's "no 1/p" (MaskGIT, Chang et al. 2022, trains so).

    Between 257 knots it is linear: of t^a with a whole number a it differs by less than
    a·(a − 1)/2¹⁹; a = 1 is exact.

    Args:
        a: ≥ 0.

    Raises:
        ValueError: if it is below 0.
    """

    def __init__(self, a: float = 1.0) -> None:
        if a < 0:
            raise ValueError(f"a is {a}: use 0 or more: t^a has no finite peak at 0 below")
        knots = 2 if a == 1 else KNOTS
        self.density = _smooth(torch.linspace(0, 1, knots, dtype=torch.float64) ** a)

    def __call__(self, progress: float) -> Density:
        return self.density


class Bell(Objective):
    """w(t) ∝ t^(a − 1)·(1 − t)^(b − 1), the Beta(a, b) density, linear between 257 knots.

    Args:
        a, b: ≥ 1.

    Raises:
        ValueError: if one is below 1.
    """

    def __init__(self, a: float = 2.0, b: float = 2.0) -> None:
        if a < 1 or b < 1:
            raise ValueError(f"a is {a} and b is {b}: use 1 or more")
        t = torch.linspace(0, 1, KNOTS, dtype=torch.float64)
        self.density = _smooth(t ** (a - 1) * (1 - t) ** (b - 1))

    def __call__(self, progress: float) -> Density:
        return self.density


class Piecewise(Objective):
    """Any w, linear between knots; with ``final``, one that moves in a straight line to another.

    Args:
        knots: of t, from 0 to 1, increasing; twice the same is a jump.
        values: w at the knots, up to a factor, ≥ 0.
        final: w at the knots at the end of training, up to a factor; None for ``values``.

    Raises:
        ValueError: if they make no density, or are not of one length.
    """

    def __init__(
        self, knots: list[float], values: list[float], final: list[float] | None = None
    ) -> None:
        final = values if final is None else final
        if not len(knots) == len(values) == len(final) or len(knots) < 2:
            raise ValueError(
                f"knots {len(knots)}, values {len(values)}, final {len(final)}: give as many of "
                "each, 2 or more"
            )
        at = torch.tensor(list(knots), dtype=torch.float64)
        self.first, self.final = (
            Density(at, torch.tensor(list(x), dtype=torch.float64)) for x in (values, final)
        )
        self.moves = not torch.equal(self.first.values, self.final.values)

    def __call__(self, progress: float) -> Density:
        if not self.moves or progress <= 0:
            return self.first
        if progress >= 1:
            return self.final
        return Density(self.first.knots, self.first.values.lerp(self.final.values, progress))
