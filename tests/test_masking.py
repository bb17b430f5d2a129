import math

import pytest
import torch

from mdm_plugin.masking import (
    Bernoulli,
    Complement,
    FixedCount,
    Independent,
    Mirror,
    NextToken,
    Rotation,
    Systematic,
    masking_rate,
)
from tests.toy import ELBO

R, L = 20_000, 12
GENERATOR = torch.Generator().manual_seed(0)
U = torch.rand(R, L, generator=GENERATOR, dtype=torch.float64)
ELIGIBLE = torch.zeros(R, L, dtype=torch.bool)
ELIGIBLE[:, 3:10] = True  # a prompt before, padding after
N = 7
MASKS = [
    Bernoulli(),
    Mirror(),
    Independent(),
    Systematic(),
    FixedCount(),
    Complement(),
    Rotation(3),
    Rotation(4, fixed_count=True),
]


def rates(p, eps=1e-3):
    """t at which the masking rate is p."""
    return torch.full((R,), (p - eps) / (1 - eps), dtype=torch.float64)


def test_masking_rate_is_llada_s():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert masking_rate(t, 1e-3).tolist() == pytest.approx([0.001, 0.5005, 1.0])


@pytest.mark.parametrize("masking", MASKS, ids=lambda m: type(m).__name__)
def test_only_eligible_positions_are_masked(masking):
    mask, inverse_p, _ = masking(
        torch.rand(R, generator=GENERATOR, dtype=torch.float64), U, ELIGIBLE, ELBO
    )
    assert mask.shape[1:] == (R, L)
    assert inverse_p.shape == mask.shape[:2]
    assert mask.any()
    assert not (mask & ~ELIGIBLE).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    "masking", [Bernoulli(), Mirror(), Independent(), Rotation(3)], ids=lambda m: type(m).__name__
)
def test_each_view_is_bernoulli_p(masking, p):
    """Every position's rate, and every pair of positions' joint rate, within 4 standard errors."""
    for view in masking(rates(p), U, ELIGIBLE, ELBO).mask[..., 3:10].double():
        assert (view.mean(0) - p).abs().max() < 4.5 * (p * (1 - p) / R) ** 0.5
        joint = (view.T @ view) / R
        off = ~torch.eye(N, dtype=torch.bool)
        assert (joint[off] - p * p).abs().max() < 4.5 * (p**2 * (1 - p**2) / R) ** 0.5


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
def test_mirror_s_masks_are_disjoint_or_cover_all(p):
    first, second = Mirror()(rates(p), U, ELIGIBLE, ELBO).mask[..., 3:10]
    if p <= 0.5:
        assert not (first & second).any()
    if p >= 0.5:
        assert (first | second).all()


@pytest.mark.parametrize("p", [0.2, 0.5, 0.7])
def test_mirror_s_correlation_is_as_derived(p):
    """P(both masked) = max(0, 2p − 1): an independent second mask, with p², would fail."""
    first, second = Mirror()(rates(p), U, ELIGIBLE, ELBO).mask[..., 3:10].double()
    both = (first * second).mean().item()
    truth = max(0.0, 2 * p - 1)
    tolerance = 4 * (truth * (1 - truth) / (R * N)) ** 0.5 + 1e-12
    assert abs(both - truth) <= tolerance
    assert abs(p * p - truth) > 10 * tolerance


def test_fixed_count_masks_exactly_l_positions():
    for count in range(1, N + 1):
        t = torch.full((R,), (count - 0.5) / N, dtype=torch.float64)
        mask, inverse_p, _ = FixedCount()(t, U, ELIGIBLE, ELBO)
        assert (mask[0].sum(1) == count).all()
        assert torch.allclose(inverse_p, torch.tensor(N / count, dtype=torch.float64))
        # Each position equally often: a hypergeometric marginal of l/N.
        rate = mask[0][:, 3:10].double().mean(0)
        tolerance = 4.5 * (count / N * (1 - count / N) / R) ** 0.5 + 1e-12
        assert (rate - count / N).abs().max() <= tolerance


def test_fixed_count_at_the_ends_of_t():
    mask, _, _ = FixedCount()(
        torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64), U[:2], ELIGIBLE[:2], ELBO
    )
    assert mask[0].sum(1).tolist() == [1, N]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_systematic_s_count_is_one_of_two_and_its_marginals_are_p(p):
    mask = Systematic()(torch.full((R,), p, dtype=torch.float64), U, ELIGIBLE, ELBO).mask[0]
    counts = mask.sum(1)
    assert set(counts.tolist()) <= {math.floor(N * p + 1e-9), math.ceil(N * p - 1e-9)}
    assert abs(counts.double().mean() - N * p) < 4.5 * 0.5 / R**0.5 + 1e-9
    rate = mask[:, 3:10].double().mean(0)
    assert (rate - p).abs().max() <= 4.5 * (p * (1 - p) / R) ** 0.5 + 1e-12


def test_independent_masks_are_uncorrelated_which_mirror_s_are_not():
    for masking, correlated in ((Independent(), False), (Mirror(), True)):
        first, second = masking(rates(0.4), U, ELIGIBLE, ELBO).mask[..., 3:10].double()
        covariance = float((first * second).mean() - 0.16)
        limit = 4 * (0.16 * 0.84 / (R * N)) ** 0.5
        assert (abs(covariance) > limit) == correlated


def test_complement_covers_all_and_its_counts_add_up_to_n_plus_one():
    t = torch.rand(R, generator=GENERATOR, dtype=torch.float64)
    mask, inverse_p, _ = Complement()(t, U, ELIGIBLE, ELBO)
    first, last = mask.sum(2)
    assert (first + last == N + 1).all()
    assert (mask.any(0) == ELIGIBLE).all()
    assert torch.allclose(inverse_p, N / mask.sum(2).double())
    for counts in (first, last):  # each is U{1..N}
        shares = counts.bincount(minlength=N + 1)[1:].double() / R
        assert (shares - 1 / N).abs().max() < 4.5 * (1 / N * (1 - 1 / N) / R) ** 0.5


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rotation_masks_each_position_as_evenly_as_k_allows(k):
    for p in (0.2, 0.5, 0.9):
        times = Rotation(k)(rates(p), U, ELIGIBLE, ELBO).mask.sum(0)[ELIGIBLE]
        assert set(times.tolist()) <= {math.floor(k * p + 1e-9), math.ceil(k * p - 1e-9)}
    t = torch.rand(R, generator=GENERATOR, dtype=torch.float64)
    mask = Rotation(k, fixed_count=True)(t, U, ELIGIBLE, ELBO).mask
    count = mask.sum(2)
    assert (count == count[0]).all()
    small = count[0] <= N // k  # the views' places on the ring do not meet
    assert small.any() and (mask.sum(0)[small] <= 1).all()


def test_rotation_needs_two_views():
    with pytest.raises(ValueError, match="k is 1"):
        Rotation(1)


def test_next_token_predicts_all_and_hides_nothing():
    views = NextToken()(rates(0.5), U, ELIGIBLE, ELBO)
    assert (views.mask[0] == ELIGIBLE).all() and not views.hidden.any()
    assert (views.inverse_p == 1).all()
