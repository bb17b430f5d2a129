"""Densities of t on [0, 1]: an objective's, and a sampler's; counts and weights that follow.

An objective is J_w = ∫₀¹ w(t)·L(t) dt with a density w (``mdm_plugin.objectives``). A sampler works
on its quantile scale, s = W(t) = ∫₀ᵗ w, on which the objective is the uniform density: what it
draws with the density h of s gets the weight 1/h(s).
"""

import numpy
import torch
from torch import Tensor

TABLES = 256  # of counts that a density keeps, each for a number of positions


class Density:
    """A probability density on [0, 1], linear between knots: pdf, cdf and quantile are exact.

    Args:
        knots: [K], from 0 to 1, not decreasing. Twice the same knot is a jump.
        values: [K], ≥ 0, the density at the knots up to a factor.

    Attributes:
        is_uniform: whether it is 1 on all of [0, 1].

    Raises:
        ValueError: on knots that are not so, values that are negative or not finite, or a density
            without mass.
    """

    def __init__(self, knots: Tensor, values: Tensor) -> None:
        self.knots, values = knots.double(), values.double()
        widths = self.knots.diff()
        if self.knots[0] != 0 or self.knots[-1] != 1 or not (widths >= 0).all():
            raise ValueError("the knots of a density increase from 0 to 1")
        if not ((values >= 0) & values.isfinite()).all():
            raise ValueError("a density is finite and not negative at each of its knots")
        total = torch.trapezoid(values, self.knots)
        if not total > 0:
            raise ValueError("a density has some mass: it is positive somewhere")
        # A density that comes back from a checkpoint is the same to the last bit.
        self.values = values if abs(float(total) - 1) < 1e-12 else values / total
        steps = widths * (self.values[1:] + self.values[:-1]) / 2
        self._cdf = torch.cat((torch.zeros(1, dtype=torch.float64), steps.cumsum(0)))
        self._slopes = self.values.diff() / torch.where(widths > 0, widths, torch.inf)
        self._last = int(steps.nonzero()[-1])  # the last segment with mass
        self.is_uniform = bool((self.values == 1).all())
        self._tables: dict[int, Tensor] = {}

    def mixed(self, weight: float) -> "Density":
        """(1 − weight)·q + weight: at least ``weight`` everywhere, so 1/q ≤ 1/weight."""
        return Density(self.knots, (1 - weight) * self.values + weight)

    def _segment(self, edges: Tensor, x: Tensor, last: int) -> Tensor:
        return (torch.searchsorted(edges, x, right=True) - 1).clamp(0, last)

    def __call__(self, t: Tensor) -> Tensor:
        """q(t); at a jump, what comes after it."""
        k = self._segment(self.knots, t, len(self._slopes) - 1)
        return self.values[k] + self._slopes[k] * (t - self.knots[k])

    def cdf(self, t: Tensor) -> Tensor:
        """∫ q over [0, t]."""
        k = self._segment(self.knots, t, len(self._slopes) - 1)
        d = t - self.knots[k]
        return self._cdf[k] + d * (self.values[k] + self._slopes[k] * d / 2)

    def quantile(self, u: Tensor) -> Tensor:
        """The t at which the cdf is u: within what has mass."""
        u = u * self._cdf[-1]  # 1, but for rounding
        k = self._segment(self._cdf, u, self._last)
        rest, left = u - self._cdf[k], self.values[k]
        # The root of left·d + slope·d²/2 = rest, in the form that does not cancel.
        root = left + (left * left + 2 * self._slopes[k] * rest).clamp(min=0).sqrt()
        d = torch.where(rest > 0, 2 * rest / root, 0)
        return torch.minimum(self.knots[k] + d, self.knots[k + 1])

    def count_cdf(self, n: int) -> Tensor:
        """Of an objective w: the shares of the counts 1..l of n positions, for l = 0..n. [n + 1].

        Masks of rate t hide l of n positions with the probability Binom(l; n, t), and a row's loss
        is (1/(n·t))·Σ CE. So J_w = Σ_l c_l · E[(1/l)·Σ CE | l], with

            c_l = (l/n)·∫ w(t)·Binom(l; n, t)/t dt = ∫ w(t)·Binom(l − 1; n − 1, t) dt,

        which add up to 1: the distribution of 1 + Binom(n − 1, t) under t ~ w; 1/n each for w = 1.
        Binom(n − 1, t) < l where the l-th smallest of n − 1 uniform numbers, which is
        Beta(l, n − l), is above t: Σ_{k ≤ l} c_k = E[W(Beta(l, n − l))], a sum of incomplete beta
        functions, because W is quadratic between the knots.
        """
        if n not in self._tables:
            if len(self._tables) >= TABLES:
                self._tables.pop(next(iter(self._tables)))
            if self.is_uniform:
                table = torch.arange(n + 1, dtype=torch.float64) / n
            else:
                table = torch.from_numpy(self._count_cdf(n))
            self._tables[n] = table
        return self._tables[n]

    def _count_cdf(self, n: int) -> "numpy.ndarray":
        from scipy.special import betainc  # a tenth of a second that the plain ELBO does not need

        count = numpy.arange(1, n)[:, None]
        moments = (
            numpy.ones_like(count),
            count / n,
            count * (count + 1) / (n * (n + 1)),
        )
        x, value, slope = self.knots.numpy(), self.values.numpy(), self._slopes.numpy()
        degrees = 3 if slope.any() else 2  # a piecewise constant w has no squares in W
        below = [  # E[T^k; T < x], of T ~ Beta(l, n − l)
            m * betainc(count + k, n - count, x) for k, m in enumerate(moments[:degrees])
        ]
        within = [b[:, 1:] - b[:, :-1] for b in below]
        x, value = x[:-1], value[:-1]
        # W = W_k + v·(t − x) + s·(t − x)²/2 from each knot to the next, by powers of t.
        powers = (
            self._cdf.numpy()[:-1] - value * x + slope * x**2 / 2,
            value - slope * x,
            slope / 2,
        )
        sums = sum((p * w).sum(1) for p, w in zip(powers[:degrees], within, strict=True))
        inner = numpy.maximum.accumulate(numpy.clip(sums, 0, 1))
        return numpy.concatenate(([0.0], inner, [1.0]))

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


def masked_count(t: Tensor, n: Tensor, w: Density) -> Tensor:
    """How many of a row's positions are hidden at t, for masks by count: l in 1..N. [R], long.

    The l whose share of the objective's counts holds s = W(t): t ~ w gives l the probability c_l
    (``Density.count_cdf``), and stratified t a stratified count. For w = 1 it is ⌊t·N⌋ + 1.

    t: [R]. n: [R], long, N ≥ 1 of each row (0 gives 0).
    """
    if w.is_uniform:
        return ((t * n).long() + 1).minimum(n)
    return _count_at(w.cdf(t), n, w)


def opposite_count(t: Tensor, n: Tensor, w: Density) -> Tensor:
    """The count at the other end of the objective: of 1 − s in place of s = W(t). [R], long.

    As ``masked_count`` it has the probability c_l; the more that one hides, the less the other:
    for w = 1 it is N + 1 − l.
    """
    if w.is_uniform:
        return (n + 1 - masked_count(t, n, w)).minimum(n)
    return _count_at(1 - w.cdf(t), n, w)


def count_shares(count: Tensor, n: Tensor, w: Density) -> Tensor:
    """c_l of some counts l, 0 outside of 1..N. count [R], n [R]. [R], fp64."""
    if w.is_uniform:
        return ((count >= 1) & (count <= n)) / n.double().clamp(min=1)
    found = torch.zeros(len(n), dtype=torch.float64)
    for size in n.unique().tolist():
        if size:
            here = n == size
            shares = torch.nn.functional.pad(w.count_cdf(size).diff(), (1, 1))
            found[here] = shares[count[here].clamp(0, size + 1)]
    return found


def count_place(t: Tensor, n: Tensor, w: Density) -> Tensor:
    """A number in [0, 1) whose ⌊·N⌋ + 1 is the count of t, uniform within its 1/N. [R], fp64.

    For masks that take a rate and are exact by counts; for w = 1 it is t. t [R], n [R].
    """
    if w.is_uniform:
        return t
    s, count, place = w.cdf(t), masked_count(t, n, w), torch.zeros_like(t)
    for size in n.unique().tolist():
        if size:
            here, edges = n == size, w.count_cdf(size)
            below, above = edges[count[here] - 1], edges[count[here]]
            within = ((s[here] - below) / (above - below)).clamp(0, 1 - 1e-12)
            place[here] = (count[here] - 1 + within) / size
    return place


def _count_at(s: Tensor, n: Tensor, w: Density) -> Tensor:
    count = torch.zeros_like(n)
    for size in n.unique().tolist():
        here = n == size
        edges = w.count_cdf(size) if size else s.new_zeros(1)
        within = s[here].clamp(max=1 - 2**-53)  # 1 itself would be a count without a share
        count[here] = torch.searchsorted(edges, within, right=True).clamp(max=size)
    return count


def count_weight(h: Density, t: Tensor, n: Tensor, w: Density, antithetic: bool) -> Tensor:
    """The importance weight of the count that t gives, under s = W(t) ~ h: c_l / p(l). [R], fp64.

    p(l) = ∫ h over the s that give l. It is E[1/h(s) | l], so it has no more variance than 1/h(s)
    and the same mean (Rao–Blackwell). For a pair of the count at s and the count at 1 − s, it is of
    the s that give the same pair. For w = 1 that is l's own s: the pair's counts add up to N + 1.

    t [R]; n [R], long: N of each row.
    """
    if w.is_uniform:
        lower = (t * n).long().minimum(n - 1).double()
        return 1 / (n * (h.cdf((lower + 1) / n) - h.cdf(lower / n)))
    s, low, high = w.cdf(t), torch.zeros_like(t), torch.ones_like(t)
    first, last = _count_at(s, n, w), _count_at(1 - s, n, w)
    for size in n.unique().tolist():
        if size:
            here, edges = n == size, w.count_cdf(size)
            low[here], high[here] = edges[first[here] - 1], edges[first[here]]
            if antithetic:
                low[here] = low[here].maximum(1 - edges[last[here]])
                high[here] = high[here].minimum(1 - edges[last[here] - 1])
    # So narrow that rounding would decide: the weight of s itself.
    mass, width = h.cdf(high) - h.cdf(low), high - low
    return torch.where(width > 1e-9, width / mass, 1 / h(s))
