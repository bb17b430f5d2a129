"""The policy's gradient: each estimate's mean against enumeration, and its variance's parts."""

import pytest
import torch

from benchmarks.policy_bias import mean_gradient
from mdm_plugin.alignment import DrawPlan, add_gradient, drawn
from mdm_plugin.alignment.estimates import Coupled, FullyMasked, GaussQuadrature, RoundedCount
from mdm_plugin.alignment.looks import Spread
from mdm_plugin.alignment.policy import PolicyLoss
from mdm_plugin.alignment.policy_report import Seen, parts, record
from mdm_plugin.contract import Estimator
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement, FixedCount
from mdm_plugin.timesteps import Stratified, Uniform
from tests.alignment.test_bounds import MASK, WORLD, exact_bound, grads, model, pairs

# name: sampler, mask, draws, ratio, and what it is in the mean
ESTIMATES = {
    "even counts, Complement": (Stratified(), Complement(), 2, "sequence", "bound"),
    "even counts": (Stratified(), FixedCount(), 4, "sequence", "bound"),
    "independent counts": (Uniform(), FixedCount(), 4, "sequence", "bound"),
    "GDPO": (GaussQuadrature(), RoundedCount(), 3, "sequence", "GDPO"),
    "coupled-GRPO": (Uniform(), Coupled(), 1, "token", "coupled-GRPO"),
    "diffu-GRPO": (Uniform(), FullyMasked(0.15), 1, "token", "diffu-GRPO"),
}
GAINS = torch.tensor([0.5, -0.5, 0.25, -0.75]).double()
COPIES, GROUPS = 60, 24


@pytest.fixture(scope="module")
def toy():
    """A model, 4 answers of 4 tokens to prompts of 2, and the exact gradient of −(1/4)·Σ A·B/N."""
    net, batch = model(0), pairs()
    loss = -sum(GAINS[i] * exact_bound(net, batch, i) / 4 for i in range(4)) / 4
    net.zero_grad()
    loss.backward()
    return net, batch, grads(net)


def prompts_hidden(batch, rate):
    """What is left of a prompt of two tokens: all four cases, and how likely each is."""
    found = []
    for case in range(4):
        rows = batch.tokens.clone()
        gone = torch.tensor([bool(case & 1), bool(case & 2)])
        rows[:, :2] = torch.where(gone, MASK, rows[:, :2])
        share = rate ** int(gone.sum()) * (1 - rate) ** int((~gone).sum())
        found.append((share, rows))
    return found


def enumerated(net, batch, name):
    """A method's mean gradient, over all sets of an answer and all that may be left of a prompt."""
    places = [x.nonzero()[:, 0].tolist() for x in batch.eligible]
    cases = prompts_hidden(batch, 0.15) if name == "diffu-GRPO" else [(1.0, batch.tokens)]
    return sum(
        share * mean_gradient(net, rows[None], places, GAINS, name, MASK) for share, rows in cases
    )


def sampled(net, batch, estimate):
    """The policy's gradient by draws, as the recipe has it at the first update. [GROUPS, D]."""
    sampler, masking, draws, ratio, _ = estimate
    many = batch._replace(
        tokens=batch.tokens.repeat(COPIES, 1),
        eligible=batch.eligible.repeat(COPIES, 1),
        u=batch.u.repeat(COPIES, 1),
        places=torch.arange(4 * COPIES),
    )
    estimator, found = Estimator(sampler, masking, MDMLoss(), MASK), []
    for group in range(GROUPS):
        noise = drawn(many, estimator, DrawPlan(draws, 0), ("look", group))
        at = torch.zeros(many.tokens.shape, dtype=torch.float64, requires_grad=True)
        terms = PolicyLoss(ratio)(at, at.detach(), None, GAINS.repeat(COPIES), many.eligible)
        (slopes,) = torch.autograd.grad(terms.loss / len(many.tokens), at)
        net.zero_grad()
        add_gradient(net, estimator.loss, noise, slopes, WORLD, ("k",))
        found.append(grads(net))
    return torch.stack(found)


def distance(found, truth):
    """‖mean − truth‖² by its expectation where truth is the mean: about 1, and then below 2.5."""
    noise = found.var(0).sum() / len(found)
    return float((found.mean(0) - truth).square().sum() / noise)


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_mean_gradient_is_the_enumerated_one_and_the_bound_s_where_it_is_unbiased(toy, name):
    net, batch, exact = toy
    own = enumerated(net, batch, ESTIMATES[name][4])
    found = sampled(net, batch, ESTIMATES[name])
    assert distance(found, own) < 2.5
    assert distance(found, 1.2 * own) > 2.5  # the test sees a fifth
    bias = float((own - exact).norm() / exact.norm())
    if ESTIMATES[name][4] == "bound":
        assert bias < 1e-6 and distance(found, exact) < 2.5
    else:
        assert bias > 0.1 and distance(found, exact) > 2.5


def test_masks_can_be_others_at_the_same_t():
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), MASK)
    one, other = (
        drawn(pairs(), estimator, DrawPlan(3, 0), ("look", 0), masks) for masks in (None, ("m", 1))
    )
    for a, b in zip(one.draws, other.draws, strict=True):
        assert torch.equal(a.t, b.t) and not torch.equal(a.noisy, b.noisy)
        counts = [(x.noisy == MASK).sum(1) for x in (a, b)]
        assert torch.equal(*counts)


def test_parts_are_those_of_gradients_whose_parts_are_known():
    """f = prompts + answers + t + masks, in 3 dimensions, each normal with its own variance."""
    torch.manual_seed(0)
    batches, repeats, size = 4000, 3, 3
    prompts, answers, rates, masks = 2.0, 1.5, 0.8, 0.5
    mean = torch.tensor([1.0, -1.0, 0.5]).double()

    def noise(deviation, *shape):
        return deviation * torch.randn(*shape, size, dtype=torch.float64)

    truth = mean + noise(prompts, batches, 1) + noise(answers, batches, 2)

    def look(scale):
        own = truth + noise(scale * rates, batches, 2)
        return own + noise(scale * masks, batches, 2), own + noise(scale * masks, batches, 2)

    def seen(factor, scale):
        looks = [[factor * x for x in look(scale)] for _ in range(repeats)]
        pairs = torch.stack([(x + y) / 2 for x, y in looks])
        within = sum((x - y).square().sum(2) / 2 for x, y in looks) / repeats
        between = pairs.var(0).sum(2)
        noise = between + within / 2
        return Seen(pairs.mean(0), between / repeats, noise, within, within, within)

    one, twice = seen(1.0, 1.0), seen(2.0, 0.5)
    own = parts(one, one, WORLD)
    expected = {
        "noise": size * (rates**2 + masks**2),
        "masks": size * masks**2,
        "answers": size * answers**2,
        "prompts": size * prompts**2,
        "signal": float(mean.square().sum()) + size * (prompts**2 + answers**2),
    }
    for key, value in expected.items():
        assert float(own._asdict()[key].mean()) == pytest.approx(value, rel=0.1), key
    # One of twice the size and half the deviation: as much noise, a quarter of it by its signal.
    found = record(parts(twice, one, WORLD), own, forwards=1.5)
    assert found["equal_forwards"].value == pytest.approx(1.5, rel=0.1)
    assert found["equal_forwards_by_signal"].value == pytest.approx(1.5 / 4, rel=0.1)
    assert found["direction"].value == pytest.approx(1, abs=0.02)
    assert found["bias"].value == pytest.approx(1, abs=0.05)  # ‖2g − g‖/‖g‖
    silent = parts(one._replace(means=torch.zeros_like(one.means)), one, WORLD)
    lost = record(silent, own, forwards=1.0)
    assert lost["direction"] is None and lost["equal_forwards_by_signal"] is None
    itself = record(own, own, forwards=1.0)
    assert itself["bias"] == (0, 0, 0) and itself["direction"] == (1, 1, 1)


def test_the_spread_of_vectors_one_after_another_is_their_variance():
    vectors = torch.randn(7, 5, dtype=torch.float64)
    spread = Spread()
    for vector in vectors:
        spread.add(vector)
    assert torch.allclose(spread.mean, vectors.mean(0))
    assert float(spread.variance(WORLD)) == pytest.approx(float(vectors.var(0).sum()))
