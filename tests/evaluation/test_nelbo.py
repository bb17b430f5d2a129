import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mdm_plugin.data import Rows
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation import BoundEstimator, ExactMatch, Questions, exact_match
from mdm_plugin.generation import TokenIds
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount
from mdm_plugin.models import llada
from tests.toy import ELBO

MASK, PAD = 319, 0
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, None)


def nelbo(model, rows, batch_size=64, world=ALONE, **given):
    return BoundEstimator(TokenIds(MASK, PAD), world, batch_size, **given).nelbo(model, rows)


def bounds(model, rows, world=ALONE, **given):
    estimator = BoundEstimator(TokenIds(MASK, PAD), world, batch_size=8, **given)
    return estimator.bounds(model, rows, torch.arange(len(rows)))


def exact_nelbo(model, tokens, eligible, mask=MASK):
    """Σ_l (1/l) · mean over |S| = l of Σ_{i∈S} CE_i(S), by all masks of the response."""
    places = eligible.nonzero()[:, 0].tolist()
    total = 0.0
    for count in range(1, len(places) + 1):
        losses = []
        for chosen in itertools.combinations(places, count):
            noisy = tokens.clone()
            noisy[list(chosen)] = mask
            with torch.no_grad():
                logits = model(noisy[None])[0]
            losses.append(
                F.cross_entropy(logits[list(chosen)], tokens[list(chosen)], reduction="sum")
            )
        total += float(torch.stack(losses).mean()) / count
    return total


@pytest.fixture
def rows():
    """Two rows with responses of 3 and 5 tokens."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(4, 3), (2, 5)]
    return Rows(
        (torch.randint(1, 300, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in sizes
    )


def test_nelbo_is_the_exact_one_within_its_error(tiny_model, rows):
    with torch.no_grad():
        tiny_model.output.weight.mul_(20)  # far from uniform predictions: draws differ
    truth = sum(exact_nelbo(tiny_model, rows[i].tokens, rows[i].eligible) for i in range(2)) / 8
    arguments = {"batch_size": 64, "draws": 20}
    estimates = torch.tensor(
        [nelbo(tiny_model, rows, seed=seed, **arguments).nats for seed in range(60)]
    )
    error = float(estimates.std() / 60**0.5)
    assert error < 0.02 * truth
    assert abs(float(estimates.mean()) - truth) < 4 * error


def test_the_bound_of_a_shifted_model_is_that_of_its_shifted_logits(tiny_model, rows):
    class Unshifted(torch.nn.Module):
        """The same predictions, each at its own place."""

        max_seq_len = 96

        def forward(self, tokens, *, mask, positions, head):
            logits = tiny_model(tokens, mask=mask)
            moved = torch.cat((logits[:, :1], logits[:, :-1]), 1)
            return head(torch.nn.Identity(), moved.flatten(0, 1)[positions])

    own = bounds(Unshifted(), rows, draws=6)
    tiny_model.shift = True
    torch.testing.assert_close(bounds(tiny_model, rows, draws=6).nats, own.nats)
    tiny_model.shift = False
    assert (bounds(tiny_model, rows, draws=6).nats - own.nats).abs().max() > 1e-3


def test_its_error_is_that_of_other_seeds_and_its_interval_covers_the_truth(tiny_model):
    """40 rows of 4 tokens, so that an error estimated by row averages out."""
    with torch.no_grad():
        tiny_model.output.weight.mul_(20)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(1, 300, (40, 6), generator=generator)
    rows = Rows((x.tolist(), [False] * 2 + [True] * 4) for x in tokens)
    truth = sum(exact_nelbo(tiny_model, rows[i].tokens, rows[i].eligible) for i in range(40)) / 160
    arguments = {"batch_size": 256, "draws": 8}
    found = [nelbo(tiny_model, rows, seed=seed, **arguments) for seed in range(100)]
    actual = float(torch.tensor([x.nats for x in found]).std())
    stated = sum(x.error for x in found) / 100
    assert actual <= 1.15 * stated and stated <= 2 * actual
    covered = sum(low <= truth <= high for low, high in (x.interval() for x in found))
    assert covered >= 90
    assert found[0].report()["perplexity_bound"] == pytest.approx(math.exp(found[0].nats))


def test_no_draws_are_refused_and_one_has_no_error(tiny_model, rows):
    arguments = {"batch_size": 4}
    with pytest.raises(ValueError, match="draws is 0"):
        nelbo(tiny_model, rows, draws=0, **arguments)
    assert math.isnan(nelbo(tiny_model, rows, draws=1, **arguments).error)


def test_nelbo_does_not_depend_on_the_batch_or_on_the_ranks(tiny_model, rows):
    arguments = {"draws": 6}
    whole = nelbo(tiny_model, rows, batch_size=16, **arguments).nats
    assert nelbo(tiny_model, rows, batch_size=3, **arguments).nats == pytest.approx(whole, rel=1e-6)
    assert nelbo(tiny_model, rows, batch_size=1, **arguments).nats == pytest.approx(whole, rel=1e-6)


def test_shares_of_more_ranks_than_rows_sum_to_the_whole(tiny_model, rows, monkeypatch):
    whole = bounds(tiny_model, rows, draws=4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: None)
    for ranks in (2, 5):
        shares = [
            bounds(tiny_model, rows, World(rank, ranks, CPU, None), draws=4)
            for rank in range(ranks)
        ]
        for name in ("nats", "variance"):
            total = sum(getattr(share, name) for share in shares)
            torch.testing.assert_close(total, getattr(whole, name), rtol=1e-5, atol=1e-8)


def test_rows_of_one_place_share_their_noise_and_others_do_not(tiny_model, rows):
    with torch.no_grad():
        tiny_model.output.weight.mul_(20)
    twice, every = (
        Rows((list(x.tokens), x.eligible.tolist()) for x in [rows[1]] * 2),
        torch.arange(2),
    )

    def at(*places, batch_size=8):
        estimator = BoundEstimator(TokenIds(MASK, PAD), ALONE, batch_size, draws=3)
        return estimator.bounds(tiny_model, twice, every, torch.tensor(places)).nats

    same, other = at(2**39, 2**39), at(2**39, 7)
    assert float(same[0]) == pytest.approx(float(same[1]), rel=1e-6)
    assert abs(float(other[0] - other[1])) > 1e-3
    torch.testing.assert_close(at(7, 2**39, batch_size=3).flip(0), other)


def test_nelbo_of_a_uniform_model_is_log_vocabulary(tiny_model, rows):
    torch.nn.init.zeros_(tiny_model.output.weight)
    result = nelbo(tiny_model, rows, batch_size=4, draws=4)
    assert result.nats == pytest.approx(torch.log(torch.tensor(320.0)).item(), rel=1e-5)
    assert (result.rows, result.tokens) == (2, 8)


def test_exact_match_counts_what_the_verifier_accepts(tiny_model, tokenizer):
    prompts = [
        Prompt(str(i), {"messages": [{"role": "user", "content": str(i)}]}, [i + 10, 2])
        for i in range(5)
    ]
    result = exact_match(
        tiny_model,
        tokenizer,
        Questions(prompts, lambda text, row: row["messages"][0]["content"] in "024"),
        ALONE,
        max_new_tokens=4,
        batch_size=2,
    )
    assert (result.correct, result.total, len(result.completions)) == (3, 5, 5)


def test_wilson_interval_against_published_values():
    """Newcombe 1998, Table I: 81 of 263, and 0 of 20."""
    assert ExactMatch(81, 263, []).interval() == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert ExactMatch(0, 20, []).interval() == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.slow
def test_the_bound_of_a_trained_model_is_above_the_entropy_of_its_source():
    """A Markov chain of 0s and 1s that stays with probability 0.9: its entropy is known.

    Each row's own −log p(row) under the chain cancels what the sample of rows does to the mean.
    """
    torch.manual_seed(0)
    places, stay = 8, 0.9

    def chain(count, seed):
        generator = torch.Generator().manual_seed(seed)
        change = torch.rand(count, places, generator=generator) < 1 - stay
        change[:, 0] = torch.rand(count, generator=generator) < 0.5
        return change.int().cumsum(1) % 2 + 2

    def information(tokens):
        stays = (tokens.diff(dim=1) == 0).double()
        return math.log(2) - (stays * math.log(stay) + (1 - stays) * math.log(1 - stay)).sum(1)

    model = llada(8, 2, 2, 32, max_seq_len=16, intermediate_dim=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss, masking, eligible = MDMLoss(), FixedCount(), torch.ones(256, places, dtype=torch.bool)
    for step in range(300):
        tokens = chain(256, step)
        t, u = torch.rand(256, dtype=torch.float64), torch.rand(256, places, dtype=torch.float64)
        mask, weight, _ = masking(t, u, eligible, ELBO)
        targets = loss.targets(tokens, mask, weight, torch.ones(256), torch.full((256,), places))
        total, _ = model(torch.where(mask[0], 1, tokens), head=partial(loss, targets=targets))
        (total / 256).backward()
        optimizer.step()
        optimizer.zero_grad()

    held_out = chain(2000, -1)
    rows = Rows((x.tolist(), [True] * places) for x in held_out)
    estimator = BoundEstimator(TokenIds(1, 0), ALONE, batch_size=2048, draws=8)
    bound = estimator.bounds(model.eval(), rows, torch.arange(2000))
    entropy = math.log(2) - (places - 1) * (stay * math.log(stay) + 0.1 * math.log(0.1))
    excess = bound.nats - information(held_out)
    error = float(excess.std()) / 2000**0.5
    assert -4 * error < float(excess.mean()) < 0.1 * entropy  # above it, and near: it has learned
    assert float(excess.mean()) > 0 and error < 0.02 * entropy
