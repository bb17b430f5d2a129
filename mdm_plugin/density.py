"""Densities of t on [0, 1], and the importance weights that follow from them."""

import torch
from torch import Tensor


class Density:
    """A probability density on [0, 1], linear between knots: pdf, cdf and quantile are exact.

    Args:
        knots: [K], increasing, from 0 to 1.
        values: [K], > 0, the density at the knots up to a factor.

    Raises:
        ValueError: on knots that are not so, or a value that is not positive and finite.
    """

    def __init__(self, knots: Tensor, values: Tensor) -> None:
        self.knots, values = knots.double(), values.double()
        if self.knots[0] != 0 or self.knots[-1] != 1 or not (self.knots.diff() > 0).all():
            raise ValueError("the knots of a density increase from 0 to 1")
        if not ((values > 0) & values.isfinite()).all():
            raise ValueError("a density is positive and finite at each of its knots")
        total = torch.trapezoid(values, self.knots)
        # A density that comes back from a checkpoint is the same to the last bit.
        self.values = values if abs(float(total) - 1) < 1e-12 else values / total
        steps = self.knots.diff() * (self.values[1:] + self.values[:-1]) / 2
        self._cdf = torch.cat((torch.zeros(1, dtype=torch.float64), steps.cumsum(0)))
        self._slopes = self.values.diff() / self.knots.diff()

    def mixed(self, weight: float) -> "Density":
        """(1 − weight)·q + weight: at least ``weight`` everywhere, so 1/q ≤ 1/weight."""
        return Density(self.knots, (1 - weight) * self.values + weight)

    def _segment(self, edges: Tensor, x: Tensor) -> Tensor:
        return (torch.searchsorted(edges, x, right=True) - 1).clamp(0, len(self._slopes) - 1)

    def __call__(self, t: Tensor) -> Tensor:
        """q(t)."""
        k = self._segment(self.knots, t)
        return self.values[k] + self._slopes[k] * (t - self.knots[k])

    def cdf(self, t: Tensor) -> Tensor:
        """∫ q over [0, t]."""
        k = self._segment(self.knots, t)
        d = t - self.knots[k]
        return self._cdf[k] + d * (self.values[k] + self._slopes[k] * d / 2)

    def quantile(self, u: Tensor) -> Tensor:
        """The t at which the cdf is u."""
        u = u * self._cdf[-1]  # 1, but for rounding
        k = self._segment(self._cdf, u)
        rest, left = u - self._cdf[k], self.values[k]
        # The root of left·d + slope·d²/2 = rest, in the form that does not cancel.
        d = 2 * rest / (left + (left * left + 2 * self._slopes[k] * rest).clamp(min=0).sqrt())
        return torch.minimum(self.knots[k] + d, self.knots[k + 1])

    def state_dict(self) -> dict[str, list[float]]:
        """Knots and values, as plain numbers."""
        return {"knots": self.knots.tolist(), "values": self.values.tolist()}

    @classmethod
    def from_state_dict(cls, state: dict[str, list[float]]) -> "Density":
        knots, values = (torch.tensor(state[k], dtype=torch.float64) for k in ("knots", "values"))
        return cls(knots, values)


def uniform_density() -> Density:
    """q(t) = 1."""
    return Density(torch.tensor([0.0, 1.0]), torch.ones(2))


def count_weight(density: Density, t: Tensor, n: Tensor) -> Tensor:
    """The importance weight of the count l = ⌊t·N⌋ + 1 under t ~ q: 1 / (N·p(l)).

    p(l) = ∫ q over [(l−1)/N, l/N). It is E[1/q(t) | l], so it has no more variance than 1/q(t)
    and the same mean (Rao–Blackwell). t [R], n [R]: N of each row. [R], fp64.
    """
    lower = (t * n).long().minimum(n - 1).double()
    return 1 / (n * (density.cdf((lower + 1) / n) - density.cdf(lower / n)))
