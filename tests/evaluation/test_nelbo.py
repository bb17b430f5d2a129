import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mdm_plugin.data import Rows
from mdm_plugin.evaluation import ExactMatch, exact_match, nelbo

MASK, PAD = 319, 0
CPU = torch.device("cpu")


def exact_nelbo(model, tokens, eligible):
    """Σ_l (1/l) · mean over |S| = l of Σ_{i∈S} CE_i(S), by all masks of the response."""
    places = eligible.nonzero()[:, 0].tolist()
    total = 0.0
    for count in range(1, len(places) + 1):
        losses = []
        for chosen in itertools.combinations(places, count):
            noisy = tokens.clone()
            noisy[list(chosen)] = MASK
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
    arguments = {"mask_id": MASK, "pad_id": PAD, "batch_size": 64, "device": CPU, "draws": 20}
    estimates = torch.tensor(
        [nelbo(tiny_model, rows, seed=seed, **arguments).nats for seed in range(60)]
    )
    error = float(estimates.std() / 60**0.5)
    assert error < 0.02 * truth
    assert abs(float(estimates.mean()) - truth) < 4 * error


def test_its_error_is_that_of_other_seeds_and_its_interval_covers_the_truth(tiny_model):
    """40 rows of 4 tokens, so that an error estimated by row averages out."""
    with torch.no_grad():
        tiny_model.output.weight.mul_(20)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(1, 300, (40, 6), generator=generator)
    rows = Rows((x.tolist(), [False] * 2 + [True] * 4) for x in tokens)
    truth = sum(exact_nelbo(tiny_model, rows[i].tokens, rows[i].eligible) for i in range(40)) / 160
    arguments = {"mask_id": MASK, "pad_id": PAD, "batch_size": 256, "device": CPU, "draws": 8}
    found = [nelbo(tiny_model, rows, seed=seed, **arguments) for seed in range(100)]
    actual = float(torch.tensor([x.nats for x in found]).std())
    stated = sum(x.error for x in found) / 100
    assert actual <= 1.15 * stated and stated <= 2 * actual
    covered = sum(low <= truth <= high for low, high in (x.interval() for x in found))
    assert covered >= 90
    assert found[0].report()["perplexity_bound"] == pytest.approx(math.exp(found[0].nats))


def test_an_odd_number_of_draws_is_refused(tiny_model, rows):
    with pytest.raises(ValueError, match="draws is 3"):
        nelbo(tiny_model, rows, mask_id=MASK, pad_id=PAD, batch_size=4, device=CPU, draws=3)


def test_nelbo_does_not_depend_on_the_batch_or_on_the_ranks(tiny_model, rows):
    arguments = {"mask_id": MASK, "pad_id": PAD, "device": CPU, "draws": 6}
    whole = nelbo(tiny_model, rows, batch_size=16, **arguments).nats
    assert nelbo(tiny_model, rows, batch_size=3, **arguments).nats == pytest.approx(whole, rel=1e-6)
    assert nelbo(tiny_model, rows, batch_size=1, **arguments).nats == pytest.approx(whole, rel=1e-6)


def test_nelbo_of_a_uniform_model_is_log_vocabulary(tiny_model, rows):
    torch.nn.init.zeros_(tiny_model.output.weight)
    result = nelbo(tiny_model, rows, mask_id=MASK, pad_id=PAD, batch_size=4, device=CPU, draws=4)
    assert result.nats == pytest.approx(torch.log(torch.tensor(320.0)).item(), rel=1e-5)
    assert (result.rows, result.tokens) == (2, 8)


def test_exact_match_counts_what_the_verifier_accepts(tiny_model, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]}
        for i in range(5)
    ]
    result = exact_match(
        tiny_model,
        tokenizer,
        rows,
        lambda text, row: row["messages"][0]["content"] in "024",
        max_new_tokens=4,
        batch_size=2,
    )
    assert (result.correct, result.total, len(result.completions)) == (3, 5, 5)


def test_wilson_interval_against_published_values():
    """Newcombe 1998, Table I: 81 of 263, and 0 of 20."""
    assert ExactMatch(81, 263, []).interval() == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert ExactMatch(0, 20, []).interval() == pytest.approx((0.0, 0.1611), abs=1e-4)
