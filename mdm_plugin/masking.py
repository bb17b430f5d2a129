"""Samplers of masks: which of a row's eligible positions the model has to predict.

    views = masking(t, u, eligible, w)

with t [R] in (0, 1), noise u [R, L] of U(0, 1), eligible [R, L] (bool: the response; prompt and
padding are never masked), and the objective's density w of t, gives V masked views of each row and
the factor that makes each of them unbiased (``Views``). R rows, L positions, V views per row; V
forwards.

To add one, write a ``Masking`` (``mdm_plugin.contract`` says all that it declares) and name it in
the config by dotted path.
"""

import torch
from torch import Tensor

from mdm_plugin.contract import Masking, Views
from mdm_plugin.density import Density, count_place, count_shares, masked_count, opposite_count


def masking_rate(t: Tensor, eps: float = 1e-3) -> Tensor:
    """The linear schedule p(t) = (1 − eps)·t + eps of LLaDA (arXiv 2502.09992)."""
    return (1 - eps) * t + eps


def random_order(u: Tensor, eligible: Tensor) -> Tensor:
    """Each eligible position's place in its row's order of u: a uniform permutation of 0..N−1.

    The positions that are not eligible come after. [R, L], long.
    """
    order = u.masked_fill(~eligible, torch.inf).argsort(1)
    return torch.empty_like(order).scatter_(1, order, torch.arange(u.shape[1]).expand_as(order))


class Bernoulli(Masking):
    """Each eligible position is masked independently with p(t): m_i = 1[u_i < p].

    The paper's *Standard*, and LLaDA's forward process.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        p = masking_rate(t, self.eps)
        mask = (u < p[:, None]) & eligible
        return Views(mask[None], 1 / p[None])


class Mirror(Masking):
    """A pair of negatively correlated masks from the same u, x0 and t (the paper's *MIRROR*).

        m1_i = 1[u_i < p],   m2_i = 1[u_i > 1 − p],   loss (l1 + l2) / 2

    u and 1 − u have the same distribution, so each mask alone is Bernoulli(p) and the pair
    is unbiased. Cov(m1_i, m2_i) = max(0, 2p − 1) − p²  ≤ 0: no position is in both masks for
    p ≤ 1/2, and every position is in at least one for p ≥ 1/2. It acts on A, the variance of
    the masking pattern, and costs two forwards per row.
    """

    views = 2

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        p = masking_rate(t, self.eps)
        mask = torch.stack((u < p[:, None], u > 1 - p[:, None])) & eligible
        return Views(mask, (1 / p).expand(2, -1))


class Independent(Masking):
    """A pair of independent masks from the same x0 and t, loss (l1 + l2) / 2: a control.

    What MIRROR gains over this is due to the negative correlation; the rest of its gain is that
    of a second forward. The second noise is u's lower 27 bits, which are independent of the
    upper 26: u' = 2²⁶·u mod 1 (the first mask is decided by the upper bits but for 2⁻²⁶).
    """

    views = 2

    def __init__(self, eps: float = 1e-3) -> None:
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        p = masking_rate(t, self.eps)
        second = (u * 2**26) % 1
        mask = torch.stack((u < p[:, None], second < p[:, None])) & eligible
        return Views(mask, (1 / p).expand(2, -1))


class Systematic(Masking):
    """Systematic sampling: a grid of step 1/p with one offset, over a random permutation.

    With p = t (w = 1) and o ~ U(0, 1) per row, the position at place r is masked if the grid has a
    point in (r, r + 1]: ⌊(r + 1)·p + o⌋ − ⌊r·p + o⌋ = 1. Each marginal is p, and the count l =
    ⌊N·p + o⌋ is ⌊N·p⌋ or ⌈N·p⌉: the count's own noise, a part of A, is gone. Our reading of the
    paper's *SyRM*, of which only the name and that it acts on A are known to us.

    The weight is not 1/p: at a given p these sets are not Bernoulli's, and CE_i depends on the
    whole set, so 1/p would be biased for J although the marginals are right. Over uniform t the
    count l has the probability P_l = 1/N, for l = N half of that, and J = (1/N)·Σ_l (1/l)·E[Σ CE
    | l] (``FixedCount``) asks for the weight 1/(l·P_l): N/l, and 2 for l = N. No count, no loss.
    For another w, p is uniform within the 1/N of a count of the probability c_l: P_l = (c_l +
    c_{l+1})/2, and the weight c_l/(l·P_l).

    The offset is Σu mod 1 over the eligible positions: uniform, and independent of the
    permutation because it is a symmetric function of u.
    """

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        n = eligible.sum(1)
        t = count_place(t, n, w)
        offset = (u.masked_fill(~eligible, 0).sum(1) % 1)[:, None]
        place, p = random_order(u, eligible), t[:, None]
        points = torch.floor((place + 1) * p + offset) - torch.floor(place * p + offset)
        mask = (points > 0) & eligible
        count = mask.sum(1)
        own, next_one = count_shares(count, n, w), count_shares(count + 1, n, w)
        weight = torch.where(count == n, 1.0, n / count.clamp(min=1))
        weight = weight * (2 * own / (own + next_one).clamp(min=1e-300))
        return Views(mask[None], weight.to(t.dtype)[None])


class FixedCount(Masking):
    """Exactly l positions are masked, l ~ U{1..N}, each set of l equally likely; weight N/l.

    The objective with t integrated out (eps = 0; LLaDA's Eq. 6): ∫₀¹ t^(l−1) (1 − t)^(N−l) dt
    = 1 / (l · C(N, l)), so E_t E_m [1/t · Σ CE] = Σ_l 1/l · mean over |S| = l of Σ CE. Each
    count has the same share of that sum, and no view is empty. It is exact for the NELBO:
    there is no eps. It acts on A and B. For another objective than w = 1, l has the probability
    c_l (``Density.count_cdf``) in place of 1/N, and the weight N/l makes it exact likewise.

    Under a density h of s = W(t), the count l has the probability p(l) = ∫ h over its share c_l of
    (0, 1), and J_w = Σ_l c_l·L_l = E_{l~p}[L_l · c_l/p(l)], L_l = E_m[(1/N)·(N/l)·Σ CE]: the
    importance weight is c_l/p(l). Its variance is least for p(l) ∝ c_l·sqrt(g(l)² + v(l)), the root
    of the second moment of what one view gives at l: ``ParetoOptimal`` probes just that, because it
    probes with the masking in use.
    """

    by_count = True

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        n = eligible.sum(1)
        count = masked_count(t, n, w)
        mask = (random_order(u, eligible) < count[:, None]) & eligible
        return Views(mask[None], (n / count.clamp(min=1)).to(t.dtype)[None])


class Complement(Masking):
    """A pair over one random permutation: its first l positions, and its last l' = N + 1 − l.

    l and l' are both U{1..N}, so each view, with weight N/l and N/l', is ``FixedCount`` and the
    mean of both is unbiased. Every position is masked in one of them (one in both), and a light
    mask is paired with a heavy one. Ours; it acts on A and B, for two forwards per row. For another
    objective than w = 1, l is the count of s = W(t) and l' that of 1 − s: each has the probability
    c_l, and the lighter is still paired with the heavier.

    Under a density h of s, the pair has the importance weight c/p, both of the s that give the same
    pair: 1 / (N·p(l)) for w = 1. The best h is ∝ the root of the pair's second moment, which is the
    same at s and 1 − s; ``ParetoOptimal`` probes the pair.
    """

    views = 2
    by_count = True
    antithetic = True

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        n = eligible.sum(1)
        first, last = masked_count(t, n, w), opposite_count(t, n, w)
        place = random_order(u, eligible)
        mask = torch.stack((place < first[:, None], place >= (n - last)[:, None])) & eligible
        return Views(mask, torch.stack((n / first.clamp(min=1), n / last.clamp(min=1))).to(t.dtype))


class Rotation(Masking):
    """k masks from one u: MIRROR to k views, loss (l1 + … + lk) / k, k forwards per row.

    With Bernoulli masks, m_j = 1[(u + j/k) mod 1 < p]: each alone is Bernoulli(p), and a position
    is masked in ⌊k·p⌋ or ⌈k·p⌉ of the k. With ``fixed_count``, the k masks are l consecutive
    places, from ⌊j·N/k⌋ on, of one random permutation that closes in a ring: each alone is
    ``FixedCount`` of the same l. Ours; it acts on A.

    Args:
        k: number of views, 2 or more.
        fixed_count: masks of l positions in place of Bernoulli masks.
        eps: of the masking rate, for Bernoulli masks.

    Raises:
        ValueError: if k is below 2.
    """

    def __init__(self, k: int = 2, fixed_count: bool = False, eps: float = 1e-3) -> None:
        if k < 2:
            raise ValueError(f"k is {k}: a rotation has 2 views or more")
        self.k = self.views = k
        self.by_count = fixed_count
        self.eps = eps

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        turn = torch.arange(self.k)[:, None, None]
        if not self.by_count:
            p = masking_rate(t, self.eps)
            mask = ((u + turn / self.k) % 1 < p[:, None]) & eligible
            return Views(mask, (1 / p).expand(self.k, -1))
        n = eligible.sum(1)
        count = masked_count(t, n, w)
        ring = n.clamp(min=1)[:, None]
        place = (random_order(u, eligible) - turn * ring // self.k) % ring
        mask = (place < count[:, None]) & eligible
        return Views(mask, (n / count.clamp(min=1)).to(t.dtype).expand(self.k, -1))


class NextToken(Masking):
    """Not diffusion: an autoregressive model's loss, the line to compare variances with.

    Every eligible token is predicted from the clean tokens before it: no masking pattern and no
    masking rate, so A = B = 0. Needs a causal model; t is not used.
    """

    causal = True
    uses_t = False

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        return Views(
            eligible[None], torch.ones(1, len(t), dtype=t.dtype), torch.zeros_like(eligible)[None]
        )
