import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_plugin.pareto import EPR, divergence, fit, fit_epr, moments, probe_grid

GRID = probe_grid("epr", 30)


@pytest.mark.parametrize(
    "truth",
    [
        EPR(A=1, k=1, m=2, a=1, r=2, b=5, q=8),
        EPR(A=0.2, k=0.1, m=1.2, a=0.01, r=1.1, b=10, q=30),
        EPR(A=1, k=3, m=2, a=0.1, r=1.5, b=0.1, q=1.5),
        EPR(A=0.5, k=2, m=1.1, a=3, r=4, b=2, q=3),
    ],
)
def test_epr_is_found_again(truth):
    t = GRID
    w = (truth.A * (truth.k * t**truth.m).exp()) ** 2
    w = (w + truth.a * t**truth.r + truth.b * (1 - t) ** truth.q).sqrt()
    found, kl = fit_epr(t, w)
    assert kl <= 1e-3
    scaled = found.root(t) / found.root(t).mean() * w.mean()
    assert torch.allclose(scaled, w, rtol=0.02)


SHAPES = {
    "rising": GRID,
    "falling": 1 - GRID,
    "U": (GRID - 0.5).abs() + 0.01,
    "flat": torch.ones(30),
    "zero below a half": (GRID > 0.5).double(),
    "zero at one end": torch.cat((torch.zeros(1), torch.ones(29))),
    "steep": GRID**-0.5,
    "one point": torch.eye(30)[3],
}


@pytest.mark.parametrize("family", ["epr", "piecewise"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_is_never_worse_than_uniform(shape, family):
    w = SHAPES[shape].double()
    density = fit(GRID, w, family=family, mix=0.05).density
    assert density(FINE).min() >= 0.05 * (1 - 1e-9)
    # On all of (0, 1): w is what it is at the probe's nearest end beyond it.
    assert moment(density, lambda t: torch.from_numpy(numpy.interp(t, GRID, w))) <= 1 + 1e-9
    if shape in ("rising", "falling", "U"):
        none = divergence(w, torch.zeros_like(w), GRID)
        assert divergence(w, density(GRID).log(), GRID) < 0.1 * none


TRUE = {
    "flat": torch.ones_like,
    "falling": lambda t: (t + 0.001) ** -0.5,
    "rising": EPR(A=1, k=1.2, m=2, a=0.5, r=2, b=1e-9, q=3).root,
    "U": EPR(A=0.5, k=0.1, m=1.5, a=4, r=6, b=4, q=8).root,
    "bell": lambda t: 0.3 + torch.exp(-(((t - 0.5) / 0.15) ** 2) / 2),
    "steep": EPR(A=1, k=0.2, m=1.5, a=0.1, r=2, b=60, q=30).root,
}
FINE = torch.linspace(0, 1, 20_001, dtype=torch.float64) ** 3


def moment(density, truth):
    """∫ w²/q over (0, 1) for the true w, over the uniform density's ∫ w²."""
    square = truth(FINE).square()
    return float(torch.trapezoid(square / density(FINE), FINE) / torch.trapezoid(square, FINE))


def a_probe(truth, t, seed, noise):
    normal = torch.randn(len(t), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return truth(t) * (1 + noise * normal).clamp(min=0)


@pytest.mark.parametrize(
    ("shape", "seed", "noise", "most"),
    [
        # A rise past the probe's last point was fitted here, to moments of 2 to 5.
        *[("flat", 10516, 0.3, 1.05), ("rising", 10614, 0.3, 0.95)],
        *[("U", 10063, 0.3, 0.95), ("U", 501, 0.15, 0.95)],
        *[("falling", 0, 0.3, 0.8), ("bell", 0, 0.3, 1.05), ("steep", 0, 0.3, 0.8)],
    ],
)
def test_an_epr_of_a_noisy_probe_has_no_spike_outside_the_probed_span(shape, seed, noise, most):
    w = a_probe(TRUE[shape], GRID, seed, noise)
    density = fit(GRID, w, family="epr", mix=0.05).density
    assert moment(density, TRUE[shape]) <= most
    share = density(FINE) / density(FINE.clamp(GRID[0], GRID[-1]))
    assert share.max() <= 1.51 and share.min() >= 0.99  # of q at the nearest end


@pytest.mark.parametrize("shape", TRUE)
def test_a_piecewise_density_does_not_follow_the_noise_of_its_probe(shape):
    t = probe_grid("piecewise", 30)
    found = []
    for seed in range(30):
        w = a_probe(TRUE[shape], t, seed, 0.3)
        found.append(moment(fit(t, w, family="piecewise", mix=0.05).density, TRUE[shape]))
    assert max(found) <= 1.05
    assert sorted(found)[15] <= (1 if shape == "flat" else 0.95)


@pytest.mark.parametrize("family", ["epr", "piecewise"])
@pytest.mark.parametrize("shape", ["flat", "falling"])
def test_the_counts_of_a_noisy_probe_are_not_worse_than_uniform_ones(shape, family):
    """Σ over counts l of w(l)²/(N²·p(l)), p(l) the density's part for l."""
    n, t = 12, probe_grid(family, 30)
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    of_count = TRUE[shape](middle)
    w = a_probe(lambda t: of_count[(t * n).long()], t, 10516, 0.3)
    density = fit(t, w, family=family, mix=0.05).density
    p = density.cdf(torch.arange(n + 1, dtype=torch.float64) / n).diff()
    ratio = float((of_count.square() / p).sum() / n / of_count.square().sum())
    assert ratio <= (1.05 if shape == "flat" else 0.9)


def test_the_uniform_share_is_what_was_asked_for_and_more_where_a_probe_shows_noise_alone():
    t = probe_grid("piecewise", 30)
    assert fit(t, 1 + 5 * t, family="piecewise", mix=0.05).mix == 0.05
    shares = [
        fit(t, a_probe(torch.ones_like, t, seed, 0.3), family="piecewise", mix=0.05).mix
        for seed in range(10)
    ]
    assert sorted(shares)[5] == 1


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=10, max_size=10).filter(lambda w: max(w) > 1e-3))
def test_any_probe_gives_a_density(w):
    for family in ("epr", "piecewise"):
        t = probe_grid(family, 10)
        result = fit(t, torch.tensor(w), family=family, mix=0.05)
        assert float(result.density.cdf(torch.ones(1).double())) == pytest.approx(1, abs=1e-6)
        assert 0.05 <= result.mix <= 1 and result.density(FINE).min() >= 0.05 * (1 - 1e-9)


@pytest.mark.parametrize("w", [torch.zeros(30), torch.full((30,), float("nan"))])
def test_a_broken_probe_is_refused(w):
    with pytest.raises(ValueError, match="second moments"):
        fit(GRID, w, family="epr", mix=0.05)


def test_grids():
    assert GRID[0] == pytest.approx(1 / 30) and GRID[-1] == pytest.approx(29 / 30)
    fine = probe_grid("piecewise", 30)
    assert fine[0] < 1e-3 and fine[-1] < 1 and (fine.diff() > 0).all()


def test_moments_count_draws_without_a_mask_as_zero():
    losses = torch.tensor([[[0.0, 4.0], [2.0, 2.0]]]).double()  # one t, two rows, two masks
    g, v = moments(losses)
    assert g.tolist() == [2.0] and v.tolist() == [4.0]


def test_divergence_is_zero_for_the_same_shape_and_positive_else():
    w = GRID + 1
    assert float(divergence(w, (3 * w).log(), GRID)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(w, torch.zeros(30).double(), GRID)) > 0.01
