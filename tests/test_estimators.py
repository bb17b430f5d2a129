"""Every sampler of t with every mask is an estimator of the same objective: exact enumeration."""

import pytest
import torch

from mdm_plugin.contract import Masking, Times, TimestepSampler, Views
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import (
    Bernoulli,
    FixedCount,
    Mirror,
    Systematic,
    masking_rate,
)
from mdm_plugin.objectives import Power
from mdm_plugin.timesteps import Uniform
from tests.toy import BY_COUNT, BY_RATE, ELBO, EPS, SAMPLERS, Toy, pareto, row_losses, z_score

GROUPS, SIZE = 16_384, 8  # 131,072 draws
TOY = Toy(6)


def test_the_two_exact_objectives_agree_where_they_must():
    assert TOY.objective(eps=0.0) == pytest.approx(TOY.objective_by_counts(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("masking", BY_RATE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unbiased(sampler, masking, n):
    toy = Toy(n)
    losses = row_losses(
        toy, SAMPLERS[sampler], BY_RATE[masking], MDMLoss(), groups=GROUPS, size=SIZE
    )
    assert abs(z_score(losses, toy.objective(EPS))) < 4


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("masking", BY_COUNT)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_masks_by_count_are_unbiased_for_the_objective_without_eps(sampler, masking, n):
    toy = Toy(n)
    losses = row_losses(
        toy, SAMPLERS[sampler], BY_COUNT[masking], MDMLoss(), groups=GROUPS, size=SIZE
    )
    error = float(losses.mean()) - toy.objective_by_counts()
    deviation = float(losses.mean(1).std()) / GROUPS**0.5
    assert abs(error) < 4 * deviation + 1e-6  # at N = 1 nothing is random, but fp32 weights are


def test_count_weights_have_less_variance_than_weights_of_t():
    class Plain(FixedCount):
        by_count = False

    drawn = [
        row_losses(TOY, pareto(), masking, MDMLoss(), groups=GROUPS, size=SIZE)
        for masking in (FixedCount(), Plain())
    ]
    assert abs(z_score(drawn[1], TOY.objective_by_counts())) < 4
    assert drawn[0].var() < 0.98 * drawn[1].var()


class SystematicByRate(Systematic):
    """Wrong: systematic masks, each position with rate p, weighted by 1/p."""

    def __call__(self, t, u, eligible, w):
        return super().__call__(t, u, eligible, w)._replace(inverse_p=1 / t[None])


class TruncatedUniform(TimestepSampler):
    """Wrong: t ~ U(0.1, 1) taken for U(0, 1)."""

    def __call__(self, n, generator, w):
        t = 0.1 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
        return Times(t, torch.ones_like(t))


class WithoutP(Bernoulli):
    """Wrong: no 1/p, which is the objective ``Power(1)``, taken for the ELBO."""

    def __call__(self, t, u, eligible, w):
        views = super().__call__(t, u, eligible, w)
        return views._replace(inverse_p=torch.ones_like(views.inverse_p))


class WrongPair(Masking):
    """Wrong: the second mask has rate 1 − p, and the weight of p."""

    views = 2

    def __call__(self, t, u, eligible, w):
        p = masking_rate(t, EPS)
        mask = torch.stack((u < p[:, None], u >= p[:, None])) & eligible
        return Views(mask, (1 / p).expand(2, -1))


@pytest.mark.parametrize(
    ("sampler", "masking", "loss"),
    [
        (TruncatedUniform(), Bernoulli(EPS), MDMLoss()),
        (Uniform(), WrongPair(), MDMLoss()),
        (Uniform(), SystematicByRate(), MDMLoss()),
        (Uniform(), WithoutP(EPS), MDMLoss()),
    ],
    ids=["truncated support", "wrong second rate", "systematic with 1/p", "no 1/p"],
)
def test_the_same_test_fails_a_wrong_estimator(sampler, masking, loss):
    losses = row_losses(TOY, sampler, masking, loss, groups=GROUPS, size=SIZE)
    assert abs(z_score(losses, TOY.objective(EPS))) > 4


def test_a_loss_without_1_over_p_is_half_of_the_objective_power_1():
    losses = row_losses(TOY, Uniform(), WithoutP(0.0), MDMLoss(), groups=GROUPS, size=SIZE)
    truth = TOY.objective(0.0, lambda t: 2 * t)
    assert abs(z_score(2 * losses, truth)) < 4
    w = Power(1.0)(0.0)
    declared = row_losses(TOY, Uniform(), Bernoulli(0.0), MDMLoss(), groups=GROUPS, size=SIZE, w=w)
    assert abs(z_score(declared, truth)) < 4


def test_dropping_rows_that_drew_no_mask_is_caught():
    losses = row_losses(TOY, Uniform(), Bernoulli(EPS), MDMLoss(), groups=GROUPS, size=1)
    kept = losses[losses > 0][:, None]
    assert abs(z_score(kept, TOY.objective(EPS))) > 4


def test_mirror_has_less_variance_than_two_independent_masks():
    t = torch.full((200_000,), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    u = torch.rand(2, len(t), TOY.n, generator=generator, dtype=torch.float64)
    eligible = torch.ones(len(t), TOY.n, dtype=torch.bool)

    def loss_of(mask):
        return TOY.ce[TOY.codes(mask)].sum(1)

    pair = Mirror(EPS)(t, u[0], eligible, ELBO).mask
    mirrored = (loss_of(pair[0]) + loss_of(pair[1])) / 2
    single = [Bernoulli(EPS)(t, u[i], eligible, ELBO).mask[0] for i in range(2)]
    independent = (loss_of(single[0]) + loss_of(single[1])) / 2
    assert mirrored.var() < 0.5 * independent.var()
