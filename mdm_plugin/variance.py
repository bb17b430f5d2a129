"""The variance of an estimator, split into its sources by the law of total variance.

With rows x0, masking rates t and masks m, an estimate f (a loss, or a gradient: then all
variances are traces of covariances) has

    Var(f) = A + B + C
    A, masking pattern:  E_{x0,t} Var_m(f | x0, t)
    B, masking rate:     E_{x0} Var_t(E_m[f | x0, t] | x0)
    C, data:             Var_{x0}(E_{t,m}[f | x0])

(arXiv 2511.18159). f here is the mean over a whole batch of n rows, and each part is given
times n. For rows that draw t independently that is the variance of a single row. A stratified
sampler draws a batch's t together, which removes a part of B: the B here is the part that remains.

Four draws of each batch estimate all of it without bias, and without a variance of group means
to correct: f(x0, t, m); f(x0, t, m') with new masks; f(x0, t', m'') with new t and masks; and
f on other rows altogether. ½E‖f − f_m'‖² = A, ½E‖f − f_t'm''‖² = A + B, and the covariance of
f and f_t'm'' over batches is C. The fourth measures the total by itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """Four estimates for each of G batches, [G, D] each (D = 1 for a loss).

    first: f(x0, t, m). remasked: the same rows and t, new masks. redrawn: the same rows, new t
    and masks. apart: other rows, t and masks.
    """

    first: Tensor
    remasked: Tensor
    redrawn: Tensor
    apart: Tensor


def contributions(draws: Draws, rows: int) -> Tensor:
    """What each batch contributes to A, B, C and the total. [G, 4], fp64; estimates are means.

    ``rows`` is the batch's n. Sums over coordinates: of D coordinates that are spread over
    ranks, each rank's contributions add up.
    """
    first, remasked, redrawn, apart = (x.double() for x in draws)
    correction = len(first) / (len(first) - 1)  # of the means that are subtracted
    masks = (first - remasked).square().sum(1) / 2
    both = (first - redrawn).square().sum(1) / 2
    data = ((first - first.mean(0)) * (redrawn - redrawn.mean(0))).sum(1) * correction
    total = (apart - apart.mean(0)).square().sum(1) * correction
    return rows * torch.stack((masks, both - masks, data, total), 1)


def signal(draws: Draws) -> Tensor:
    """What each batch contributes to |E f|²: products of estimates that have nothing in common.

    [G], fp64; the estimate is the mean. Sums over coordinates, as ``contributions``.
    """
    first, remasked, redrawn, apart = (x.double() for x in draws)
    return ((first + remasked + redrawn) / 3 * apart).sum(1)


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Decomposition(NamedTuple):
    """A, B and C; their sum; the total as measured by itself; and the variance, from both."""

    A: Estimate
    B: Estimate
    C: Estimate
    sum: Estimate
    total: Estimate
    variance: Estimate


BOOTSTRAPS = 2000


def _resamples(count: int) -> Tensor:
    """Bootstrap weights of ``count`` batches, each resample's summing to 1. [2000, count]."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (BOOTSTRAPS, count), generator=generator)
    weights = torch.zeros(BOOTSTRAPS, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))


def _estimate(value: Tensor, resampled: Tensor) -> Estimate:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(value), low, high)


def _parts(x: Tensor) -> Tensor:
    """Columns A, B, C, total → A, B, C, sum, total, mean of sum and total."""
    sums = x[..., :3].sum(-1)
    return torch.stack((*x.unbind(-1)[:3], sums, x[..., 3], (sums + x[..., 3]) / 2), -1)


def decompose(contributed: Tensor) -> Decomposition:
    """A, B, C and the total from the contributions of G ≥ 2 batches [G, 4]; bootstrap intervals."""
    values, resampled = contributed.mean(0), _resamples(len(contributed)) @ contributed
    pairs = zip(_parts(values), _parts(resampled).unbind(-1), strict=True)
    return Decomposition(*(_estimate(v, r) for v, r in pairs))


def noise_scale(contributed: Tensor, products: Tensor) -> Estimate | None:
    """Rows in a batch whose noise is as large as its signal: tr Cov of a row / |E f|².

    The *simple noise scale* of McCandlish et al. 2018: with far fewer rows a step is mostly noise,
    with far more the rows are mostly wasted. contributed [G, 4]; products [G], of ``signal``. None
    where the signal is not seen above its own noise.
    """
    resampled = _resamples(len(contributed))
    found = resampled @ products
    if not float(found.quantile(0.025)) > 0:
        return None
    value = _parts(contributed.mean(0))[-1] / products.mean()
    return _estimate(value, _parts(resampled @ contributed)[:, -1] / found)


def ratio(contributed: Tensor, standard: Tensor, factor: float = 1.0) -> Estimate:
    """An estimator's variance relative to another's of the same batches, times ``factor``.

    [G, 4] each. The bootstrap takes both from the same batches, so that what they share (the
    rows) cancels. ``factor`` 1 compares at equal rows; the number of forwards per row, or the
    ratio of times, at equal forwards, or time: in the same budget there are as many fewer rows.
    """
    return quotient([factor * _parts(contributed)[:, -1]], [_parts(standard)[:, -1]])


def quotient(over: Sequence[Tensor], under: Sequence[Tensor]) -> Estimate:
    """The product of some means over the product of others, of G ≥ 2 batches, [G] each.

    The bootstrap takes all of them from the same batches, so that what they share cancels.
    """
    weights = _resamples(len(over[0]))
    above, below = (torch.stack(list(x)).double() for x in (over, under))
    value = above.mean(1).prod() / below.mean(1).prod()
    return _estimate(value, (above @ weights.T).prod(0) / (below @ weights.T).prod(0))
