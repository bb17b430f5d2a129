"""A toy model small enough for the truth: CE of every position under every mask, in a table."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data.batches import Batch
from mdm_plugin.density import Density, uniform_density
from mdm_plugin.masking import (
    Bernoulli,
    Complement,
    FixedCount,
    Independent,
    Mirror,
    Rotation,
    Systematic,
)
from mdm_plugin.timesteps import Adaptive, ParetoOptimal, Stratified, Uniform
from mdm_plugin.training.corruption import corrupt

ELBO, EPS = uniform_density(), 1e-3


def pareto():
    """P-POTS with a density that is far from uniform at both ends."""
    sampler = ParetoOptimal()
    sampler.density = Density(torch.tensor([0.0, 0.1, 0.6, 1.0]), torch.tensor([5, 1, 0.3, 2.0]))
    return sampler


def adaptive():
    """Adaptive after losses that grow with t."""
    sampler = Adaptive(bins=5, warmup_rows=10)
    t = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler.update(sampler.tally(t, 0.2 + t))
    assert float(sampler.density(ELBO)(torch.tensor([0.9]))) > 1.2
    return sampler


SAMPLERS = {
    "Uniform": Uniform(),
    "Stratified": Stratified(),
    "ParetoOptimal": pareto(),
    "Adaptive": adaptive(),
}
BY_RATE = {
    "Bernoulli": Bernoulli(EPS),
    "Mirror": Mirror(EPS),
    "Independent": Independent(EPS),
    "Rotation3": Rotation(3, eps=EPS),
}
BY_COUNT = {
    "Systematic": Systematic(),
    "FixedCount": FixedCount(),
    "Complement": Complement(),
    "Rotation4": Rotation(4, fixed_count=True),
}


class Toy:
    """A row of N tokens, and CE_i(S) for each of its 2^N masks S and each i in S."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n = n
        generator = torch.Generator().manual_seed(seed)
        sets = torch.arange(2**n)[:, None] >> torch.arange(n) & 1  # [2^N, N]
        self.sets = sets.bool()
        # More context, lower CE, and each mask and position its own.
        size = self.sets.sum(1, keepdim=True) / n
        noise = torch.rand(2**n, n, generator=generator, dtype=torch.float64)
        self.ce = (0.2 + 3 * size**2 + 2 * noise) * self.sets

    def codes(self, mask: Tensor) -> Tensor:
        """[..., N] bool → index of the mask."""
        return (mask.long() << torch.arange(self.n)).sum(-1)

    def loss_at(self, p: Tensor) -> Tensor:
        """E_m[l | p] by summing over all masks. p: [K] → [K]."""
        count = self.sets.sum(1)
        p = p[:, None]
        probability = p**count * (1 - p) ** (self.n - count)
        return (probability * self.ce.sum(1)).sum(1) / p[:, 0] / self.n

    def objective(self, eps: float, w=lambda t: torch.ones_like(t), edges=(0.0, 1.0)) -> float:
        """J_w = ∫ w(t)·E_m[l | p(t)] dt; w is polynomial between edges, so that Gauss is exact."""
        import numpy

        nodes, weights = numpy.polynomial.legendre.leggauss(self.n + 4)
        total = 0.0
        for low, high in pairwise(edges):
            t = torch.tensor((nodes + 1) / 2) * (high - low) + low
            values = w(t) * self.loss_at((1 - eps) * t + eps) * torch.tensor(weights / 2)
            total += (high - low) * float(values.sum())
        return total

    def objective_by_counts(self) -> float:
        """The closed form at eps = 0: (1/N) Σ_l (1/l) · mean over |S| = l of Σ CE."""
        count, total = self.sets.sum(1), self.ce.sum(1)
        return sum(float(total[count == k].mean()) / k for k in range(1, self.n + 1)) / self.n


@cache  # a call for each group takes longer than all that follows, whatever the mask
def draws(sampler, w: Density, groups: int, size: int, seed: int) -> Times:
    """The t of ``groups`` global batches, one after another."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [sampler(size, generator, w) for _ in range(groups)]
    t, weight = (torch.cat([x[i] for x in drawn]) for i in range(2))
    return Times(t, weight, drawn[0].density)


def row_losses(
    toy: Toy, sampler, masking, loss, *, groups: int, size: int, seed: int = 0, w: Density = ELBO
) -> Tensor:
    """The row losses of ``groups`` global batches of ``size`` copies of the toy's row, as
    training computes them: a draw of t, and ``corrupt``. [groups, size], fp64."""
    times, rows = draws(sampler, w, groups, size, seed), groups * size
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    u = torch.rand(rows, toy.n, generator=generator, dtype=torch.float64)
    eligible = torch.ones(rows, toy.n, dtype=torch.bool)
    tokens = torch.arange(toy.n).repeat(rows, 1)  # the label of a position is its index
    batch = Batch(tokens, eligible, None, u, torch.arange(rows))
    found = corrupt(batch, times, Estimator(sampler, masking, loss, -1, w))
    targets = found.targets
    mask = torch.zeros(len(found.noisy), toy.n, dtype=torch.bool)
    mask.view(-1)[targets.positions] = True
    ce = toy.ce[toy.codes(mask)[targets.rows], targets.labels]
    result = torch.zeros(rows, dtype=torch.float64)
    result.index_add_(0, targets.rows % rows, targets.weights.double() * ce)
    return result.reshape(groups, size)


def z_score(losses: Tensor, truth: float) -> float:
    """Distance of the mean over independent groups from the truth, in standard errors."""
    means = losses.mean(1)
    return float((means.mean() - truth) / (means.std() / len(means) ** 0.5))
