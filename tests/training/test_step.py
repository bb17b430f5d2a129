import pytest
import torch
import torch.nn.functional as F

from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount, Mirror, NextToken
from mdm_plugin.models import llada
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training.corruption import corrupt, pack
from mdm_plugin.training.step import backward, global_normalizer
from tests.toy import ELBO

MASK = 1


def a_model(**options):
    torch.manual_seed(0)
    shape = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
    shift = options.pop("shift", False)
    model = llada(vocab_size=60, num_layers=2, max_seq_len=64, **shape, **options)
    model.shift = model.shift or shift
    return model


def a_batch(masking, loss):
    generator = torch.Generator().manual_seed(4)
    sizes = [(3, 5), (1, 20), (7, 2), (2, 1), (6, 11)]
    rows = Rows(
        (torch.randint(2, 60, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in sizes
    )
    batches = GlobalBatches(rows, Split(5), Padding(0), seed=0)
    t, weight, _ = Uniform()(5, generator, ELBO)
    estimator = Estimator(Uniform(), masking, loss, MASK)
    return corrupt(batches.micro_batches(0)[0], Times(t, weight + t), estimator)


def gradients(model, loss, batch, device="cpu"):
    alone = World(0, 1, torch.device(device), None)
    model.zero_grad()
    found = backward(model, loss, batch, global_normalizer([batch], alone), alone)
    return [found.loss, found.row_losses, *(p.grad for p in model.parameters())]


CASES = {
    "Mirror": (Mirror(), {}, {}),
    "FixedCount, shifted": (FixedCount(), {"chunk_size": 7}, {"shift": True}),
    "autoregressive": (NextToken(), {}, {"causal": True}),
}


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("case", CASES)
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(case, multiple):
    masking, options, shape = CASES[case]
    loss, model = MDMLoss(**options), a_model(**shape)
    batch = a_batch(masking, loss)
    packed = pack(batch, model, torch.device("cpu"), multiple)
    views = len(batch.noisy) // 5
    assert packed.noisy.shape == (1, -(-58 * views // multiple) * multiple)
    for a, b in zip(gradients(model, loss, packed), gradients(model, loss, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_the_mask_of_rows_they_would_see_each_other():
    loss, model = MDMLoss(), a_model()
    batch = a_batch(Mirror(), loss)
    packed = pack(batch, model, torch.device("cpu"))
    wrong = gradients(model, loss, packed._replace(attend=None))[0]
    assert abs(wrong - gradients(model, loss, batch)[0]) > 1e-3


@pytest.mark.gpu
def test_packed_rows_on_a_gpu_by_flex_attention():
    loss, model = MDMLoss(), a_model().cuda()
    batch = a_batch(Mirror(), loss)
    packed = pack(batch, model, torch.device("cuda"))
    for a, b in zip(
        gradients(model, loss, packed, "cuda"), gradients(model, loss, batch, "cuda"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_shifted_model_has_the_loss_and_the_gradient_of_its_definition(packed, causal):
    """By full logits, one position at a time: i from i − 1, a row's first token from itself."""
    masking = NextToken() if causal else FixedCount()
    loss, model = MDMLoss(chunk_size=7), a_model(shift=True, causal=causal)
    batch = a_batch(masking, loss)
    given = pack(batch, model, torch.device("cpu")) if packed else batch
    found = gradients(model, loss, given)
    model.zero_grad()
    logits = model(batch.noisy, mask=batch.attend)
    total, length = 0.0, batch.noisy.shape[1]
    targets = batch.targets
    for place, label, weight in zip(
        targets.positions.tolist(), targets.labels, targets.weights, strict=True
    ):
        row, i = divmod(place, length)
        total = total + weight * F.cross_entropy(logits[row, max(i - 1, 0)], label)
    total = total / 5
    total.backward()
    torch.testing.assert_close(found[0], total.detach(), rtol=1e-5, atol=1e-6)
    for a, p in zip(found[2:], model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
