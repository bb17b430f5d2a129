"""The likelihood bound of a model that writes block by block, by enumeration and by plain loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mdm_plugin.data import Rows
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation import BoundEstimator
from mdm_plugin.generation import Decoding, TokenIds, generate, is_greedy
from mdm_plugin.models import llada

MASK, PAD = 1, 0
ALONE = World(0, 1, torch.device("cpu"), None)
SIZES = [(3, 5), (1, 12), (7, 2), (2, 1), (6, 9), (4, 8)]


def a_model(block_length, shift=False):
    torch.manual_seed(0)
    shape = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
    model = llada(
        vocab_size=60, num_layers=2, max_seq_len=48, block_length=block_length, shift=shift, **shape
    ).eval()
    with torch.no_grad():
        model.output.weight.mul_(5)  # far from uniform predictions: draws differ
    return model


def some_rows(sizes=SIZES):
    generator = torch.Generator().manual_seed(4)
    return Rows(
        (torch.randint(2, 60, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in sizes
    )


def bounds(model, rows, batch_size=64, world=ALONE, **given):
    estimator = BoundEstimator(TokenIds(MASK, PAD), world, batch_size, **given)
    return estimator.bounds(model, rows, torch.arange(len(rows)))


def predict(model, x, size):
    """Logits [L, V] of one row, each at the place that it predicts, under the mask of blocks."""
    block = torch.arange(len(x)) // size
    with torch.no_grad():
        logits = model(x[None], mask=(block[:, None] >= block)[None])[0]
    return torch.cat((logits[:1], logits[:-1])) if model.shift else logits


def exact(model, row, size):
    """Σ over blocks and counts l of (1/l) · mean over |S| = l of Σ_{i∈S} CE_i(S), by all masks."""
    places, total = row.eligible.nonzero()[:, 0].tolist(), 0.0
    for _, own in itertools.groupby(places, lambda i: i // size):
        own = list(own)
        end = own[-1] + 1  # later tokens are not seen
        for count in range(1, len(own) + 1):
            sums = []
            for chosen in map(list, itertools.combinations(own, count)):
                noisy = row.tokens[:end].clone()
                noisy[chosen] = MASK
                logits = predict(model, noisy, size)
                sums.append(F.cross_entropy(logits[chosen], row.tokens[chosen], reduction="sum"))
            total += float(torch.stack(sums).mean()) / count
    return total


def truth(model, rows, size):
    return torch.tensor([exact(model, rows[i], size) for i in range(len(rows))]).double()


def test_blocks_of_one_token_have_the_likelihood_itself():
    """A shifted model in blocks of one token is autoregressive: by a loop over prefixes."""
    model, rows = a_model(1, shift=True), some_rows()
    found = bounds(model, rows, draws=8)
    for i, nats in enumerate(found.nats.tolist()):
        tokens, places = rows[i].tokens, rows[i].eligible.nonzero()[:, 0].tolist()
        own = 0.0
        for place in places:
            causal = torch.ones(place, place, dtype=torch.bool).tril()
            with torch.no_grad():
                logits = model(tokens[None, :place], mask=causal[None])[0, -1]
            own -= float(logits.log_softmax(-1)[tokens[place]])
        assert nats == pytest.approx(own, abs=1e-4)
    assert found.variance.tolist() == [0.0] * len(rows)


@pytest.mark.parametrize("shift", [False, True])
def test_where_draws_are_all_the_masks_of_a_block_the_bound_is_exact(shift):
    model, rows = a_model(3, shift), some_rows()
    for draws in (7, 30):
        found = bounds(model, rows, draws=draws)
        torch.testing.assert_close(found.nats, truth(model, rows, 3), rtol=1e-5, atol=1e-4)
        assert found.variance.tolist() == [0.0] * len(rows)


@pytest.mark.parametrize(("size", "draws"), [(4, 3), (4, 6), (6, 12)])
def test_fewer_draws_are_unbiased_and_their_error_is_that_of_other_seeds(size, draws):
    model, rows = a_model(size), some_rows()
    expected = truth(model, rows, size)
    found = [bounds(model, rows, draws=draws, seed=seed) for seed in range(60)]
    nats = torch.stack([x.nats for x in found])
    error = nats.std(0) / 60**0.5
    random = error > 1e-6
    assert random.sum() >= 3  # short blocks are exact
    assert ((nats.mean(0) - expected).abs() < 4.5 * error + 1e-3).all()
    stated = torch.stack([x.variance for x in found]).mean(0).sum()
    assert 0.5 < stated / nats.var(0).sum() < 3  # an estimate, and low where draws are few


@pytest.mark.parametrize(("size", "draws"), [(4, 6), (4, 30), (2, 2), (8, 5)])
def test_a_row_s_bound_is_the_same_in_any_batch_order_and_share(size, draws, monkeypatch):
    model, rows = a_model(size), some_rows()
    whole = bounds(model, rows, draws=draws)
    for batch_size in (1, 2, 7, 13):
        again = bounds(model, rows, batch_size, draws=draws)
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: None)
    for ranks in (2, 5):
        worlds = [World(rank, ranks, torch.device("cpu"), None) for rank in range(ranks)]
        shares = [bounds(model, rows, 8, world, draws=draws) for world in worlds]
        for name in ("nats", "variance"):
            total = sum(getattr(share, name) for share in shares)
            torch.testing.assert_close(total, getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_a_forward_has_no_more_sequences_than_it_is_to_have():
    model, seen = a_model(4), []
    hook = model.register_forward_pre_hook(lambda _, x, given: seen.append(given), with_kwargs=True)
    with hook:
        bounds(model, some_rows(), 4, draws=10)
    assert max(len(x["input_pos"]) * x["mask"].views for x in seen) == 4


@pytest.mark.parametrize("shift", [False, True])
def test_greedy_texts_are_those_that_are_written(shift):
    """And no others: one token changed is not, be it the last."""
    model = a_model(4, shift)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, 60, (n,), generator=generator).tolist() for n in (1, 4, 6, 11, 3)]
    special = TokenIds(MASK, PAD)
    for n in (1, 7, 12):
        written = generate(model, prompts, special=special, max_new_tokens=n).tokens.tolist()
        asked = [(p, w, [*w[:-1], (w[-1] + 1) % 60]) for p, w in zip(prompts, written, strict=True)]
        found = is_greedy(model, [p for p, *_ in asked], [list(t) for _, *t in asked], special)
        assert found == [[True, False]] * len(prompts)
    lengths = [
        generate(model, [p], special=special, max_new_tokens=n).tokens[0].tolist()
        for p, n in zip(prompts, (3, 9, 3, 1, 9), strict=True)
    ]
    assert is_greedy(model, prompts, [[x] for x in lengths], special) == [[True]] * 5


def test_a_cached_text_is_greedy_too_and_one_of_another_decoding_mostly_not():
    model, special = a_model(4), TokenIds(MASK, PAD)
    prompts = [[5, 9, 33], [7], [40, 41, 42, 43, 44]]
    given = {"special": special, "max_new_tokens": 12}
    cached = generate(model, prompts, Decoding(cache="prefix"), **given).tokens.tolist()
    assert is_greedy(model, prompts, [[x] for x in cached], special) == [[True]] * 3
    drawn = generate(model, prompts, Decoding(temperature=5.0), **given).tokens.tolist()
    assert is_greedy(model, prompts, [[x] for x in drawn], special) == [[False]] * 3
