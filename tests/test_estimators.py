"""Every sampler of t with every mask is an estimator of the same objective: exact enumeration."""

import pytest
import torch

from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, FixedCount, Mirror, Views, masking_rate
from mdm_plugin.timesteps import Stratified, Uniform
from tests.toy import Toy, row_losses, z_score

GROUPS, SIZE = 16_384, 8  # 131,072 draws
EPS = 1e-3
TOY = Toy(6)


def test_the_two_exact_objectives_agree_where_they_must():
    assert TOY.objective(eps=0.0) == pytest.approx(TOY.objective_by_counts(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("masking", [Bernoulli(EPS), Mirror(EPS)], ids=["Bernoulli", "Mirror"])
@pytest.mark.parametrize("sampler", [Uniform(), Stratified()], ids=["Uniform", "Stratified"])
def test_unbiased(sampler, masking, n):
    toy = Toy(n)
    losses = row_losses(toy, sampler, masking, MDMLoss(), groups=GROUPS, size=SIZE)
    assert abs(z_score(losses, toy.objective(EPS))) < 4


@pytest.mark.parametrize("sampler", [Uniform(), Stratified()], ids=["Uniform", "Stratified"])
def test_fixed_count_is_unbiased_for_the_objective_without_eps(sampler):
    losses = row_losses(TOY, sampler, FixedCount(), MDMLoss(), groups=GROUPS, size=SIZE)
    assert abs(z_score(losses, TOY.objective_by_counts())) < 4


class TruncatedUniform:
    """Wrong: t ~ U(0.1, 1) taken for U(0, 1)."""

    def __call__(self, n, generator):
        t = 0.1 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
        return t, torch.ones_like(t)


class WrongPair:
    """Wrong: the second mask has rate 1 − p, and the weight of p."""

    def __call__(self, t, u, eligible):
        p = masking_rate(t, EPS)
        mask = torch.stack((u < p[:, None], u >= p[:, None])) & eligible
        return Views(mask, (1 / p).expand(2, -1))


@pytest.mark.parametrize(
    ("sampler", "masking", "loss"),
    [
        (TruncatedUniform(), Bernoulli(EPS), MDMLoss()),
        (Uniform(), WrongPair(), MDMLoss()),
        (Uniform(), Bernoulli(EPS), MDMLoss(weight="ones")),
    ],
    ids=["truncated support", "wrong second rate", "no 1/p"],
)
def test_the_same_test_fails_a_wrong_estimator(sampler, masking, loss):
    losses = row_losses(TOY, sampler, masking, loss, groups=GROUPS, size=SIZE)
    assert abs(z_score(losses, TOY.objective(EPS))) > 4


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

    pair = Mirror(EPS)(t, u[0], eligible).mask
    mirrored = (loss_of(pair[0]) + loss_of(pair[1])) / 2
    independent = sum(loss_of(Bernoulli(EPS)(t, u[i], eligible).mask[0]) for i in range(2)) / 2
    assert mirrored.var() < 0.5 * independent.var()
