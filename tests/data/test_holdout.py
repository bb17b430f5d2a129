"""Rows held out of a data set: which, how many, and that what is left is all that is trained on."""

import numpy
import pytest
import torch

from mdm_plugin.data import GlobalBatches, Padding, Rows, Split, cache, rows, text_dataset
from mdm_plugin.data.holdout import hold_out
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer


def make(count, seed=0):
    """Rows as lists: row i begins with token i, so that each can be told by its tokens."""
    generator = numpy.random.default_rng(seed)
    found = []
    for i in range(count):
        n = int(generator.integers(2, 20))
        eligible = (generator.random(n) < 0.5).tolist()
        found.append(([i, *generator.integers(0, 300, n - 1).tolist()], [*eligible[:-1], True]))
    return found


def numbers(found):
    """The first tokens of rows."""
    return [int(found[i].tokens[0]) for i in range(len(found))]


def test_rows_that_were_chosen_are_those_of_the_whole(tmp_path, monkeypatch):
    """In memory and in a file of many chunks, twice over, by every method that batches use."""
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(tmp_path))
    monkeypatch.setattr(rows, "TOKENS_PER_CHUNK", 50)
    given = make(300)
    stored, _ = cache.cached({"x": 1}, lambda bad: (bad.write_text(""), (iter(given), str))[1])
    assert len(stored._parts) > 30
    generator = torch.Generator().manual_seed(0)
    once = torch.randperm(300, generator=generator)[:120]
    twice = torch.randperm(120, generator=generator)[:31]
    for whole in (Rows(given), stored):
        for view, names in (
            (whole.choose(once, "a report"), once.tolist()),
            (whole.choose(once).choose(twice), once[twice].tolist()),
        ):
            assert view._parts is whole._parts and view._ends is whole._ends  # no copy
            kept = [given[i] for i in names]
            assert len(view) == len(kept)
            assert view.numbers_of(torch.arange(len(view))).tolist() == names
            for i, (tokens, eligible) in enumerate(kept):
                assert view[i].tokens.tolist() == tokens
                assert view[i].eligible.tolist() == eligible
            with pytest.raises(IndexError):
                view[len(kept)]
            index = torch.arange(len(kept) - 1, -1, -3)
            chosen = [kept[i] for i in index]
            assert view.lengths_of(index).tolist() == [len(x) for x, _ in chosen]
            assert view.eligible_of(index).tolist() == [sum(x) for _, x in chosen]
            tokens, eligible, real = view.padded(index, 25, 7)
            for i, (own, may_be) in enumerate(chosen):
                rest = 25 - len(own)
                assert tokens[i].tolist() == own + [7] * rest
                assert eligible[i].tolist() == may_be + [False] * rest
                assert real[i].tolist() == [True] * len(own) + [False] * rest
            assert view.facts.tokens == sum(len(x) for x, _ in kept)
            assert view.facts.longest == max(len(x) for x, _ in kept)
            assert max(max(x) for x, _ in kept) <= view.facts.max_token
        assert str(whole.choose(once, "a report")).endswith("; a report")


def test_a_fingerprint_is_of_the_rows_their_order_and_the_data_set():
    whole, index = Rows(make(40)), torch.arange(3, 30)
    own = whole.choose(index).facts.fingerprint
    assert own == Rows(make(40)).choose(index).facts.fingerprint
    assert own == whole.choose(index).facts.fingerprint != whole.facts.fingerprint
    others = (index.flip(0), index[:-1], index + 1)
    found = {own, *(whole.choose(x).facts.fingerprint for x in others)}
    assert len(found | {Rows(make(40, seed=1)).choose(index).facts.fingerprint}) == 5


@pytest.mark.parametrize(
    ("count", "share", "most", "expected"),
    [
        (10_000, 0.02, None, 200),
        (10_000, 0.02, 150, 150),
        (10_000, 0.02, 500, 200),
        (101, 0.1, None, 10),
        (2, 0.001, None, 1),  # never none
        (2, 0.999, None, 1),  # and never all
        (7, 0.999, 100, 6),
    ],
)
def test_a_share_of_the_rows_is_held_out_and_the_others_are_trained_on(
    count, share, most, expected
):
    whole = Rows(([i % 300, i // 300], [False, True]) for i in range(count))
    training, held = hold_out(whole, share, 3, most)
    assert (len(training), len(held)) == (count - expected, expected)
    every = [
        x.numbers_of(torch.arange(len(x))).tolist() for x in (training, held)
    ]  # each in the order of the data set
    assert all(x == sorted(x) for x in every)
    assert sorted(every[0] + every[1]) == list(range(count))


def test_one_row_cannot_be_shared_out():
    with pytest.raises(UserError, match=r"dataset_val.split: dataset has 1 row"):
        hold_out(Rows(make(1)), 0.5, 0)


def test_which_rows_are_held_out_depends_on_the_seed_and_the_place_alone():
    """Not on what the rows hold; a larger share holds out the same and more."""
    held = {
        (seed, share): numbers(hold_out(Rows(make(200, data)), share, seed)[1])
        for seed in (0, 1)
        for share in (0.1, 0.3)
        for data in (0, 5)
    }
    assert numbers(hold_out(Rows(make(200)), 0.1, 0)[1]) == held[0, 0.1]
    assert held[0, 0.1] != held[1, 0.1]
    assert set(held[0, 0.1]) < set(held[0, 0.3]) and len(held[0, 0.3]) == 60
    assert numbers(hold_out(Rows(make(200)), 0.3, 0, max_rows=20)[1]) == held[0, 0.1]
    # Of rows that are appended, some are held out; of the earlier ones no others than before.
    longer = numbers(hold_out(Rows(make(400)), 0.1, 0, max_rows=20)[1])
    assert {x for x in longer if x < 200} <= set(held[0, 0.1]) and max(longer) >= 200


def test_each_row_is_held_out_as_often_as_any_other():
    """Over 3,000 seeds: each of 20 rows in a quarter of them, each pair in 5 · 4 / (20 · 19)."""
    whole, seeds = Rows(make(20)), 3000
    member = torch.zeros(seeds, 20, dtype=torch.float64)
    for seed in range(seeds):
        held = hold_out(whole, 0.25, seed)[1]
        member[seed, held.numbers_of(torch.arange(5))] = 1
    single, pair = 5 / 20, 5 * 4 / (20 * 19)
    for found, true in ((member, single), (member[:, :1] * member[:, 1:], pair)):
        error = (true * (1 - true) / seeds) ** 0.5
        assert ((found.mean(0) - true).abs() < 4.5 * error).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_step_of_any_epoch_trains_on_a_row_that_is_held_out(ranks):
    training, held = hold_out(Rows(make(40)), 0.3, 0)
    seen = []
    for rank in range(ranks):
        batches = GlobalBatches(training, Split(4 // ranks, ranks, rank), Padding(0), seed=0)
        assert batches.steps_per_epoch == 7  # of 28 rows
        for step in range(3 * 7):
            own = [int(x) for batch in batches.micro_batches(step) for x in batch.tokens[:, 0]]
            assert set(own) <= set(batches.row_indices(step).tolist())  # as a report names them
            seen += own
    left = set(range(40)) - set(numbers(held))
    assert set(seen) == left and len(seen) == 3 * 28


def test_packed_text_is_held_out_by_rows_and_tokenised_once(
    data_dir, write_jsonl, tmp_path, monkeypatch
):
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(tmp_path / "home"))
    source = write_jsonl(*({"text": f"{i} + {i} = {2 * i}, and so on"} for i in range(60)))
    tokenizer = ChatTokenizer(str(data_dir), max_seq_len=16)
    whole = text_dataset(tokenizer, source=source, packed=True)
    monkeypatch.setattr(ChatTokenizer, "encode", None)  # called again, it would fail
    for share in (0.1, 0.2):
        again = text_dataset(tokenizer, source=source, packed=True)
        training, held = hold_out(again, share, 0)
        assert len(held) == round(share * len(whole)) > 1
        pieces = {i: whole[i].tokens.tolist() for i in range(len(whole))}
        for part in (training, held):
            for i, number in enumerate(part.numbers_of(torch.arange(len(part))).tolist()):
                assert part[i].tokens.tolist() == pieces.pop(number)
        assert not pieces
    assert len([x for x in (tmp_path / "home/rows").iterdir() if x.is_dir()]) == 1


def test_a_share_is_held_out_without_reading_a_token():
    """A row more costs four bytes in memory, and its share of the facts."""
    whole = Rows(([1, 2], [False, True]) for _ in range(2))
    whole._ends = numpy.arange(100_001, dtype=numpy.int64) * 300
    whole._parts = []  # a token that was read would raise an error
    training, held = hold_out(whole, 0.02, 0)
    assert (len(training), len(held)) == (98_000, 2_000)
    assert training.facts.tokens == 98_000 * 300 and training.facts.longest == 300
    assert training._chosen is not None and training._chosen.nbytes == 4 * 98_000
