"""Objectives: each w is what it says, moves as it says, and is estimated exactly by counts too."""

from itertools import pairwise

import numpy
import pytest
import torch
from scipy.stats import binom

from mdm_plugin.density import (
    TABLES,
    count_shares,
    count_weight,
    masked_count,
    opposite_count,
)
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import (
    Complement,
    FixedCount,
    Systematic,
)
from mdm_plugin.noise import keyed_generator
from mdm_plugin.objectives import ELBO, Bell, Piecewise, Power, Widening, Window
from mdm_plugin.timesteps import Stratified
from tests.toy import BY_COUNT, BY_RATE, EPS, SAMPLERS, Toy, pareto, row_losses, z_score

GROUPS, SIZE = 1024, 32
TOY = Toy(6)
EDGES = (0.0, 0.15, 0.25, 0.4, 0.5, 0.9, 1.0)  # of all windows and knots below

# name: (objective, moment, the formula that it declares)
OBJECTIVES = {
    "Window": (Window(0.4, 1.0), 0.0, lambda t: (t > 0.4) / 0.6),
    "Window inside": (Window(0.15, 0.9), 0.0, lambda t: ((t > 0.15) & (t < 0.9)) / 0.75),
    "Widening, half-way": (Widening(0.5, 1.0), 0.5, lambda t: (t > 0.25) / 0.75),
    "Power(1)": (Power(1.0), 0.0, lambda t: 2 * t),
    "Power(2)": (Power(2.0), 0.0, lambda t: 3 * t**2),
    "Bell": (Bell(2, 2), 0.0, lambda t: 6 * t * (1 - t)),
    "Piecewise": (
        Piecewise([0, 0.5, 0.5, 1], [0, 1, 3, 3], [0, 1, 1, 1]),
        0.0,
        lambda t: torch.where(t < 0.5, 2 * t, 3.0) / 1.75,
    ),
}
DENSITIES = {name: objective(at) for name, (objective, at, _) in OBJECTIVES.items()}


MASKINGS = BY_RATE | BY_COUNT


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_mask_is_unbiased_for_the_objective_that_is_declared(
    sampler, masking, name
):
    losses = row_losses(
        TOY,
        SAMPLERS[sampler],
        MASKINGS[masking],
        MDMLoss(),
        groups=GROUPS,
        size=SIZE,
        w=DENSITIES[name],
    )
    eps = EPS if masking in BY_RATE else 0.0
    assert abs(z_score(losses, TOY.objective(eps, OBJECTIVES[name][2], EDGES))) < 4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_here_has_the_value_of_the_elbo(name):
    losses = row_losses(
        TOY, Stratified(), FixedCount(), MDMLoss(), groups=GROUPS, size=SIZE, w=DENSITIES[name]
    )
    assert abs(z_score(losses, TOY.objective(0.0))) > 4


class CountOfT(FixedCount):
    """Wrong: the count ⌊t·N⌋ + 1 whatever the objective, which t ~ w gives other shares."""

    def __call__(self, t, u, eligible, w):
        return super().__call__(t, u, eligible, ELBO()(0.0))


class LastOfComplement(Complement):
    """Wrong: N + 1 − l whatever the objective."""

    def __call__(self, t, u, eligible, w):
        views = super().__call__(t, u, eligible, w)
        count = views.mask[0].sum(1)
        other = super().__call__((eligible.shape[1] - count + 0.5) / 6, u, eligible, ELBO()(0.0))
        return views._replace(
            mask=torch.stack((views.mask[0], other.mask[0])),
            inverse_p=torch.stack((views.inverse_p[0], other.inverse_p[0])),
        )


@pytest.mark.parametrize("masking", [CountOfT(), LastOfComplement()], ids=["count", "pair"])
def test_the_same_test_fails_masks_that_ignore_the_objective(masking):
    losses = row_losses(
        TOY, Stratified(), masking, MDMLoss(), groups=GROUPS, size=SIZE, w=Window(0.4, 1.0)(0.0)
    )
    truth = TOY.objective(0.0, OBJECTIVES["Window"][2], EDGES)
    assert abs(z_score(losses, truth)) > 4


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_share_of_a_count_is_the_integral_that_it_is_defined_by(name, n):
    """c_l = ∫ w(t)·Binom(l − 1; n − 1, t) dt by quadrature; scipy's binomial is the truth."""
    objective, moment, w = OBJECTIVES[name]
    nodes, weights = numpy.polynomial.legendre.leggauss(80)
    expected = numpy.zeros(n)
    for low, high in pairwise(EDGES):
        t = (nodes + 1) / 2 * (high - low) + low
        mass = w(torch.tensor(t)).double().numpy() * weights / 2 * (high - low)
        expected += (mass[:, None] * binom.pmf(numpy.arange(n), n - 1, t[:, None])).sum(0)
    counts, size = torch.arange(1, n + 1), torch.full((n,), n)
    found = count_shares(counts, size, objective(moment))
    assert found.numpy() == pytest.approx(expected, abs=2e-5)  # Power(2), Bell: 257 knots
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


def test_counts_and_rates_differ_less_as_rows_grow():
    """A hard window of counts would be off by as much as the binomial is wide: ~ N^(−1/2)."""
    w, apart = Window(0.4, 1.0)(0.0), []
    for n in (16, 64, 256, 1024):
        counts = torch.arange(1, n + 1)
        exact = count_shares(counts, torch.full((n,), n), w)
        hard = w.cdf(torch.arange(n + 1, dtype=torch.float64) / n).diff()
        apart.append(float((exact - hard).abs().sum() / 2))
    ratios = [b / a for a, b in pairwise(apart)]
    assert ratios == pytest.approx([0.5] * 3, abs=0.1)


def test_count_weights_are_the_ratio_of_probabilities_of_the_count():
    """c_l / p(l) of a brute-force count over a fine grid of s; for a pair, of the pair."""
    w, h, n = Window(0.2, 0.9)(0.0), pareto().density, 9
    s = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    t, size = w.quantile(s), torch.full((len(s),), n)
    first, last = masked_count(t, size, w), opposite_count(t, size, w)
    for antithetic, event in ((False, first), (True, first * 100 + last)):
        index = event.unique(return_inverse=True)[1]
        share = torch.bincount(index).double()
        mass = torch.zeros_like(share).index_add_(0, index, h(s))
        pick = torch.arange(0, len(s), 9973)
        found = count_weight(h, t[pick], size[pick], w, antithetic)
        expected = (share / mass)[index[pick]]
        common = share[index[pick]] > 2000  # elsewhere the grid is too coarse
        assert torch.allclose(found[common], expected[common], rtol=2e-3)
        assert common.double().mean() > 0.95


@pytest.mark.parametrize("name", OBJECTIVES)
def test_quantile_and_cdf_of_an_objective_are_each_others_inverse(name):
    objective, moment, w = OBJECTIVES[name]
    density = objective(moment)
    s = torch.rand(1000, generator=keyed_generator(0), dtype=torch.float64)
    t = density.quantile(s)
    assert torch.allclose(density.cdf(t), s, atol=1e-10)
    assert (density(t) > 0).all()
    assert torch.allclose(density(t), w(t).double(), atol=2e-3, rtol=1e-3)
    edges = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert density.cdf(edges).tolist() == pytest.approx([0, 1], abs=1e-12)
    assert density.quantile(edges).isfinite().all()


def test_a_widening_window_ends_at_the_elbo():
    objective = Widening(0.5, 1.0, over=0.8)
    assert objective(0.0).quantile(torch.zeros(1).double()).item() == 0.5
    assert objective(0.4).quantile(torch.zeros(1).double()).item() == 0.25
    assert objective(0.8).is_uniform and objective(1.0).is_uniform
    moving = Piecewise([0, 1], [0, 2], [1, 1])
    assert moving(0.5).values.tolist() == [0.5, 1.5] and moving(1.0).is_uniform


def test_pareto_optimal_is_unbiased_for_a_window_that_has_moved_since_its_probe():
    sampler, moved = pareto(), Widening(0.5, 1.0)(0.6)
    sampler.probed_at = Window(0.5, 1.0)(0.0)
    losses = row_losses(TOY, sampler, FixedCount(), MDMLoss(), groups=GROUPS, size=SIZE, w=moved)
    edges = (0.0, 0.2, 1.0)
    assert abs(z_score(losses, TOY.objective(0.0, lambda t: (t > 0.2) / 0.8, edges))) < 4
    # What it has learnt of t it keeps: h at the same t is in the same proportion.
    h = sampler(8, keyed_generator(0), moved).density
    t = torch.tensor([0.55, 0.8], dtype=torch.float64)
    before = sampler.density(sampler.probed_at.cdf(t))
    after = h(moved.cdf(t))
    lam = sampler.mix
    kept = (after - lam) / (1 - lam)
    assert float(kept[0] / kept[1]) == pytest.approx(float(before[0] / before[1]), rel=0.02)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Window(0.8, 0.3), "low and high"),
        (lambda: Widening(0.5, 1.2), "low and high"),
        (lambda: Widening(over=0.0), "over"),
        (lambda: Power(-0.5), "0 or more"),
        (lambda: Bell(0.5, 2), "1 or more"),
        (lambda: Piecewise([0, 1], [1, 1, 1]), "as many"),
        (lambda: Piecewise([0, 1], [0, 0]), "mass"),
        (lambda: Piecewise([0, 1], [1, -1]), "negative"),
    ],
)
def test_values_out_of_range_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_end_of_a_window_gives_a_count_that_has_a_share():
    """t = 1 is beyond (0.1, 0.3): the last count with a share, for each kind of mask by count."""
    w, n = Window(0.1, 0.3)(0.0), 40
    assert w.knots[1].item() == 0.1  # in fp64
    t, size = torch.ones(3, dtype=torch.float64), torch.full((3,), n)
    count = masked_count(t, size, w)
    assert (count_shares(count, size, w) > 0).all()
    u = torch.rand(3, n, generator=keyed_generator(1), dtype=torch.float64)
    views = Systematic()(t, u, torch.ones(3, n, dtype=torch.bool), w)
    assert views.inverse_p.isfinite().all() and (views.mask[0].sum(1) > 0).all()


def test_a_density_keeps_the_tables_of_some_lengths():
    w = Window(0.4, 1.0)(0.0)
    for n in range(1, TABLES + 40):
        w.count_cdf(n)
    assert len(w._tables) == TABLES
