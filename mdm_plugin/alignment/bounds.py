"""Bounds of whole responses: from many draws, with a gradient whose memory does not grow with them.

The bound of a response x0 of N tokens is a lower bound of log p(response | prompt),

    B(x0) = −N · J(x0),   J(x0) = ∫₀¹ E_m [l(x0, t, m)] dt,   l = (1/N) · Σ CE_i / p

(``mdm_plugin.loss``): a sum over the response's tokens. Its estimate is the mean over D draws of
(t, m), B = (1/D) · Σ_d B_d, each of V views, so D·V forwards.

A loss of bounds is no sum over draws, and one graph of them all would need their memory. So it is
two passes. The first, without gradients, gives every B, and so ∂loss/∂B. The second runs each draw
by itself, with these slopes as its weights: B is a mean over draws, so what their gradients add up
to is that of one graph.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator, keyed_uniform, seed_torch
from mdm_plugin.training.corruption import Corrupted, check_times, corrupt, pack
from mdm_plugin.training.step import NO_OFFLOADING, Result, backward, forward_loss, row_losses


class DrawPlan(NamedTuple):
    """How many draws a bound is estimated from, and by what noise.

    number: D, draws of each sequence. seed: of their noise. shared: so many neighbouring sequences,
    by place, have the same noise; 2 for both answers of a preference.
    """

    number: int
    seed: int
    shared: int = 1


class Drawn(NamedTuple):
    """A micro-batch of R sequences, each corrupted D times.

    draws: one for each draw, of the same R sequences. n: [R], long, eligible tokens of each.
    places: [R], long, of the sequences in the global batch. length: L, of their rows.
    """

    draws: list[Corrupted]
    n: Tensor
    places: Tensor
    length: int


def drawn(
    batch: Batch,
    estimator: Estimator,
    draws: DrawPlan,
    key: tuple[int | str, ...],
    masks: tuple[int | str, ...] | None = None,
) -> Drawn:
    """A micro-batch corrupted D times, by noise that is a function of (seed, key, draw, place).

    To the sampler of t, a sequence's D draws are a global batch of their own. So stratified draws
    are spread evenly over each sequence's t, or counts.

    Args:
        batch: its own noise is not used.
        estimator: its objective's w is the one to be estimated: 1 for a bound of the likelihood.
        key: what the draws are for, e.g. ``("mask", step)``.
        masks: the key of the masks alone, where they are to be others at the same t.
    """
    noise = batch.places // draws.shared
    each = []
    for place in noise.tolist():
        generator = keyed_generator(draws.seed, "t", *key, place)
        each.append(estimator.timesteps(draws.number, generator, estimator.w))
        check_times(each[-1], estimator, draws.number)
    own = torch.arange(len(noise))
    found = []
    for d in range(draws.number):
        times = Times(
            torch.stack([x.t[d] for x in each]),
            torch.stack([x.weight[d] for x in each]),
            each[0].density,
        )
        of = key if masks is None else masks
        u = keyed_uniform(draws.seed, *of, d, places=noise, length=batch.tokens.shape[1])
        noisy = corrupt(batch._replace(u=u, places=own), times, estimator)
        found.append(noisy._replace(places=batch.places[noisy.places]))
    return Drawn(found, batch.eligible.sum(1), batch.places, batch.tokens.shape[1])


def packed(draws: Drawn, model: MDMTransformer, device: torch.device, multiple: int) -> Drawn:
    """The same without padding (``training.corruption.pack``)."""
    one = partial(pack, model=model, device=device, multiple=multiple)
    return draws._replace(draws=[one(x) for x in draws.draws])


@torch.no_grad()
def bounds(
    model: MDMTransformer, loss: MDMLoss, draws: Drawn, world: World, key: tuple[int | str, ...]
) -> Tensor:
    """B_d of each sequence and draw, in nats. [R, D], fp64, on the CPU.

    key: of torch's generators, for a model with dropout: ``add_gradient`` is to get the same.
    """
    found = []
    for d, noisy in enumerate(draws.draws):
        seed_torch(*key, d)
        here = noisy.to(world.device)
        rows = row_losses(here, forward_loss(model, loss, here)[1])
        found.append(noisy.of_rows(-rows.cpu().double() * noisy.n * noisy.importance))
    return torch.stack(found, 1)


@torch.no_grad()
def token_bounds(
    model: MDMTransformer, loss: MDMLoss, draws: Drawn, world: World, key: tuple[int | str, ...]
) -> Tensor:
    """What each place adds to a sequence's bound, in the mean over draws. [R, L], fp64, on the CPU.

    A row's sum is B. The place of a token that no draw has masked adds 0. key: as in ``bounds``;
    the draws are not packed.
    """
    found = torch.zeros(len(draws.n), draws.length, dtype=torch.float64)
    for d, noisy in enumerate(draws.draws):
        seed_torch(*key, d)
        here = noisy.to(world.device)
        ce = forward_loss(model, loss, here)[1].cpu().double()
        row, place = noisy.target_places()
        values = -ce * noisy.targets.weights * draws.n[row] / len(draws.draws)
        found.index_put_((row, place), values, accumulate=True)
    return found


def add_gradient(
    model: MDMTransformer,
    loss: MDMLoss,
    draws: Drawn,
    slopes: Tensor,
    world: World,
    key: tuple[int | str, ...],
    offloading: AbstractContextManager = NO_OFFLOADING,
) -> list[Result]:
    """Add Σ_r slopes_r · ∇B_r to the parameters' gradients, one draw after another.

    slopes: [R], ∂loss/∂B of each sequence, of a loss that is a sum over all ranks; or [R, L], of
    what each place adds to it, of draws that are not packed. loss: normalised by the response. key:
    as in ``bounds``. Of each draw, what it gave: with the row losses l.
    """
    one, found = torch.ones((), device=world.device), []
    scale = draws.n if slopes.ndim == 1 else draws.n[:, None]
    weights = (-slopes * scale / len(draws.draws)).float()
    for d, noisy in enumerate(draws.draws):
        seed_torch(*key, d)
        own = weights[noisy.target_rows if slopes.ndim == 1 else noisy.target_places()]
        targets = noisy.targets._replace(weights=noisy.targets.weights * own)
        weighted = noisy._replace(targets=targets)
        result = backward(model, loss, weighted, one, world, offloading)
        found.append(result._replace(batch=noisy))
    return found


def sharing(results: Sequence[Result], loss: float, world: World) -> list[Result]:
    """The same results, each with its share of a step's whole loss: what is logged and guarded is
    that, and not the sums that these had in the place of it."""
    share = torch.tensor(loss / (len(results) * world.size), device=world.device)
    return [x._replace(loss=share) for x in results]


def everywhere(
    found: Sequence[Tensor], places: Sequence[Tensor], size: int, world: World
) -> Tensor:
    """What each rank knows of its own sequences, of all of the global batch. [size, …], fp64, CPU.

    found: [R, …] of each of this rank's micro-batches; places: [R] of each.
    """
    whole = torch.zeros(size, *found[0].shape[1:], dtype=torch.float64)
    known = torch.zeros(size, dtype=torch.float64)
    for values, at in zip(found, places, strict=True):
        whole[at], known[at] = values.double().cpu(), 1.0
    count = world.sum(known).cpu().clamp(min=1)  # several ranks may know of the same one
    return world.sum(whole).cpu() / count.view(-1, *[1] * (whole.ndim - 1))


def check_draws(estimator: Estimator, forwards: int) -> None:
    """Check that bounds can be estimated from so many forwards.

    Raises:
        UserError: if that is no number of the mask's views, or the sampler does not take it.
    """
    masking, sampler = estimator.masking, estimator.timesteps
    if forwards < 1:
        raise UserError(f"draws: {forwards}: use 1 or more")
    if forwards % masking.views:
        raise UserError(
            f"draws: {forwards}: {type(masking).__name__} has {masking.views} views, so use a "
            f"multiple of {masking.views}"
        )
    if sampler.probe_plan(estimator.w) is None:
        try:
            sampler(forwards // masking.views, keyed_generator(0), estimator.w)
        except ValueError as error:
            raise UserError(f"draws: {error}") from error
