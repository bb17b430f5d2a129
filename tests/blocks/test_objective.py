"""The objective of block diffusion: by enumeration, by plain loops, and at its two ends."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from mdm_plugin.contract import Blocks, Estimator, Masking, Views
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement, FixedCount, Mirror, NextToken, Rotation
from mdm_plugin.models import llada
from mdm_plugin.timesteps import Stratified, Uniform
from mdm_plugin.training.corruption import corrupt, corrupted_step, first_blocks, pack
from mdm_plugin.training.step import backward, global_normalizer
from tests.toy import BY_COUNT, BY_RATE, ELBO, EPS, SAMPLERS, Toy, draws, z_score

MASK, ALONE = 1, World(0, 1, torch.device("cpu"), None)
SIZES = [(3, 5), (1, 20), (7, 2), (2, 1), (6, 11), (4, 8)]


def a_model(block_length=None, shift=False, causal=False):
    torch.manual_seed(0)
    shape = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
    model = llada(
        vocab_size=60,
        num_layers=2,
        max_seq_len=72,
        causal=causal,
        block_length=block_length,
        **shape,
    )
    model.shift = shift
    return model


def some_rows(sizes=SIZES):
    generator = torch.Generator().manual_seed(4)
    return Rows(
        (torch.randint(2, 60, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in sizes
    )


def batches_of(rows, eos=None, multiple=1):
    return GlobalBatches(rows, Split(len(rows)), Padding(0, eos, multiple), seed=0)


def gradients(model, estimator, batches):
    """Loss and gradients of a step of one micro-batch."""
    (batch,) = corrupted_step(batches, 0, estimator)
    model.zero_grad()
    found = backward(model, estimator.loss, batch, global_normalizer([batch], ALONE), ALONE)
    return [found.loss, *(p.grad.clone() for p in model.parameters())]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# Enumeration: rows of N = 8 in two blocks of 4, of which the first has two tokens of the prompt.

GROUPS, SIZE = 1024, 8


def block_losses(sampler, masking, blocks, sizes=(2, 4)):
    """Row losses of many global batches, as training computes them. [GROUPS, SIZE], fp64."""
    rows, length = GROUPS * SIZE, 8
    eligible = torch.zeros(rows, length, dtype=torch.bool)
    eligible[:, 4 - sizes[0] : 4 + sizes[1]] = True
    each = 1 if blocks.one_t else 2
    times = draws(sampler, ELBO, GROUPS, SIZE * each, 0)
    u = torch.rand(rows, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = torch.arange(length).repeat(rows, 1)
    first = None if blocks.one_t else torch.arange(rows) * 2
    batch = Batch(tokens, eligible, None, u, torch.arange(rows), first)
    estimator = Estimator(sampler, masking, MDMLoss(), -1, ELBO, blocks)
    found = corrupt(batch, times, estimator)
    targets, toys = found.targets, [Toy(sizes[0], seed=1), Toy(sizes[1], seed=2)]
    row, column = found.target_places()
    block = column // 4
    place = column - torch.where(block == 0, 4 - sizes[0], 4)
    mask = torch.zeros(len(found.row_scale), max(sizes), dtype=torch.bool)
    mask[targets.rows, place] = True
    ce = torch.zeros(len(row), dtype=torch.float64)
    for b, toy in enumerate(toys):
        own = block == b
        codes = toy.codes(mask[targets.rows[own], : toy.n])
        ce[own] = toy.ce[codes, place[own]]
    result = torch.zeros(rows, dtype=torch.float64)
    result.index_add_(0, row, targets.weights.double() * ce)
    return result.reshape(GROUPS, SIZE), toys


def truth(toys, by_count):
    total = sum(toy.n for toy in toys)
    each = [toy.objective_by_counts() if by_count else toy.objective(EPS) for toy in toys]
    return sum(toy.n / total * value for toy, value in zip(toys, each, strict=True))


@pytest.mark.parametrize("one_t", [False, True])
@pytest.mark.parametrize("name", [*BY_RATE, *BY_COUNT])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_estimator_is_unbiased_for_the_sum_of_its_blocks_bounds(sampler, name, one_t):
    masking = (BY_RATE | BY_COUNT)[name]
    losses, toys = block_losses(SAMPLERS[sampler], masking, Blocks(4, one_t))
    assert abs(z_score(losses, truth(toys, name in BY_COUNT))) < 4.5


def test_a_t_of_its_own_for_each_block_has_less_noise_than_one_for_the_row():
    noise = {
        one_t: float(block_losses(Uniform(), FixedCount(), Blocks(4, one_t))[0].var())
        for one_t in (True, False)
    }
    assert noise[False] < 0.8 * noise[True]


def test_stratified_t_are_spread_over_all_blocks_of_the_global_batch():
    rows = some_rows()
    batches = batches_of(rows)
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), MASK, blocks=Blocks(4))
    (batch,) = corrupted_step(batches, 0, estimator)
    count = len(batch.t)
    expected = sum(len({i // 4 for i in range(p, p + n)}) for p, n in SIZES)
    assert count == expected == int(first_blocks(batches, batches.indices(0), Blocks(4))[-1])
    assert torch.equal((batch.t * count).long().sort().values, torch.arange(count))
    parts = GlobalBatches(rows, Split(2, 1, 0, 3), Padding(0), seed=0)
    split = corrupted_step(parts, 0, estimator)
    assert torch.equal(torch.cat([x.t for x in split]), batch.t)


# Against other code.


@pytest.mark.parametrize("masking", [FixedCount(), Mirror(), Complement(), Rotation(4)])
@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize("shift", [False, True])
def test_one_block_is_the_model_without_blocks(masking, eos, shift):
    batches = batches_of(some_rows(), eos, 3)
    plain = Estimator(Stratified(), masking, MDMLoss(chunk_size=7), MASK)
    close(
        gradients(a_model(24, shift), plain._replace(blocks=Blocks(24)), batches),
        gradients(a_model(None, shift), plain, batches),
    )


def test_blocks_of_one_token_are_autoregressive():
    batches = batches_of(some_rows())
    ours = Estimator(Uniform(), FixedCount(), MDMLoss(), MASK, blocks=Blocks(1))
    theirs = Estimator(Uniform(), NextToken(), MDMLoss(), MASK)
    close(
        gradients(a_model(1, shift=True), ours, batches),
        gradients(a_model(None, shift=True, causal=True), theirs, batches),
    )


@pytest.mark.parametrize("masking", [FixedCount(), Complement()])
@pytest.mark.parametrize("shift", [False, True])
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(masking, shift):
    batches, model = batches_of(some_rows()), a_model(4, shift)
    estimator = Estimator(Stratified(), masking, MDMLoss(), MASK, blocks=Blocks(4))
    (batch,) = corrupted_step(batches, 0, estimator)
    packed = pack(batch, model, torch.device("cpu"))
    ends = [-(-(p + n) // 4) * 4 for p, n in SIZES]
    views = [end - p // 4 * 4 for (p, _), end in zip(SIZES, ends, strict=True)]
    total = sum(masking.views * view + end - 4 for view, end in zip(views, ends, strict=True))
    assert packed.noisy.shape == (1, total) and total < batch.noisy.numel()
    found = []
    for one in (packed, batch):
        model.zero_grad()
        normalizer = global_normalizer([one], ALONE)
        result = backward(model, estimator.loss, one, normalizer, ALONE)
        found.append([result.loss, result.row_losses, *(p.grad for p in model.parameters())])
    close(*found)
    q, k, v = (torch.randn(1, 2, total, 8) for _ in range(3))
    flex = flex_attention(q, k, v, block_mask=packed.attend.flex(torch.device("cpu")))
    torch.testing.assert_close(packed.attend(q, k, v, 0.0), flex, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_is_that_of_each_block_after_its_clean_prefix(size, shift):
    """By the model's plain forward, a block at a time, and full logits."""
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), MASK, blocks=Blocks(size))
    batches, model = batches_of(some_rows()), a_model(size, shift)
    found = gradients(model, estimator, batches)
    (batch,) = corrupted_step(batches, 0, estimator)
    columns = batch.target_places()[1]
    order, total = batches.indices(0).tolist(), 0.0
    for part in range(len(batch.t)):
        own = batch.targets.rows == part
        row, start = int(batch.row[part]), int(columns[own][0]) // size * size
        tokens = batches.rows[order[row]].tokens[: start + size].clone()
        tokens[columns[own]] = MASK
        block = torch.arange(len(tokens)) // size
        logits = model(tokens[None], mask=(block[:, None] >= block)[None])[0]
        for i in columns[own].tolist():
            label = batches.rows[order[row]].tokens[i]
            predicted = logits[max(i - 1, 0) if shift else i]
            count, n = int(own.sum()), int(batch.n[part])
            inside = n / int(batches.rows[order[row]].eligible.sum())
            weight = n / count / n * inside
            total = total + weight * F.cross_entropy(predicted, label)
    model.zero_grad()
    total = total / len(order)
    total.backward()
    close(found, [total.detach(), *(p.grad for p in model.parameters())])


class OneView(Masking):
    """One of the views of another mask."""

    def __init__(self, masking, view):
        self.masking, self.view, self.by_count = masking, view, masking.by_count

    def __call__(self, t, u, eligible, w):
        found = self.masking(t, u, eligible, w)
        at = slice(self.view, self.view + 1)
        return Views(found.mask[at], found.inverse_p[at])


@pytest.mark.parametrize("masking", [Complement(), Mirror(), Rotation(4), Rotation(3)])
def test_views_that_share_a_clean_copy_are_as_many_forwards_of_their_own(masking):
    batches, model = batches_of(some_rows()), a_model(4)
    estimator = Estimator(Stratified(), masking, MDMLoss(), MASK, blocks=Blocks(4))
    together = gradients(model, estimator, batches)
    count = masking.views
    apart = [
        gradients(model, estimator._replace(masking=OneView(masking, view)), batches)
        for view in range(count)
    ]
    close(together, [sum(x) / count for x in zip(*apart, strict=True)])
    (batch,) = corrupted_step(batches, 0, estimator)
    length = batch.attend.length
    assert batch.noisy.shape[1] <= (count + 1) * length < 2 * count * length
