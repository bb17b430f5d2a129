"""P-POTS: from a probe of the model to a density of t (arXiv 2511.18159).

The probe measures, at points t of a grid, the row loss's mean g(t), its variance over masks
v(t), and the root of the second moment of what is to be estimated: sqrt(g² + v) for the loss,
sqrt(E‖∇l‖²) for the gradient. The best density is ∝ that root. For an objective with another w than
1, each t here is s = W(t), on whose scale the objective is uniform (``mdm_plugin.density``).
"""

from typing import Any, Literal, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_plugin.density import Density

STARTS = 20  # of L-BFGS-B, as in the paper
KNOTS = 1025  # of a fitted EPR's density; closer together near 0, where it may be steep
BEYOND = 1.5  # times its value at the nearest end of the probe, at most, outside of it
LEAST = 1e-9  # of the largest value: a density is positive
SHARES = 41  # of the uniform density that are compared


def probe_grid(family: Literal["epr", "piecewise"], points: int) -> Tensor:
    """The values of t to probe. [T], fp64, increasing, within (0, 1).

    For EPR the paper's: equally spaced from 1/T to 1 − 1/T. For a piecewise density
    ((j + ½)/T)², closer together near 0, where few positions are masked and losses have
    heavy tails.
    """
    if family == "epr":
        return torch.linspace(1 / points, 1 - 1 / points, points, dtype=torch.float64)
    return ((torch.arange(points, dtype=torch.float64) + 0.5) / points).square()


def moments(losses: Tensor) -> tuple[Tensor, Tensor]:
    """g(t) = E[l | t] and v(t) = E_{x0} Var_m(l | x0, t) from row losses [T, rows, masks].

    A draw without a masked position counts, as the zero that it is. [T] each.
    """
    return losses.mean((1, 2)), losses.var(2).mean(1)


class EPR(NamedTuple):
    """The paper's family: g(t) = A·exp(k·t^m), v(t) = a·t^r + b·(1 − t)^q."""

    A: float
    k: float
    m: float
    a: float
    r: float
    b: float
    q: float

    def root(self, t: Tensor) -> Tensor:
        """sqrt(g(t)² + v(t)), the density up to its factor."""
        return _log_root(torch.tensor(self, dtype=torch.float64), t).exp()


def _log_root(parameters: Tensor, t: Tensor) -> Tensor:
    A, k, m, a, r, b, q = parameters
    # In logarithms, so that a steep start of L-BFGS-B does not overflow.
    log_g2 = 2 * (A.log() + k * t**m)
    log_v = (a * t**r + b * (1 - t) ** q).clamp(min=1e-300).log()
    return torch.logaddexp(log_g2, log_v) / 2


def _positive(raw: Tensor) -> Tensor:
    """L-BFGS-B's free numbers to the EPR's: softplus + 1e-9, and 1 + softplus for exponents."""
    return F.softplus(raw) + torch.tensor([1e-9, 1e-9, 1, 1e-9, 1, 1e-9, 1], dtype=torch.float64)


def divergence(root: Tensor, log_p: Tensor, t: Tensor) -> Tensor:
    """KL(root ‖ p) by the trapezoid rule on t [T], both [T] first normalised by the same rule."""
    root = root / torch.trapezoid(root, t)
    step = F.pad(t.diff(), (1, 1))
    weights = (step[1:] + step[:-1]) / 2
    log_p = log_p - torch.logsumexp(log_p + weights.log(), 0)
    return (weights * (torch.xlogy(root, root) - root * log_p)).sum()


def fit_epr(t: Tensor, root: Tensor) -> tuple[EPR, float]:
    """The EPR whose sqrt(g² + v) is nearest to root in KL(root ‖ p), and that KL.

    20 starts of L-BFGS-B, one of them flat; t [T] and root [T] ≥ 0, fp64.
    """
    from scipy.optimize import minimize  # a fifth of a second, and most runs fit no EPR, or once

    scaled = root / root.mean()
    random = numpy.random.default_rng(0)
    starts = random.normal(0.0, 2.0, (STARTS, 7))
    starts[0] = [0.5, -8, 0, -8, 0, -8, 0]

    def objective(raw: Any) -> tuple[float, Any]:
        free = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
        value = divergence(scaled, _log_root(_positive(free), t), t)
        (gradient,) = torch.autograd.grad(value, free)
        return float(value.detach()), gradient.numpy()

    best, least = starts[0], float("inf")
    for start in starts:
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(-20, 30)] * 7)
        if numpy.isfinite(found.fun) and found.fun < least:
            best, least = found.x, float(found.fun)
    return EPR(*_positive(torch.tensor(best, dtype=torch.float64)).tolist()), least


def _extended(epr: EPR, t: Tensor) -> Density:
    """The EPR's density on all of (0, 1), fitted on t [T].

    Nothing was measured outside t, and exp(k·t^m) can rise a thousandfold there. So it stays
    within what it is at the nearest end of t and half as much again; too little would cost more.
    """
    knots = torch.linspace(0, 1, KNOTS, dtype=torch.float64).square()
    held = epr.root(knots.clamp(t[0], t[-1]))
    values = epr.root(knots).clamp(held, BEYOND * held)
    return Density(knots, values.clamp(min=float(values.max()) * LEAST))


def curve(t: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """At x, the piecewise-linear curve through values at t [T], constant beyond."""
    return torch.from_numpy(numpy.interp(x, t, values))


def smoothed(root: Tensor) -> Tensor:
    """Each value averaged over five points, by (1, 4, 6, 4, 1)/16: alone it is mostly noise."""
    for _ in range(2):
        root = torch.cat((root[:1], root, root[-1:]))
        root = (root[:-2] + 2 * root[1:-1] + root[2:]) / 4
    return root


def _smoothed(t: Tensor, root: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Knots and values ≥ least of a piecewise-linear curve through root at t, constant beyond."""
    knots = torch.cat((t.new_zeros(1), t, t.new_ones(1)))
    root = smoothed(root)
    return knots, torch.cat((root[:1], root, root[-1:])).clamp(min=least)


def _left_out(t: Tensor, root: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """The piecewise density and curve at each of t as the other points predict them, [T] each."""
    q, curve = torch.empty_like(root), torch.empty_like(root)
    for j in range(len(t)):
        others = torch.arange(len(t)) != j
        knots, values = _smoothed(t[others], root[others], least)
        q[j] = Density(knots, values)(t[j])
        curve[j] = q[j] * torch.trapezoid(values, knots)
    return q, curve


def _uniform_share(t: Tensor, root: Tensor, q: Tensor, error: Tensor, mix: float) -> float:
    """The λ ≥ mix at which (1 − λ)·q + λ has the least second moment ∫ root²/q over (0, 1).

    The integral takes root constant beyond t. To its difference from the uniform density's comes
    one standard error of it: what it would change, were each root² wrong by ``error`` [T].
    """
    middle = (t[1:] + t[:-1]) / 2
    area = torch.cat((t.new_zeros(1), middle, t.new_ones(1))).diff()
    shares = torch.linspace(mix, 1, SHARES, dtype=torch.float64)
    change = area * (1 / torch.lerp(q, torch.ones_like(q), shares[:, None]) - 1)
    moment = change @ root.square() + (change * error).norm(dim=1)
    return float(shares[moment.argmin()])


class Fit(NamedTuple):
    """A density of t for a probe's root.

    density: already mixed with the uniform one.
    epr: its parameters, for that family.
    mix: the uniform density's share in it; 1 where the probe shows no gain.
    """

    density: Density
    epr: EPR | None
    mix: float


def fit(t: Tensor, root: Tensor, *, family: Literal["epr", "piecewise"], mix: float) -> Fit:
    """The density on all of (0, 1) for a probe's root on a grid.

    The uniform density's share is ``mix``, or as much more as makes ∫ root²/q dt least over all of
    (0, 1): a probe is noisy, and a density that follows its noise is worse than none.

    Args:
        t: [T], the probe's grid.
        root: [T], ≥ 0, the root of the second moment at each.
        family, mix: see ``timesteps.ParetoOptimal``.

    Raises:
        ValueError: if root is zero everywhere, or not finite.
    """
    t, root = t.double(), root.double()
    if not root.isfinite().all() or not (root > 0).any():
        raise ValueError("the probe's second moments are zero or not finite: the model is broken")
    if family == "epr":
        epr, _ = fit_epr(t, root)
        density = _extended(epr, t)
        # Seven parameters follow little of the noise: what they gain at their own points is real.
        at, error = density(t), torch.zeros_like(t)
    else:
        epr, least = None, float(root.max()) * LEAST
        density = Density(*_smoothed(t, root, least))
        at, curve = _left_out(t, root, least)
        error = root.square() - curve.square()
    share = _uniform_share(t, root, at, error, mix)
    return Fit(density.mixed(share), epr, share)


class Bins:
    """What a stream of rows shows in equal bins of t: the mean of a square, newer rows first.

    means: [bins], fp64, of the squares. counts: [bins], fp64, the rows that they are of; all decay
    alike, so a mean stays what it was while no row comes.
    """

    def __init__(self, bins: int, decay: float) -> None:
        self.decay = decay
        self.middles = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        self.means, self.counts = torch.zeros(2, bins, dtype=torch.float64)

    def used(self, w: Density) -> Tensor:
        """Which of the bins an objective has a share in. [bins], bool."""
        bins = len(self.middles)
        if w.is_uniform:
            return torch.ones(bins, dtype=torch.bool)
        return w.cdf(torch.arange(bins + 1, dtype=torch.float64) / bins).diff() > 0

    def tally(self, t: Tensor, values: Tensor) -> Tensor:
        """Sums of some rows' squared values, and of rows, in each bin: [2, bins], fp64."""
        bins = len(self.middles)
        index = (t * bins).long().clamp(0, bins - 1)
        rows = torch.stack((values.double().square(), torch.ones_like(values).double()))
        return torch.zeros(2, bins, dtype=torch.float64).index_add_(1, index, rows)

    def begin(self, t: Tensor, squares: Tensor, rows: Tensor) -> None:
        """Add what a probe found at t [T]: so many rows [bins], of its nearest squares [T]."""
        found = curve(t, squares, self.middles)
        self._add(torch.stack((rows * found, rows)))

    def update(self, tally: Tensor) -> None:
        """Add the tally of a step, after what was there has decayed."""
        self.counts = self.decay * self.counts
        self._add(tally)

    def _add(self, tally: Tensor) -> None:
        total = self.counts + tally[1]
        self.means = self.means + (tally[0] - tally[1] * self.means) / total.clamp(min=1e-12)
        self.counts = total
