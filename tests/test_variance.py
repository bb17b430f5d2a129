"""The decomposition against exact enumeration: several rows, all masks, t by quadrature."""

import numpy
import pytest
import torch

from mdm_plugin.masking import masking_rate
from mdm_plugin.timesteps import Stratified, Uniform
from mdm_plugin.variance import Draws, contributions, decompose, noise_scale, ratio, signal
from tests.toy import ELBO, Toy

EPS, N, ROWS = 0.2, 4, 8  # a large eps: light tails, so that 4 standard errors mean something
TOYS = [Toy(N, seed) for seed in range(5)]
for toy, scale in zip(TOYS, (0.5, 1, 1.5, 2, 4), strict=True):  # the data differ
    toy.ce = toy.ce * scale
LOSSES = torch.stack([toy.ce.sum(1) / N for toy in TOYS])  # before 1/p, [rows, masks]


def exact(stratified: bool) -> list[float]:
    """A, B, C of a batch of ROWS, times ROWS."""
    nodes, weights = numpy.polynomial.legendre.leggauss(40)
    mean, square, squared_mean, by_stratum = 0, 0, 0, 0
    for stratum in range(ROWS):
        t = (torch.tensor(nodes + 1) / 2 + stratum) / ROWS
        weight = torch.tensor(weights) / 2
        p = masking_rate(t, EPS)[:, None]
        count = TOYS[0].sets.sum(1)
        probability = p**count * (1 - p) ** (N - count)  # [t, masks]
        first = probability @ (LOSSES.T) / p  # E_m[l | x0, t], [t, rows]
        second = probability @ (LOSSES.T**2) / p**2
        mean = mean + weight @ first / ROWS
        square = square + weight @ second / ROWS
        squared_mean = squared_mean + weight @ first**2 / ROWS
        by_stratum = by_stratum + (weight @ first).mean() ** 2 / ROWS
    a = (square - squared_mean).mean()
    b = (squared_mean - mean**2).mean()
    c = (mean**2).mean() - mean.mean() ** 2
    gain = by_stratum - mean.mean() ** 2  # what strata take from B
    return [float(a), float(b - (gain if stratified else 0)), float(c)]


def drawn(sampler, groups: int, seed: int) -> Draws:
    generator = torch.Generator().manual_seed(seed)

    def rows():
        return torch.randint(len(TOYS), (groups, ROWS), generator=generator)

    def times():
        return torch.stack([sampler(ROWS, generator, ELBO)[0] for _ in range(groups)])

    def loss(x, t):
        p = masking_rate(t, EPS)
        u = torch.rand(groups, ROWS, N, generator=generator, dtype=torch.float64)
        code = TOYS[0].codes(u < p[..., None])
        return (LOSSES[x, code] / p).mean(1, keepdim=True)

    x, other, t = rows(), rows(), times()
    return Draws(loss(x, t), loss(x, t), loss(x, times()), loss(other, times()))


@pytest.mark.parametrize("sampler", [Uniform(), Stratified()], ids=["Uniform", "Stratified"])
def test_parts_agree_with_enumeration(sampler):
    contributed = contributions(drawn(sampler, 40_000, seed=1), ROWS)
    truth = exact(isinstance(sampler, Stratified))
    mean, error = contributed.mean(0), contributed.std(0) / len(contributed) ** 0.5
    for i, value in enumerate([*truth, sum(truth)]):
        assert abs(float(mean[i]) - value) < 4 * float(error[i]), (i, mean, truth)
    # The test can tell the samplers apart.
    other = exact(not isinstance(sampler, Stratified))
    assert abs(float(mean[1]) - other[1]) > 4 * float(error[1])


def test_a_b_and_c_add_up_to_the_total_within_the_intervals():
    d = decompose(contributions(drawn(Uniform(), 2000, seed=2), ROWS))
    assert d.sum.value == pytest.approx(d.A.value + d.B.value + d.C.value)
    assert d.sum.low < d.total.value < d.sum.high or d.total.low < d.sum.value < d.total.high
    assert d.variance.value == pytest.approx((d.sum.value + d.total.value) / 2)


def test_intervals_hold_the_truth_as_often_as_they_say():
    truth, hits = sum(exact(True)), 0
    for seed in range(100):
        d = decompose(contributions(drawn(Stratified(), 200, seed=seed), ROWS))
        hits += d.variance.low <= truth <= d.variance.high
    assert hits >= 85  # 95 % less the bootstrap's shortfall at heavy tails, and 4 errors


def test_coordinates_add_up_and_small_batches_are_unbiased():
    """Sharded gradients: contributions are sums over coordinates; G = 2 has the same mean."""
    generator = torch.Generator().manual_seed(0)
    wide = Draws(*(torch.randn(6, 10, generator=generator) for _ in range(4)))
    halves = [Draws(*(x[:, part] for x in wide)) for part in (slice(0, 3), slice(3, 10))]
    whole = contributions(wide, 4)
    assert torch.allclose(whole, contributions(halves[0], 4) + contributions(halves[1], 4))
    many = [
        contributions(Draws(*(torch.randn(2, 3, generator=generator) for _ in range(4))), 1)
        for _ in range(4000)
    ]
    mean = torch.cat(many).mean(0)  # four independent standard normals in 3 dimensions
    assert torch.allclose(mean, torch.tensor([3.0, 0.0, 0.0, 3.0]).double(), atol=0.2)


def test_ratio_cancels_what_is_shared():
    contributed = contributions(drawn(Uniform(), 500, seed=3), ROWS)
    same = ratio(3 * contributed, contributed, factor=2)
    assert same.value == pytest.approx(6) and same.low == pytest.approx(6)


def gaussian(mean: float, groups: int, seed: int) -> Draws:
    """Means of 4 rows with the parts A = 3, B = 2, C = 1 in each of 5 coordinates of a row."""
    generator = torch.Generator().manual_seed(seed)

    def part(variance):
        return torch.randn(groups, 5, generator=generator).double() * (variance / 4) ** 0.5

    rows, times = part(1), part(2)
    return Draws(
        mean + rows + times + part(3),
        mean + rows + times + part(3),
        mean + rows + part(2) + part(3),
        mean + part(1) + part(2) + part(3),
    )


def test_signal_and_noise_scale_are_what_a_gaussian_has():
    draws = gaussian(0.7, 4_000, seed=0)
    products, contributed = signal(draws), contributions(draws, 4)
    error = float(products.std()) / len(products) ** 0.5
    assert abs(float(products.mean()) - 5 * 0.7**2) < 4 * error
    scale = noise_scale(contributed, products)
    assert scale.low < 5 * 6 / (5 * 0.7**2) < scale.high
    assert scale.high - scale.low < 4
    assert (
        noise_scale(contributions(gaussian(0.0, 500, 1), 4), signal(gaussian(0.0, 500, 1))) is None
    )


def test_one_row_twice_in_the_signal_would_be_caught():
    """The products with draws that share rows hold C / n besides."""
    draws = gaussian(0.7, 40_000, seed=2)
    products = (draws.first * draws.redrawn).sum(1)
    error = float(products.std()) / len(products) ** 0.5
    assert float(products.mean()) - 5 * 0.7**2 > 4 * error
