"""Advantages, losses of a policy, published estimates and rewards, against closed forms."""

import time

import pytest
import torch
from omegaconf import DictConfig

from mdm_plugin.alignment import DrawPlan, add_gradient, bounds, drawn
from mdm_plugin.alignment.bounds import token_bounds
from mdm_plugin.alignment.estimates import Coupled, FullyMasked, GaussQuadrature, RoundedCount
from mdm_plugin.alignment.policy import PolicyLoss
from mdm_plugin.alignment.rewards import (
    Reward,
    advantages,
    check_advantages,
    read_rewards,
    reward_answers,
)
from mdm_plugin.alignment.rollouts import Rollout
from mdm_plugin.contract import Estimator
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement, FixedCount
from mdm_plugin.timesteps import Stratified, Uniform
from tests.alignment.test_bounds import MASK, WORLD, copies, grads, model, pairs, toy_bounds
from tests.toy import Toy, z_score


def test_advantages_are_the_formulas_and_answers_without_a_reward_are_left_out():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, torch.nan]).double()
    plain, differs = advantages(rewards, 4)
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert differs.tolist() == [True, False]
    others, _ = advantages(rewards, 4, baseline="leave_one_out")
    for i in range(4):  # r_i minus the mean of the other three
        rest = rewards[:4].sum() - rewards[i]
        assert others[i] == pytest.approx(float(rewards[i] - rest / 3))
    scaled, _ = advantages(rewards, 4, by_deviation=True)
    assert torch.allclose(scaled[:4], plain[:4] / rewards[:4].std())
    whole, differs = advantages(rewards, 4, baseline="none")
    assert whole.tolist() == [1, 0, 0, 1, 1, 1, 1, 0] and differs.tolist() == [True, False]
    for wrong, key in (
        (("median", False, 4), "baseline: median"),
        (("mean", False, 1), "group_size: 1"),
        (("none", True, 4), "by_deviation"),
    ):
        with pytest.raises(UserError, match=key):
            check_advantages(*wrong)
    check_advantages("none", False, 1)
    mixed = torch.tensor([2.0, torch.nan, 1.0, 0.0]).double()
    assert advantages(mixed, 4)[0].tolist() == [1.0, 0.0, 0.0, -1.0]


def terms(loss, new, old, gain, reference=None):
    eligible = torch.ones_like(new, dtype=torch.bool)
    return loss(new, old, reference, gain, eligible)


def test_the_clipped_ratio_is_of_the_sequence_by_its_length_or_of_each_token():
    new = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]]).double()
    old = torch.tensor([[-1.5, -2.5], [-1.0, -0.6]]).double()
    gain = torch.tensor([1.0, -1.0]).double()
    found = terms(PolicyLoss("sequence", 0.2, 0.3), new, old, gain)
    # exp(1/2) is above 1.3 and is clipped; exp(-0.4/2) is above 0.8 and is not.
    assert found.loss.item() == pytest.approx(-1.3 + torch.tensor(-0.2).exp().item())
    assert found.clipped.tolist() == [1.0, 0.0]
    token = terms(PolicyLoss("token", 0.2, 0.3), new, old, gain)
    second = (1 + max(torch.tensor(-0.4).exp().item(), 0.8)) / 2
    assert token.loss.item() == pytest.approx(-1.3 + second)
    assert token.clipped.tolist() == [1.0, 0.5]
    plain = terms(PolicyLoss("none"), new, old, gain)
    assert plain.loss.item() == pytest.approx(1.5 - 1.0)


def test_at_the_old_policy_every_ratio_has_the_gradient_of_the_plain_one():
    new = torch.randn(3, 4, dtype=torch.float64)
    gain = torch.tensor([1.0, -0.5, 0.25]).double()
    found = []
    for ratio in ("sequence", "token", "none"):
        at = new.clone().requires_grad_()
        terms(PolicyLoss(ratio), at, new, gain).loss.backward()
        found.append(at.grad)
    assert torch.allclose(found[0], found[2]) and torch.allclose(found[1], found[2])


def test_divergences_are_k2_and_k3():
    new, reference = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[-1.4, -2.4]]).double()
    gain = torch.zeros(1).double()
    k2 = terms(PolicyLoss("sequence", kl="k2", kl_weight=2.0), new, new, gain, reference)
    assert k2.loss.item() == pytest.approx(2 * 0.4**2 / 2)
    k3 = terms(PolicyLoss("token", kl="k3", kl_weight=1.0), new, new, gain, reference)
    assert k3.loss.item() == pytest.approx(torch.tensor(-0.4).exp().item() + 0.4 - 1)


@pytest.mark.parametrize(
    "wrong",
    [{"ratio": "word"}, {"kl": "k1"}, {"kl": "k2"}, {"kl_weight": 0.1}, {"clip_low": 0.0}],
)
def test_a_policy_loss_refuses_what_it_is_not(wrong):
    with pytest.raises(ValueError, match=r"use|give"):
        PolicyLoss(**wrong)


def test_places_add_up_to_the_bound_and_take_their_own_slopes():
    net, batch, loss = model(0), pairs(3, 7), MDMLoss()
    estimator = Estimator(Stratified(), Complement(), loss, MASK)
    draws = drawn(batch, estimator, DrawPlan(3, 0), ("policy", 0))
    by_token = token_bounds(net, loss, draws, WORLD, ("k",))
    assert not by_token[~batch.eligible].any()
    assert torch.allclose(by_token.sum(1), bounds(net, loss, draws, WORLD, ("k",)).mean(1))
    slopes = torch.randn(by_token.shape, dtype=torch.float64)
    add_gradient(net, loss, draws, slopes, WORLD, ("k",))
    found = grads(net)
    total = torch.zeros((), dtype=torch.float64)
    for noisy in draws.draws:
        targets = noisy.targets
        logits = net(noisy.noisy).double().flatten(0, 1)[targets.positions]
        ce = torch.nn.functional.cross_entropy(logits, targets.labels, reduction="none")
        slope = slopes[targets.rows % 4, targets.positions % 10]
        total = total - (slope * ce * targets.weights.double() * 7 / 3).sum()
    net.zero_grad()
    total.backward()
    assert (found - grads(net)).norm() < 1e-6 * grads(net).norm()


def exact_mean(toy, terms_of):
    """Σ_S P(S)·value by listing all masks. terms_of: set [N] bool → weight of Σ CE(S)."""
    return sum(terms_of(s) * float(toy.ce[toy.codes(s)].sum()) for s in toy.sets)


def test_published_estimates_estimate_what_they_say_and_their_bias_is_known():
    toy = Toy(6)
    bound = -6 * toy.objective_by_counts()
    full = -float(toy.ce[toy.codes(torch.ones(6, dtype=torch.bool))].sum())

    def mean(sampler, masking, draws):
        estimator = Estimator(sampler, masking, MDMLoss(), -1)
        return toy_bounds(toy, drawn(copies(6, 4000), estimator, DrawPlan(draws, 3), ("mask", 0)))

    one = mean(Uniform(), FullyMasked(0.15), 1)
    assert torch.allclose(
        one, torch.tensor(full).double(), rtol=1e-6
    )  # no noise, and far from the bound
    assert abs(full - bound) > 0.1 * abs(bound)

    # Coupled: half of the fully masked one, and the whole of a window's bound by rates.
    nodes = torch.linspace(0.2, 0.8, 2001).double()
    window = -6 * float(toy.loss_at(nodes).mean())
    pair = mean(Uniform(), Coupled(), 1)
    assert abs(z_score(pair[:, None], full / 2 + window)) < 4
    assert abs(z_score(pair[:, None], bound)) > 4

    # GDPO: three nodes, their rounded counts.
    gauss = mean(GaussQuadrature(), RoundedCount(), 3)
    count, total = toy.sets.sum(1), toy.ce.sum(1)
    per = {k: float(total[count == k].mean()) * 6 / k for k in range(1, 7)}
    nodes = [0.5 - 0.5 * 0.6**0.5, 0.5, 0.5 + 0.5 * 0.6**0.5]
    weights = [5 / 18, 8 / 18, 5 / 18]
    exact = -sum(w * per[max(1, int(t * 6))] for w, t in zip(weights, nodes, strict=True))
    assert abs(z_score(gauss[:, None], exact)) < 4
    assert abs(exact - bound) > 0.01 * abs(bound)

    even = mean(Stratified(), Complement(), 2)  # ESPO's, and ours
    assert abs(z_score(even[:, None], bound)) < 4
    with pytest.raises(ValueError, match="3 nodes, and there are 2 draws"):
        mean(GaussQuadrature(), RoundedCount(), 2)


def test_the_prompt_is_hidden_at_its_rate_and_never_predicted():
    batch = pairs(8, 4, 200)
    estimator = Estimator(Uniform(), FullyMasked(0.25), MDMLoss(), MASK)
    noisy = drawn(batch, estimator, DrawPlan(1, 0), ("mask", 0)).draws[0]
    hidden = (noisy.noisy == MASK)[:, :8].double().mean()
    assert hidden == pytest.approx(0.25, abs=0.03)
    assert (noisy.targets.positions % 12 >= 8).all()
    assert len(noisy.targets.positions) == 4 * 400


def test_a_reward_that_raises_hangs_or_gives_no_number_costs_one_answer():
    def reward(completion, row):
        if completion == "raise":
            raise RuntimeError("no such\nunit")
        while completion == "hang":
            pass
        return float("nan") if completion == "nan" else len(completion)

    parts = [Reward("own", 2.0, reward), Reward("one", 1.0, lambda text, row: 1.0)]
    start = time.monotonic()
    found = reward_answers(parts, ["ab", "raise", "hang", "nan"], [{}] * 4, timeout=0.2)
    assert time.monotonic() - start < 5
    assert found.total.isnan().tolist() == [False, True, True, True]
    assert found.total[0] == 5 and found.parts["one"].tolist() == [1.0] * 4
    assert [i for i, _ in found.failures] == [1, 2, 3]
    reasons = [line for _, line in found.failures]
    assert reasons[0] == "rewards.own: no such unit"
    assert "no answer within reward_timeout, 0.2 s" in reasons[1] and "it gave nan" in reasons[2]


def test_rewards_by_name_are_functions_with_weights():
    path = "mdm_plugin.alignment.rewards"
    cfg = DictConfig(
        {
            "rewards": {
                "form": {"_component_": f"{path}.matches", "pattern": "Answer: -?\\d+"},
                "short": {"_component_": f"{path}.brevity", "characters": 20, "weight": 0.5},
                "sums": {"_component_": f"{path}.reasoning_gym", "task": "chain_sum"},
            }
        }
    )
    row = {"entry": {"answer": "4", "question": "2 + 2 ="}}
    found = reward_answers(read_rewards(cfg), ["Answer: 4", "four"], [row, row], timeout=5)
    assert found.parts["form"].tolist() == [1.0, 0.0]
    assert found.parts["short"].tolist() == pytest.approx([1 - 9 / 20, 1 - 4 / 20])
    assert found.parts["sums"].tolist() == [1.0, 0.0]
    assert found.total.tolist() == pytest.approx([2 + 0.5 * 11 / 20, 0.5 * 16 / 20])
    for wrong, words in (
        ({}, "rewards: name at least one"),
        ({"a": 3}, "rewards.a: give it a _component_"),
        ({"a": {"_component_": f"{path}.matches", "pattern": "("}}, "no regular expression"),
        ({"a": {"_component_": "mdm_plugin.data.Padding", "pad_id": 0}}, "gives a Padding"),
        ({"a": {"_component_": f"{path}.brevity", "characters": 9, "weight": "x"}}, "use a number"),
    ):
        with pytest.raises(UserError, match="rewards") as error:
            read_rewards(DictConfig({"rewards": wrong}))
        assert words in str(error.value)


def test_counts_and_complements_have_less_noise_than_the_field_s():
    """The toy's bound by four forwards: independent counts, even ones, complements."""
    toy, spread = Toy(8), {}
    for name, sampler, masking, draws in (
        ("independent", Uniform(), FixedCount(), 4),
        ("even", Stratified(), FixedCount(), 4),
        ("complement", Stratified(), Complement(), 2),
    ):
        estimator = Estimator(sampler, masking, MDMLoss(), -1)
        found = drawn(copies(8, 2000), estimator, DrawPlan(draws, 3), ("mask", 0))
        spread[name] = float(toy_bounds(toy, found).var())
    assert spread["even"] < 0.5 * spread["independent"]
    assert spread["complement"] < spread["independent"]


def test_answers_are_shown_under_their_prompts_each_with_its_reward():
    prompts = [Prompt(f"x.jsonl:{i}", {}, [1], text) for i, text in enumerate(("2 + 2 =\n?", "b"))]
    rows = copies(3, 4)._replace(places=torch.tensor([2, 3, 0, 1]))
    texts = ["4\nAnswer: 4", "5", "", "*"]
    asked = [prompts[0]] * 2 + [prompts[1]] * 2
    rollout = Rollout([rows], [texts], [asked], 9, 1.0, 0.1, None)
    rewards = torch.tensor([0.0, torch.nan, 1.0, 0.25])
    first = "**prompt**\n\n    2 + 2 =\n    ?\n\n**1**\n\n    4\n    Answer: 4\n\n**0.25**\n\n    5"
    second = "**prompt**\n\n    b\n\n**0**\n\n    \n\n**nan**\n\n    *"
    assert rollout.markdown(rewards) == f"{first}\n\n---\n\n{second}"
    assert rollout.markdown(rewards, most=1) == first
