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
    result = fit(GRID, SHAPES[shape], family=family, mix=0.05)
    assert result.kl <= result.kl_uniform + 1e-9
    t = torch.linspace(0, 1, 1001).double()
    assert result.density(t).min() >= 0.05 * (1 - 1e-9)
    if shape in ("rising", "falling", "U"):
        assert result.kl < 0.1 * result.kl_uniform


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=10, max_size=10).filter(lambda w: max(w) > 1e-3))
def test_any_probe_gives_a_density(w):
    for family in ("epr", "piecewise"):
        t = probe_grid(family, 10)
        result = fit(t, torch.tensor(w), family=family, mix=0.05)
        assert float(result.density.cdf(torch.ones(1).double())) == pytest.approx(1, abs=1e-6)
        assert result.kl <= result.kl_uniform + 1e-9


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
