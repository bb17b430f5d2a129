"""What a forward teaches at each masking rate, and toward what: the core of two measurements.

``study/rates.py`` asks it of the study's model, ``length_rates.py`` of longer answers and of text.
At each t of a grid, with masks by count, from batches of rows:

- signal: |G(t)|², of the mean gradient of the row loss at t, without the bias of its noise;
- noise: tr Cov of one row's gradient at t; signal / noise is what one forward says;
- cosine of G(t) with the ELBO's gradient, and with the decoder's, D: of the cross-entropy of the
  token that greedy decoding unmasks at each of its steps, along the path that it takes to the
  reference answer, one token a step;
- gain: ⟨G(t), D⟩ / sqrt(noise). A step along a noisy gradient goes this far toward what the
  decoder needs, for each unit of the noise that it brings along.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data import GlobalBatches
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount
from mdm_plugin.models import MDMTransformer
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.step import backward, global_normalizer

WORLD = World(0, 1, torch.device("cpu"), None)
GRID = torch.linspace(1 / 24, 23 / 24, 12, dtype=torch.float64)
ENOUGH = 0.75  # of the highest gain: rates from there on are worth their forwards


class Gradients(NamedTuple):
    """The gradients of some batches, [K, D], each the mean of its rows'."""

    each: Tensor

    def signal(self) -> float:
        """|E G|², unbiased."""
        k = len(self.each)
        return float((self.each.sum(0).square().sum() - self.each.square().sum()) / (k * (k - 1)))

    def noise(self, rows: int) -> float:
        """tr Cov of one row's gradient."""
        return float(self.each.var(0).sum()) * rows

    def product(self, other: "Gradients") -> float:
        """The inner product of both means, whose batches are drawn apart: unbiased."""
        return float(self.each.mean(0) @ other.each.mean(0))


def cosine(a: Gradients, b: Gradients) -> float:
    """Of both means, without the noise's share in their lengths; nan where there is no signal."""
    lengths = a.signal() * b.signal()
    return a.product(b) / lengths**0.5 if a.signal() > 0 < b.signal() else float("nan")


def collected(model: MDMTransformer) -> Tensor:
    """The gradient, flat, in fp64; and none is left."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found.double()


def at_rate(
    model: MDMTransformer, batches: GlobalBatches, t: float, mask_id: int, first: int, count: int
) -> Gradients:
    """Gradients of the row loss at t; below 0, of the ELBO, t stratified."""
    found = []
    for step in range(first, first + count):
        (batch,) = batches.micro_batches(step)
        estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), mask_id)
        if t < 0:
            generator = torch.Generator().manual_seed(step)
            times = estimator.timesteps(batches.size, generator, estimator.w)
        else:
            n = torch.full((batches.size,), t, dtype=torch.float64)
            times = Times(n, torch.ones_like(n))
        noisy = corrupt(batch, times, estimator)
        backward(model, estimator.loss, noisy, global_normalizer([noisy], WORLD), WORLD)
        found.append(collected(model))
    return Gradients(torch.stack(found))


def of_decoder(
    model: MDMTransformer, batches: GlobalBatches, mask_id: int, first: int, count: int
) -> Gradients:
    """Gradients of (1/N)·Σ CE of the tokens that greedy decoding unmasks, one at each step."""
    found = []
    for step in range(first, first + count):
        (batch,) = batches.micro_batches(step)
        _path(model, batch, mask_id)
        found.append(collected(model))
    return Gradients(torch.stack(found))


def _path(model: MDMTransformer, batch: Batch, mask_id: int) -> None:
    """Add the gradient along the path: the most confident position, then the reference's token."""
    masked, n = batch.eligible.clone(), batch.eligible.sum(1)
    rows = torch.arange(len(n))
    while masked.any():
        here = masked.any(1)
        logits = model(torch.where(masked, mask_id, batch.tokens), mask=batch.attend)
        sure = logits.detach().softmax(-1).amax(-1).masked_fill(~masked, -1)
        chosen = sure.argmax(1)
        ce = F.cross_entropy(logits[rows, chosen], batch.tokens[rows, chosen], reduction="none")
        (ce * here / n / len(n)).sum().backward()
        masked[rows[here], chosen[here]] = False


def measured(
    model: MDMTransformer, batches: GlobalBatches, mask_id: int, count: int
) -> tuple[list[dict[str, float]], float]:
    """All figures at each t of GRID, from ``count`` batches each; and the cosine of the ELBO's
    gradient and the decoder's."""
    apart = [10_000 + 1_000 * i for i in range(len(GRID) + 2)]
    elbo = at_rate(model, batches, -1.0, mask_id, apart[-1], 4 * count)
    decoder = of_decoder(model, batches, mask_id, apart[-2], count)
    lines = []
    for t, first in zip(GRID.tolist(), apart, strict=False):
        here = at_rate(model, batches, t, mask_id, first, count)
        signal, noise, toward = here.signal(), here.noise(batches.size), here.product(decoder)
        lines.append(
            {
                "t": t,
                "signal": signal,
                "noise": noise,
                "cosine_elbo": cosine(here, elbo),
                "cosine_decoder": cosine(here, decoder),
                "gain": toward / noise**0.5,
            }
        )
    return lines, cosine(elbo, decoder)


def edge(lines: list[dict[str, float]]) -> float:
    """The rule for a window's lower edge: the first t whose gain is ENOUGH of the highest.

    Each gain is averaged with its neighbours first: one alone has an error of a tenth.
    """
    gains = torch.tensor([x["gain"] for x in lines], dtype=torch.float64)
    padded = torch.cat((gains[:1], gains, gains[-1:]))
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return lines[int((smooth >= ENOUGH * smooth.max()).nonzero()[0])]["t"]


def table(title: str, lines: list[dict[str, float]]) -> str:
    """What was measured, as a table; gains as shares of the highest."""
    highest = max(x["gain"] for x in lines)
    out = [
        f"{title}: a window from {edge(lines):.2f}",
        "     t    signal     noise   signal/noise   cos ELBO   cos decoder   gain",
    ]
    for x in lines:
        ratio = x["signal"] / x["noise"]
        out.append(
            f"  {x['t']:.2f}  {x['signal']:8.4f}  {x['noise']:8.3f}  {ratio:13.5f}"
            f"  {x['cosine_elbo']:9.2f}  {x['cosine_decoder']:12.2f}  {x['gain'] / highest:5.2f}"
        )
    return "\n".join(out)
