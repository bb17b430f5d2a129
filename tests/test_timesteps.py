import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.density import Density, count_weight, uniform_density
from mdm_plugin.noise import keyed_generator
from mdm_plugin.objectives import Widening, Window
from mdm_plugin.timesteps import (
    Adaptive,
    ParetoOptimal,
    Stratified,
    Uniform,
    stratified_uniform,
)
from tests.toy import ELBO

SAMPLERS = [Uniform(), Stratified()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_t_is_in_the_unit_interval_with_weight_one(sampler):
    t, weight, density = sampler(1000, keyed_generator(0), ELBO)
    assert density is None and not sampler.weighted
    assert t.shape == weight.shape == (1000,)
    assert t.dtype == weight.dtype == torch.float64
    assert ((t >= 0) & (t < 1)).all()
    assert (weight == 1).all()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_stratified_has_exactly_one_draw_per_stratum(n):
    for seed in range(20):
        t = Stratified()(n, keyed_generator(seed), ELBO).t
        assert sorted((t * n).long().tolist()) == list(range(n))


def test_each_place_of_a_stratified_batch_is_uniform():
    """Kolmogorov distance of each place's draws to U(0, 1), at the 99.9 % limit."""
    draws = torch.stack([stratified_uniform(4, keyed_generator(i)) for i in range(4000)])
    for place in draws.T:
        ordered = place.sort().values
        empirical = torch.arange(1, 4001) / 4000
        assert (ordered - empirical).abs().max() < 1.95 / 4000**0.5


def test_stratification_reduces_the_variance_of_a_batch_mean():
    means = {
        type(s).__name__: torch.stack(
            [s(16, keyed_generator(i), ELBO)[0].square().mean() for i in range(500)]
        ).var()
        for s in SAMPLERS
    }
    assert means["Stratified"] < 0.02 * means["Uniform"]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_sampler_depends_on_its_generator_alone(sampler):
    torch.manual_seed(1)
    first = sampler(8, keyed_generator(3), ELBO)[0]
    torch.manual_seed(2)
    assert torch.equal(sampler(8, keyed_generator(3), ELBO)[0], first)


def density_of(values, mix=0.05):
    x = torch.linspace(0, 1, len(values), dtype=torch.float64).square()
    return Density(x, torch.tensor(values, dtype=torch.float64)).mixed(mix)


DENSITIES = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40).map(density_of)


@settings(max_examples=50, deadline=None)
@given(DENSITIES)
def test_a_mixed_density_is_bounded_below_and_integrates_to_one(density):
    t = torch.cat((torch.linspace(0, 1, 20_001).double(), density.knots)).unique()
    q = density(t)
    assert q.min() >= 0.05 * (1 - 1e-9)
    assert float(torch.trapezoid(q, t)) == pytest.approx(1, abs=1e-6)  # exact: linear in between
    assert torch.allclose(density.cdf(t[1:]), torch.cumulative_trapezoid(q, t), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(DENSITIES, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_quantile_inverts_the_cdf(density, u):
    u = torch.tensor(u, dtype=torch.float64)
    t = density.quantile(u)
    assert ((t >= 0) & (t <= 1)).all()
    assert torch.allclose(density.cdf(t), u, atol=1e-9)
    assert torch.allclose(density.quantile(density.cdf(t)), t, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(DENSITIES, st.integers(1, 30))
def test_count_weights_add_up(density, n):
    """Σ_l p(l) · 1/(N·p(l)) = 1, with p(l) from quadrature."""
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    weight = count_weight(density, t, torch.full((n,), n), ELBO, antithetic=False)
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    p = density.cdf(edges).diff()
    assert torch.allclose(weight * p, torch.full((n,), 1 / n, dtype=torch.float64))


def fitted(values=(5, 1, 0.3, 2.0)):
    sampler = ParetoOptimal()
    sampler.density = density_of(values)
    return sampler


def test_a_million_draws_are_of_the_density():
    """Kolmogorov distance at the 99.9 % limit, of independent draws."""
    density = fitted().density
    n = 1_000_000
    u = torch.rand(n, generator=keyed_generator(4), dtype=torch.float64)
    t = density.quantile(u).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    cdf = density.cdf(t)
    distance = torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max()
    assert distance < 1.95 / n**0.5
    assert ((steps[1:] - t).abs().max()) > 0.05  # which is far from the uniform density


@pytest.mark.parametrize("w", [ELBO, Window(0.2, 0.7)(0.0)], ids=["ELBO", "Window"])
@pytest.mark.parametrize("sampler", [Stratified(), fitted(), Adaptive()])
@pytest.mark.parametrize(("ranks", "accumulation"), [(r, a) for r in (1, 2, 4) for a in (1, 2)])
def test_one_t_per_stratum_of_the_global_batch_for_any_split(sampler, ranks, accumulation, w):
    rows = Rows(([1] * 5, [True] * 5) for _ in range(16))
    per_rank = 16 // ranks // accumulation
    t = []
    for rank in range(ranks):
        batches = GlobalBatches(
            rows, Split(per_rank, ranks, rank, accumulation), Padding(0), seed=0
        )
        drawn, _, density = sampler(batches.size, keyed_generator(0, "t", 3), w)
        t += [drawn[batch.places] for batch in batches.micro_batches(3)]
    t = torch.cat(t)
    s = t if w is ELBO else (t - 0.2) / 0.5
    u = (density or uniform_density()).cdf(s)
    assert sorted((u * 16).long().tolist()) == list(range(16))


def test_pareto_optimal_weights_are_bounded_and_it_wants_a_density_first():
    t, weight, _ = fitted((1e6, 1, 1, 1))(1000, keyed_generator(0), ELBO)
    assert torch.allclose(weight, 1 / fitted((1e6, 1, 1, 1)).density(t))
    assert weight.max() <= 20
    with pytest.raises(RuntimeError, match="probe first"):
        ParetoOptimal()(8, keyed_generator(0), ELBO)


def test_adaptive_learns_where_a_window_cuts_or_opens_a_bin():
    """A sliver of a bin that no row falls into does not keep h uniform; it is as its nearest."""
    sampler = Adaptive(bins=20, warmup_rows=5)
    t = torch.linspace(0.7, 1, 2000, dtype=torch.float64)
    sampler.update(sampler.tally(t, 3 * t**4))
    for w in (Window(0.7, 1.0), Window(0.6999, 1.0), Widening(0.7, 1.0)):
        w = w(1e-4)
        h = sampler.density(w)
        assert not h.is_uniform
        low, high = h(w.cdf(torch.tensor([0.72, 0.98], dtype=torch.float64)))
        assert float(high / low) > 2
    assert sampler.density(Window(0.3, 1.0)(0.0)).is_uniform  # of most of it nothing is known


def test_what_a_narrower_window_leaves_out_does_not_decide_at_its_edge():
    sampler = ParetoOptimal(mix=0.01)
    sampler.density = density_of((100, 1, 1, 1), mix=0.01)  # steep at 0
    w = Window(0.5, 1.0)(0.0)
    h = sampler(8, keyed_generator(0), w).density
    assert float(h(torch.zeros(1).double())) < 1.1


def test_states_come_back():
    sampler, adaptive = fitted(), Adaptive(bins=4, warmup_rows=1)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    adaptive.update(adaptive.tally(t, 1 + t))
    for one, other in ((sampler, ParetoOptimal()), (adaptive, Adaptive(bins=4, warmup_rows=1))):
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for w in (ELBO, Window(0.3, 1.0)(0.0)):
            drawn = [x(64, keyed_generator(1), w).t for x in (one, other)]
            assert torch.equal(*drawn)


def test_adaptive_finds_the_root_of_the_second_moment():
    sampler = Adaptive(bins=10, decay=0.9, mix=0.01, warmup_rows=5)
    for step in range(100):
        t, weight, _ = sampler(64, keyed_generator(step), ELBO)
        assert step > 0 or (weight == 1).all()
        sampler.update(sampler.tally(t, 3 * t))
    middle = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = sampler.density(ELBO)(middle)
    assert float(high / low) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ParetoOptimal(family="spline"), "family"),
        (lambda: ParetoOptimal(target="both"), "target"),
        (lambda: ParetoOptimal(mix=0), "mix"),
        (lambda: ParetoOptimal(masks=1), "masks"),
        (lambda: ParetoOptimal(refit_every_n_steps=0), "refit"),
        (lambda: Adaptive(decay=1.0), "decay"),
        (lambda: Density(torch.tensor([0.0, 1.0]), torch.zeros(2)), "mass"),
        (lambda: Density(torch.tensor([0.0, 1.0]), torch.tensor([2.0, -1.0])), "negative"),
        (lambda: Density(torch.tensor([0.0, 0.6, 0.4, 1.0]), torch.ones(4)), "from 0 to 1"),
        (lambda: Density(torch.tensor([0.1, 1.0]), torch.ones(2)), "from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
