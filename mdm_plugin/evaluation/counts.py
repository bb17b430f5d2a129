"""Counts spread evenly, and bounds estimated from masks of them with a control variate."""

import math

import torch
from torch import Tensor

# Of the control variate: how alike masks must be in their share of positions to tell of each other,
# and the weight of a token that is as hard as all others. Any values are unbiased.
_WIDTH, _PRIOR = 0.3, 0.2


def even_counts(n: int, draws: int, offset: float) -> Tensor:
    """How many of ``n`` positions each draw masks: as even as can be over 1..n, ascending. [draws].

    With no more draws than n, a systematic sample that begins at ``offset`` in [0, 1): each count
    has the probability draws / n. With more, every count is there, the lightest, whose losses vary
    most, once more than the others.
    """
    if draws < n:
        return ((offset + torch.arange(draws, dtype=torch.float64)) * n / draws).long() + 1
    times = torch.full((n,), draws // n)
    times[: draws % n] += 1
    return torch.arange(1, n + 1).repeat_interleave(times)


def controlled(ce: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The bound of a row from K masks, and the variance of that; scalars, fp64.

    Most of how f(S) varies is which tokens S holds: some are hard under every mask. So each mask
    S_k has a control variate: what the *other* masks say of every token, h_i, a mean of CE_i over
    those of about as many positions. z_k = (1/N)·Σ_i h_i + (1/l)·Σ_{i∈S_k} (CE_i − h_i) has the
    mean of f(S_k), because h does not depend on S_k and each position is in S_k with probability
    l/N.

    The variance is estimated from the differences of masks of neighbouring counts, which overstates
    it by what the counts' means differ.

    Args:
        ce: [K, N], CE_i under mask k, 0 where not masked.
        mask: [K, N], bool, S_k.
        count: [K], l of each, as of ``even_counts``.
    """
    draws, n = mask.shape
    times = torch.bincount(count, minlength=n + 1)[count] if draws >= n else draws / n
    weight = 1 / (times * torch.ones(draws, dtype=torch.float64))
    if draws == 1:
        return (weight * ce.sum(1) / count).sum(), torch.tensor(math.nan, dtype=torch.float64)
    member, share = mask.double(), count.double() / n
    near = torch.exp(-(((share[:, None] - share) / _WIDTH) ** 2) / 2).fill_diagonal_(0)
    total, seen = near @ ce, near @ member
    typical = total.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    foreseen = (total + _PRIOR * typical) / (seen + _PRIOR)
    z = foreseen.mean(1) + (ce - foreseen * member).sum(1) / count
    squares = (weight[1:] * weight[:-1] * z.diff().square()).sum() / 2
    return (weight * z).sum(), squares * draws / (draws - 1)
