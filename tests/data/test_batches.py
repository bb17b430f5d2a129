import pytest
import torch

from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.errors import UserError

PAD, EOS = 98, 99


def make_rows(n=40):
    """Row i is a prompt of one token i, and a response of 1 + i % 7 tokens."""
    return Rows(([i] + [50] * (1 + i % 7), [False] + [True] * (1 + i % 7)) for i in range(n))


def by_place(step, rows, ranks, accumulation, eos_id=None, layout="padded"):
    """Every row of a global batch by its place: its tokens, eligible and noise, unpadded."""
    found = {}
    for rank in range(ranks):
        batches = GlobalBatches(
            rows,
            Split(8 // ranks // accumulation, ranks, rank, accumulation),
            Padding(PAD, eos_id),
            seed=3,
            layout=layout,
        )
        for batch in batches.micro_batches(step):
            for i, place in enumerate(batch.places.tolist()):
                n = int(batch.attend[i].sum()) if batch.attend is not None else None
                found[place] = tuple(
                    tuple(x[i, :n].tolist()) for x in (batch.tokens, batch.eligible, batch.u)
                )
    return found


@pytest.mark.parametrize("eos_id", [None, EOS])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1), (1, 8)])
def test_rows_and_noise_do_not_depend_on_ranks_and_accumulation(ranks, accumulation, eos_id):
    rows = make_rows()
    for step in (0, 3, 7):
        split = by_place(step, rows, ranks, accumulation, eos_id=eos_id)
        assert split == by_place(step, rows, 1, 1, eos_id=eos_id)


@pytest.mark.parametrize("layout", ["grouped", "packed"])
@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 2), (4, 1), (1, 8)])
def test_rows_and_noise_do_not_depend_on_the_layout(ranks, accumulation, layout):
    rows = make_rows()
    for step in (0, 3, 7):
        assert by_place(step, rows, ranks, accumulation, layout=layout) == by_place(
            step, rows, 1, 1
        )


def test_grouped_rows_have_less_padding_and_packed_ones_are_as_many_tokens_each():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 200, (256,), generator=generator).tolist()
    rows = Rows(([5] * n, [False] + [True] * (n - 1)) for n in lengths)
    cells, totals = {}, {}
    for layout in ("padded", "grouped", "packed"):
        shares = [
            GlobalBatches(
                rows, Split(8, 2, rank, 4), Padding(PAD), seed=0, layout=layout
            ).micro_batches(0)
            for rank in range(2)
        ]
        batches = [batch for share in shares for batch in share]
        cells[layout] = sum(x.tokens.numel() for x in batches)
        totals[layout] = torch.tensor([float(x.attend.sum()) for x in batches])
    assert cells["grouped"] < 0.75 * cells["padded"]
    assert totals["packed"].std() < 0.2 * totals["padded"].std()


def test_an_epoch_visits_each_row_at_most_once_in_an_order_of_its_own():
    batches = GlobalBatches(make_rows(), Split(6), Padding(PAD), seed=0)
    assert batches.steps_per_epoch == 6
    epochs = [
        torch.cat([batches.row_indices(e * 6 + i) for i in range(6)]).tolist() for e in range(2)
    ]
    assert all(len(set(epoch)) == 36 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_step_does_not_depend_on_the_steps_before_it():
    one = GlobalBatches(make_rows(), Split(8), Padding(PAD), seed=0)
    other = GlobalBatches(make_rows(), Split(8), Padding(PAD), seed=0)
    for step in range(9):
        other.micro_batches(step)
    assert torch.equal(one.micro_batches(9)[0].tokens, other.micro_batches(9)[0].tokens)
    assert torch.equal(one.micro_batches(9)[0].u, other.micro_batches(9)[0].u)


def test_without_shuffle_rows_come_in_their_own_order():
    batches = GlobalBatches(make_rows(), Split(8), Padding(PAD), seed=0, shuffle=False)
    assert batches.row_indices(1).tolist() == list(range(8, 16))


def test_padding_is_neither_attended_to_nor_eligible():
    batch = GlobalBatches(make_rows(), Split(8), Padding(PAD), seed=0).micro_batches(0)[0]
    padding = batch.tokens == PAD
    assert padding.any()
    assert not batch.eligible[padding].any()
    assert torch.equal(batch.attend[:, 0], ~padding)


def test_eos_padding_is_response_to_the_longest_of_the_global_batch():
    rows = make_rows()
    lengths = set()
    for rank in range(2):
        batches = GlobalBatches(rows, Split(4, 2, rank), Padding(PAD, EOS), seed=0)
        batch = batches.micro_batches(0)[0]
        assert batch.attend is None
        assert batch.eligible[batch.tokens == EOS].all()
        assert not batch.eligible[:, 0].any()
        lengths.add(batch.tokens.shape[1])
    assert lengths == {int(rows.lengths_of(batches.row_indices(0)).max())}


def test_pad_to_multiple_of_stays_within_max_len():
    rows = make_rows()
    for max_len, length in ((None, 16), (10, 10)):
        padding = Padding(PAD, multiple=16, max_len=max_len)
        batches = GlobalBatches(rows, Split(8), padding, seed=0)
        assert batches.micro_batches(0)[0].tokens.shape[1] == length


def test_too_few_rows_for_a_global_batch_is_said():
    with pytest.raises(UserError, match="40 rows do not fill one global batch of 64"):
        GlobalBatches(make_rows(), Split(16, 2, accumulation=2), Padding(PAD), seed=0)


def test_fingerprint_tells_data_apart():
    assert make_rows().facts.fingerprint == make_rows().facts.fingerprint
    assert make_rows().facts.fingerprint != make_rows(39).facts.fingerprint
    assert (
        Rows([([1, 2], [False, True])]).facts.fingerprint
        != Rows([([1, 2], [True, True])]).facts.fingerprint
    )
