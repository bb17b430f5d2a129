import pytest
import torch

from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Stratified, Uniform, stratified_uniform

SAMPLERS = [Uniform(), Stratified()]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_t_is_in_the_unit_interval_with_weight_one(sampler):
    t, weight = sampler(1000, keyed_generator(0))
    assert t.shape == weight.shape == (1000,)
    assert t.dtype == weight.dtype == torch.float64
    assert ((t >= 0) & (t < 1)).all()
    assert (weight == 1).all()


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_stratified_has_exactly_one_draw_per_stratum(n):
    for seed in range(20):
        t, _ = Stratified()(n, keyed_generator(seed))
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
            [s(16, keyed_generator(i))[0].square().mean() for i in range(500)]
        ).var()
        for s in SAMPLERS
    }
    assert means["Stratified"] < 0.02 * means["Uniform"]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_sampler_depends_on_its_generator_alone(sampler):
    torch.manual_seed(1)
    first = sampler(8, keyed_generator(3))[0]
    torch.manual_seed(2)
    assert torch.equal(sampler(8, keyed_generator(3))[0], first)
