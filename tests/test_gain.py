"""What a forward teaches at each rate: its estimators, the decoder's path, a window's rule."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gain import ENOUGH, GRID, Gradients, edge, of_decoder
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.noise import keyed_generator

MASK = 3


def test_signal_noise_and_product_are_unbiased():
    """Of batches of 8 rows whose gradients are known Gaussians: |m|², tr Cov of a row, m · m'."""
    dice = keyed_generator(0, "gain")
    mean, other = (torch.randn(6, generator=dice, dtype=torch.float64) for _ in range(2))
    spread = torch.linspace(0.5, 3, 6, dtype=torch.float64)
    found = []
    for _ in range(4000):
        noise = torch.randn(2, 5, 8, 6, generator=dice, dtype=torch.float64) * spread
        a, b = (Gradients((m + x).mean(1)) for m, x in zip((mean, other), noise, strict=True))
        found.append([a.signal(), a.noise(8), a.product(b)])
    values = torch.tensor(found, dtype=torch.float64)
    truth = torch.stack((mean.square().sum(), spread.square().sum(), mean @ other))
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - truth).abs() < 4 * error).all()


def plain_path(model, tokens: list[int], answer: list[int]) -> tuple[Tensor, list[int]]:
    """One row alone: the mean cross-entropy of the reference's tokens, in the order of greedy
    decoding that is told the reference after each choice; and that order."""
    left, written, total, order = list(answer), list(tokens), torch.zeros(()), []
    while left:
        shown = [MASK if i in left else token for i, token in enumerate(written)]
        logits = model(torch.tensor([shown]))[0]
        best = max(left, key=lambda i: float(logits[i].detach().softmax(-1).max()))
        total = total + F.cross_entropy(logits[best], torch.tensor(tokens[best]))
        left.remove(best)
        order.append(best)
    return total / len(answer), order


def test_the_decoder_s_gradient_is_of_its_own_path(tiny_model):
    model = tiny_model.double()
    rows = [([5, 9, 11, 20, 31, 7], [False, False, True, True, True, True])]
    rows += [([6, 40, 41, 2], [False, True, True, True])]
    batches = GlobalBatches(Rows(iter(rows)), Split(2), Padding(0), seed=0)
    (found,) = of_decoder(model, batches, MASK, first=0, count=1).each
    losses, orders = [], []
    for tokens, eligible in rows:
        loss, order = plain_path(model, tokens, [i for i, x in enumerate(eligible) if x])
        losses.append(loss)
        orders.append(order)
    assert any(order != sorted(order) for order in orders)  # else left to right would pass too
    expected = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
    assert torch.allclose(found, torch.cat([x.flatten() for x in expected]), rtol=1e-9)


@pytest.mark.parametrize(
    "gain, begins",
    [
        (lambda t: 1.0, 0),  # each rate is as good: all of them
        (lambda t: t, 8),
        (lambda t: min(1.0, 0.2 + 2 * t), 3),
        (lambda t: -1.0 if t > 0.5 else 1.0, 0),
    ],
)
def test_a_window_begins_where_the_gain_is_enough(gain, begins):
    lines = [{"t": t, "gain": 7 * gain(t)} for t in GRID.tolist()]
    assert edge(lines) == lines[begins]["t"]
    smooth = [
        sum(lines[min(max(i + d, 0), len(lines) - 1)]["gain"] for d in (-1, 0, 1)) / 3
        for i in range(len(lines))
    ]
    enough = ENOUGH * max(smooth)
    assert smooth[begins] >= enough and all(x < enough for x in smooth[:begins])
