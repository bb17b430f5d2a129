"""The probe against one row at a time, and against itself under another split."""

import pytest
import torch

from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.gradients import total_norm
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, Complement
from mdm_plugin.objectives import Window
from mdm_plugin.timesteps import ParetoOptimal
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.ema import EMA
from mdm_plugin.training.probe import fit, probe, probe_due
from mdm_plugin.training.step import backward
from tests.toy import ELBO

ALONE = World(0, 1, torch.device("cpu"), None)
MASK = 319


def batches(batch_size=4):
    generator = torch.Generator().manual_seed(0)
    rows = Rows(
        (torch.randint(1, 300, (3 + n,), generator=generator).tolist(), [False] * 3 + [True] * n)
        for n in (4, 6, 8, 5, 7, 6)
    )
    return GlobalBatches(rows, Split(batch_size), Padding(0), seed=0)


def measure(model, sampler, masking, batch_size=4, w=ELBO):
    estimator = Estimator(sampler, masking, MDMLoss(), MASK, w)
    return probe(model, estimator, sampler.probe_plan(w), batches(batch_size), ALONE, step=0)


@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_the_probe_does_not_depend_on_micro_batches(tiny_model, target):
    sampler = ParetoOptimal(target=target, grid=4, rows=6, masks=3)
    one, other = (measure(tiny_model, sampler, Complement(), size) for size in (2, 6))
    for a, b in zip(one[:4], other[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert one.forwards == 4 * 6 * 3 * 2  # two views
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.slow
def test_random_signs_give_the_mean_squared_norm_of_the_rows_gradients(tiny_model):
    """Truth: a backward pass for each row alone, at the same t."""
    t = 0.5
    sampler = ParetoOptimal(target="gradient", family="epr", grid=3, rows=6, masks=200)
    probed = measure(tiny_model, sampler, Bernoulli())
    assert probed.t[1] == t
    data, squares = batches(), []
    for draw in range(300):
        row = torch.tensor([draw % 6])
        length = int(data.rows.lengths_of(row))
        batch = data.collate(row, torch.tensor([0]), ("alone", draw), length)
        one = torch.ones(1, dtype=torch.float64)
        estimator = Estimator(sampler, Bernoulli(), MDMLoss(), MASK)
        noisy = corrupt(batch, Times(t * one, one), estimator)
        backward(tiny_model, MDMLoss(), noisy, torch.ones(()), ALONE)
        squares.append(float(total_norm(tiny_model)) ** 2)
        tiny_model.zero_grad(set_to_none=True)
    squares = torch.tensor(squares)
    error = float(squares.std()) / len(squares) ** 0.5
    # The probe has 1,200 draws of its own: its error is smaller.
    assert abs(float(probed.root[1]) ** 2 - float(squares.mean())) < 5 * error


def test_a_fit_is_kept_and_said(tiny_model):
    sampler = ParetoOptimal(target="loss", family="piecewise", grid=5, rows=4, masks=2)
    estimator = Estimator(sampler, Bernoulli(), MDMLoss(), MASK)
    plan = probe_due(estimator, 0)
    report = fit(estimator, plan, measure(tiny_model, sampler, Bernoulli()), ALONE)
    assert report["density"] == sampler.density.state_dict()
    assert not probe_due(estimator, 7)
    assert report["forwards"] == 5 * 4 * 2 and report["backwards"] == 0
    assert all(len(report[key]) == 5 for key in ("t", "s", "g", "v", "root", "h"))
    assert report["s"] == report["t"]  # of the ELBO
    sampler.refit_every_n_steps = 7
    assert probe_due(estimator, 14) and not probe_due(estimator, 15)


def test_an_objective_is_probed_where_it_has_mass_and_fitted_on_its_own_scale(tiny_model):
    """Of a window, s = (t − 0.6) / 0.4; at the same t the probe shows what the ELBO's does."""
    sampler = ParetoOptimal(target="loss", family="piecewise", grid=5, rows=4, masks=2)
    w = Window(0.6, 1.0)(0.0)
    estimator = Estimator(sampler, Bernoulli(), MDMLoss(), MASK, w)
    measured = measure(tiny_model, sampler, Bernoulli(), w=w)
    report = fit(estimator, probe_due(estimator, 0), measured, ALONE)
    t, s = torch.tensor(report["t"]), torch.tensor(report["s"])
    assert t.min() > 0.6 and torch.allclose(s, (t - 0.6) / 0.4, atol=1e-6)
    assert report["h"] == pytest.approx(sampler.density(s.double()).tolist(), rel=1e-5)
    assert sampler.probed_at is w
    plain = Estimator(sampler, Bernoulli(), MDMLoss(), MASK)
    plan = probe_due(estimator, 0)
    again = probe(tiny_model, plain, plan, batches(), ALONE, step=0)  # masks by rate: of t alone
    assert torch.equal(again.root, measured.root)


def test_ema_is_the_weighted_sum_of_the_weights_seen(tiny_model):
    ema = EMA(tiny_model, decay=0.5)
    weight = tiny_model.output.weight
    expected = weight.detach().clone()
    for step in range(8):
        with torch.no_grad():
            weight.add_(step + 1.0)
        d = min(0.5, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * weight.detach()
        ema.update(step)
    own = weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, own)
    with pytest.raises(ValueError, match="decay"):
        EMA(tiny_model, decay=1.0)
