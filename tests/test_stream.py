"""P-POTS from the training stream: what is measured, what is made of it, that it is unbiased."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchtune.modules.tied_linear import TiedLinear

from mdm_plugin.contract import Estimator, Probe, Times
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, FixedCount, Mirror
from mdm_plugin.models import llada, lora_llada
from mdm_plugin.noise import keyed_generator
from mdm_plugin.objectives import Window
from mdm_plugin.timesteps import ParetoStream, Uniform
from mdm_plugin.training.corruption import corrupt, pack
from mdm_plugin.training.probe import probe
from mdm_plugin.training.step import backward, global_normalizer
from tests.recipes.test_full_finetune import TWO_RANKS, assert_same, curves
from tests.toy import ELBO, Toy, row_losses

MASK = 1
ALONE = World(0, 1, torch.device("cpu"), None)
SHAPE = {"num_heads": 4, "embed_dim": 32, "intermediate_dim": 48, "max_seq_len": 64}


def plain(**more):
    return llada(vocab_size=60, num_layers=2, **SHAPE, **more)


def tied():
    model = plain()
    del model.output
    model.output = TiedLinear(model.tok_embeddings)
    return model


def lora():
    model = lora_llada(
        lora_attn_modules=["q_proj"],
        apply_lora_to_output=True,
        lora_rank=4,
        lora_alpha=8,
        vocab_size=60,
        num_layers=2,
        **SHAPE,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    return model


def some_batches(size=5):
    generator = torch.Generator().manual_seed(4)
    rows = Rows(
        (torch.randint(2, 60, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in [(3, 5), (1, 20), (7, 2), (2, 1), (6, 11)]
    )
    return GlobalBatches(rows, Split(size), Padding(0), seed=0)


def a_batch(masking, loss, weight):
    t = torch.tensor([0.3, 0.6, 0.9, 0.5, 0.8], dtype=torch.float64)
    estimator = Estimator(Uniform(), masking, loss, MASK)
    return corrupt(some_batches().micro_batches(0)[0], Times(t, weight.double()), estimator)


def by_autograd(model, batch, normalize):
    """G of each row by its definition: full logits, a gradient for each row alone."""
    kept = []

    def keep(module, given, hidden):
        kept.append(hidden.detach().requires_grad_())
        return kept[0]

    handle = model.tok_embeddings.register_forward_hook(keep)
    logits = model(batch.noisy, mask=batch.attend).flatten(0, 1)
    handle.remove()
    targets, rows = batch.targets, len(batch.t)
    ce = F.cross_entropy(logits[targets.positions], targets.labels, reduction="none")
    found = []
    for row in range(rows):
        size = 1 if normalize == "response" else int(some_lengths(batch)[row])
        part = sum(
            batch.row_scale[view * rows + row] * size * ce[targets.rows == view * rows + row].sum()
            for view in range(batch.views)
        )
        (gradient,) = torch.autograd.grad(part / batch.views, kept[0], retain_graph=True)
        found.append(gradient.norm())
    return torch.stack(found)


def some_lengths(batch):
    """Eligible positions of each of the rows."""
    return some_batches().micro_batches(0)[0].eligible.sum(1)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("normalize", ["response", "tokens"])
@pytest.mark.parametrize("masking", [FixedCount(), Mirror()], ids=["one view", "two views"])
@pytest.mark.parametrize("build", [plain, tied, lora])
def test_the_norm_of_a_row_is_autograd_s_whatever_its_weight(build, masking, normalize, layout):
    torch.manual_seed(0)
    model, loss = build(), MDMLoss(normalize, chunk_size=7)
    weight = torch.tensor([1.0, 3.0, 0.2, -1.0, 0.0])  # a probe's are ±1, and 0 for no row
    batch = a_batch(masking, loss, weight)
    truth = torch.where(weight == 0, 0, by_autograd(model, batch, normalize))
    if layout == "packed":
        batch = pack(batch, model, torch.device("cpu"), 16)
    found = backward(model, loss, batch, global_normalizer([batch], ALONE), ALONE, norms=True)
    torch.testing.assert_close(found.row_norms, truth, rtol=1e-4, atol=1e-6)
    assert truth.count_nonzero() >= 2
    assert backward(model, loss, batch, torch.ones(()), ALONE).row_norms is None


def test_in_bf16_it_is_near_fp32_s():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model, loss = plain().to(dtype), MDMLoss()
        batch = a_batch(FixedCount(), loss, torch.ones(5))
        found.append(backward(model, loss, batch, torch.ones(()), ALONE, norms=True).row_norms)
    assert found[1].dtype == torch.float32
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def test_measuring_changes_nothing_and_leaves_no_hook():
    grads = []
    for norms in (False, True):
        torch.manual_seed(0)
        model, loss = plain(), MDMLoss()
        batch = a_batch(Mirror(), loss, torch.ones(5))
        backward(model, loss, batch, torch.ones(()), ALONE, norms=norms)
        assert not model.tok_embeddings._forward_hooks
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("size", [2, 5])
def test_a_probe_shows_what_the_stream_shows_at_its_t(size):
    """Truth: the norms of one row at a time, of the same rows' own masks."""
    torch.manual_seed(0)
    model = plain()
    sampler = ParetoStream(grid=4, rows=5, masks=2)
    estimator, plan = Estimator(sampler, FixedCount(), MDMLoss(), MASK), sampler.probe_plan(ELBO)
    batches = some_batches(size)
    found = probe(model, estimator, plan, batches, ALONE, step=0)
    chosen = torch.randperm(5, generator=keyed_generator(0, "probe rows", 0))[:5]
    longest, squares = int(batches.rows.lengths_of(chosen).max()), torch.zeros(4)
    for j in range(4):
        for m in range(2):
            for place in range(5):
                at = torch.tensor([place])
                batch = batches.collate(chosen[at], at, ("probe", 0, j, m), longest)
                times = Times(plan.t[j].expand(5), torch.ones(5, dtype=torch.float64))
                noisy = corrupt(batch, times, estimator)
                norms = by_autograd(model, noisy, "response")
                squares[j] += norms[0] ** 2 / 10
    torch.testing.assert_close(found.shown.float(), squares.sqrt(), rtol=1e-4, atol=1e-7)
    plain_sampler = Estimator(ParetoStream("loss", grid=4), FixedCount(), MDMLoss(), MASK)
    plan = plain_sampler.timesteps.probe_plan(ELBO)._replace(rows=2, masks=2)
    assert probe(model, plain_sampler, plan, batches, ALONE, step=0).shown is None


def started(root=lambda t: 1 + t, shown=lambda t: 2 - t, w=ELBO, **options):
    sampler = ParetoStream(**options)
    t = sampler.probe_plan(w).t
    zero = torch.zeros_like(t)
    sampler.fit(Probe(t, zero, zero, root(t), 0, shown(t)), w)
    return sampler


def feed(sampler, norm, steps, w=ELBO, seed=0):
    for step in range(steps):
        t = sampler(64, keyed_generator(seed, step), w).t
        sampler.update(sampler.tally(t, norm(t)))


INNER = (torch.arange(3, 17, dtype=torch.float64) + 0.5) / 20  # away from what the ends do


def assert_proportional(found, truth, rtol):
    torch.testing.assert_close(found / found.mean(), truth / truth.mean(), rtol=rtol, atol=0)


def unmixed(sampler, t, w=ELBO):
    """h without its uniform share."""
    return (sampler.density(w)(t) - sampler.mix) / (1 - sampler.mix)


def test_it_starts_at_the_probe_s_root():
    sampler = started(mix=0.1)
    assert_proportional(unmixed(sampler, INNER), 1 + INNER, 0.01)


def test_it_follows_a_stream_whose_root_changes():
    """c·(the norms' root), with c = (1 + t)/(2 − t) as the probe had it."""
    sampler = started(decay=0.9)
    for norm in (lambda t: 3 * (2 - t), lambda t: 0.1 * (2 - t) * (2 - t), lambda t: 1 + 0 * t):
        feed(sampler, norm, 150)
        truth = (1 + INNER) / (2 - INNER) * norm(INNER)
        assert_proportional(unmixed(sampler, INNER), truth, 0.02)


def test_for_the_loss_no_factor_is_between():
    sampler = ParetoStream("loss", decay=0.9)
    t = sampler.probe_plan(ELBO).t
    sampler.fit(Probe(t, t, t, 1 + t, 0), ELBO)
    assert sampler.learns_from == "loss"
    feed(sampler, lambda t: 2 - t, 150)
    assert_proportional(unmixed(sampler, INNER), 2 - INNER, 0.02)


def test_another_probe_renews_the_factor_and_counts_among_the_rows():
    sampler = started(decay=0.9)
    feed(sampler, lambda t: 2 - t, 150)
    t = sampler.probe_plan(ELBO).t
    sampler.fit(Probe(t, t, t, 3 - t, 0, 2 - t), ELBO)
    assert_proportional(unmixed(sampler, INNER), 3 - INNER, 0.02)
    assert not torch.isclose(sampler.seen.counts, started().seen.counts).any()


def test_rates_that_a_widening_objective_has_not_come_to_are_as_the_nearest():
    half = Window(0.5, 1.0)(0.0)
    sampler = started(w=half, decay=0.9, mix=0.1)
    feed(sampler, lambda t: 0.01 * (2 - t), 200, half)
    h = sampler.density(ELBO)(torch.tensor([0.01, 0.3, 0.475, 0.525], dtype=torch.float64))
    torch.testing.assert_close(h[:3], h[3].expand(3), rtol=0.05, atol=0)
    # What was learnt there stays what it was, as a function of t.
    upper = INNER[INNER > 0.65]
    assert_proportional(unmixed(sampler, upper), 1 + upper, 0.03)


class Given:
    """One step's times."""

    def __init__(self, times):
        self.times = times

    def __call__(self, n, generator, w):
        return self.times


@pytest.mark.parametrize("masking", [FixedCount(), Bernoulli(1e-3)], ids=["counts", "rates"])
def test_it_is_unbiased_while_it_learns(masking):
    """Steps' means are uncorrelated with each other's errors: h is of earlier steps alone. And
    without its weights it is not."""
    toy, sampler = Toy(6), started(decay=0.8)
    truth = toy.objective_by_counts() if masking.by_count else toy.objective(1e-3)
    means, bare, moved = [], [], []
    for step in range(1500):
        times = sampler(16, keyed_generator(5, step), ELBO)
        (losses,) = row_losses(
            toy, Given(times), masking, MDMLoss(), groups=1, size=16, seed=step + 1
        )
        weight = times.row_weights(torch.arange(16), torch.full((16,), 6), masking, ELBO)
        # It is taught what moves it much.
        sampler.update(sampler.tally(times.t, losses / weight))
        means.append(losses.mean())
        bare.append((losses / weight).mean())
        moved.append(float(sampler.density(ELBO)(torch.tensor([0.1]).double())))
    assert torch.tensor(moved).std() > 0.02
    for values, right in ((means, True), (bare, False)):
        x = torch.stack(values)
        assert (abs(float((x.mean() - truth) / (x.std() / len(x) ** 0.5))) < 4) == right


def test_tallies_of_ranks_add_up_to_those_of_one():
    sampler, t = started(), torch.rand(64, generator=keyed_generator(2)).double()
    norms = torch.rand(64, generator=keyed_generator(3))
    parts = [sampler.tally(t[part], norms[part]) for part in (slice(40), slice(40, 64))]
    whole = sampler.tally(t, norms)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [None, 0, 1, 40])
def test_its_state_comes_back_to_the_last_bit(steps):
    sampler, other = ParetoStream() if steps is None else started(), ParetoStream()
    feed(sampler, lambda t: 2 - t * t, steps or 0)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert other.state_dict() == sampler.state_dict()
    for x in (sampler, other):
        if steps is None:
            with pytest.raises(RuntimeError, match="probe first"):
                x(8, keyed_generator(0), ELBO)
        else:
            feed(x, lambda t: 1 + t, 3, seed=1)
    assert other.state_dict() == sampler.state_dict()
    with pytest.raises(ValueError, match="bins is 5, and was 20"):
        ParetoStream(bins=5).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_broken_probe_and_values_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="broken model"):
        started(root=lambda t: torch.where(t < 0.5, value, 1.0))
    for options in ({"bins": 1}, {"decay": 1.0}, {"target": "both"}, {"mix": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ParetoStream(**options)


STREAM = (
    "timesteps._component_=mdm_plugin.timesteps.ParetoStream",
    "timesteps.grid=5",
    "timesteps.rows=4",
    "timesteps.masks=2",
    "timesteps.bins=4",
    "masking=mdm_plugin.masking.FixedCount",
)


def test_two_ranks_are_the_run_of_one_and_a_resumed_run_is_the_same(tune, tmp_path):
    tune(*STREAM, "save_every_n_steps=10", out="one")
    split = ("batch_size=2", "gradient_accumulation_steps=2")
    tune(*STREAM, *split, launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-4)
    whole = load_file(tmp_path / "one/step_20/model.safetensors")
    (tmp_path / "one/step_20").rename(tmp_path / "whole")
    again = tune(*STREAM, "save_every_n_steps=10", "resume_from_checkpoint=True", out="one")
    assert "fitted" not in again.stdout
    resumed = load_file(tmp_path / "one/step_20/model.safetensors")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
