"""Samplers of masks: which of a row's eligible positions the model has to predict.

    views = masking(t, u, eligible)

with t [R] in (0, 1), noise u [R, L] of U(0, 1), and eligible [R, L] (bool: the response;
prompt and padding are never masked) gives V masked views of each row and the factor that
makes each of them unbiased (``Views``). R rows, L positions, V views per row; V forwards.

Noise comes in as an argument, so that it can be a function of (seed, step, place).
To add a mask, write a class with this ``__call__`` and name it in the config by dotted path.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Views(NamedTuple):
    """V masked views of each of R rows.

    mask: [V, R, L], bool, true where the token is replaced by the mask token.
    inverse_p: [V, R], fp64, 1 / (the share of positions masked in expectation). The row loss
        of view v is ``inverse_p[v] / N · Σ CE`` over its masked positions, and the estimator
        is the mean over views.
    """

    mask: Tensor
    inverse_p: Tensor


def masking_rate(t: Tensor, eps: float = 1e-3) -> Tensor:
    """The linear schedule p(t) = (1 − eps)·t + eps of LLaDA (arXiv 2502.09992)."""
    return (1 - eps) * t + eps


class Bernoulli:
    """Each eligible position is masked independently with p(t): m_i = 1[u_i < p].

    The paper's *Standard*, and LLaDA's forward process.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor) -> Views:
        p = masking_rate(t, self.eps)
        mask = (u < p[:, None]) & eligible
        return Views(mask[None], 1 / p[None])


class Mirror:
    """A pair of negatively correlated masks from the same u, x0 and t (the paper's *MIRROR*).

        m1_i = 1[u_i < p],   m2_i = 1[u_i > 1 − p],   loss (l1 + l2) / 2

    u and 1 − u have the same distribution, so each mask alone is Bernoulli(p) and the pair
    is unbiased. Cov(m1_i, m2_i) = max(0, 2p − 1) − p²  ≤ 0: no position is in both masks for
    p ≤ 1/2, and every position is in at least one for p ≥ 1/2. It acts on A, the variance of
    the masking pattern, and costs two forwards per row.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor) -> Views:
        p = masking_rate(t, self.eps)
        mask = torch.stack((u < p[:, None], u > 1 - p[:, None])) & eligible
        return Views(mask, (1 / p).expand(2, -1))


class FixedCount:
    """Exactly l positions are masked, l ~ U{1..N}, each set of l equally likely; weight N/l.

    The objective with t integrated out (eps = 0; LLaDA's Eq. 6): ∫₀¹ t^(l−1) (1 − t)^(N−l) dt
    = 1 / (l · C(N, l)), so E_t E_m [1/t · Σ CE] = Σ_l 1/l · mean over |S| = l of Σ CE. Each
    count has the same share of that sum, and no view is empty. It is exact for the NELBO:
    there is no eps. l = ⌊t·N⌋ + 1, so a stratified t gives stratified counts. It takes a
    uniform t; one that carries importance weights is drawn over t, not over counts, and stays
    unbiased too.
    """

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor) -> Views:
        n = eligible.sum(1)
        count = ((t * n).long() + 1).minimum(n)
        # A row's rank order of u over its eligible positions is a uniform permutation.
        order = u.masked_fill(~eligible, torch.inf).argsort(1).argsort(1)
        mask = (order < count[:, None]) & eligible
        return Views(mask[None], (n / count.clamp(min=1)).to(t.dtype)[None])
