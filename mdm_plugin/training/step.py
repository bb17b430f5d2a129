"""The part of a training step that is masked diffusion: what is corrupted in, loss out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdm_plugin.contract import TimestepSampler
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.training.corruption import Corrupted, to_device
from mdm_plugin.training.hidden import row_norms, token_norms

NO_OFFLOADING: AbstractContextManager = nullcontext()


def global_normalizer(micro_batches: Sequence[Corrupted], world: World) -> Tensor:
    """What the loss of a whole global batch is divided by, summed over micro-batches and ranks.

    One for all, so that the gradient does not depend on how the same global batch is split.
    """
    own = torch.stack([batch.normalizer for batch in micro_batches]).sum()
    return world.sum(to_device(own.float(), world.device)).clamp(min=1)


def forward_loss(model: nn.Module, loss: MDMLoss, batch: Corrupted) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, before the global normaliser, and CE [M], detached."""
    return model(
        batch.noisy,
        mask=batch.attend,
        input_pos=batch.input_pos,
        positions=batch.targets.positions,
        head=lambda head, hidden: loss(head, hidden, batch.targets),
    )


class Result(NamedTuple):
    """What a micro-batch gave, detached, on the device.

    batch: the micro-batch, as it was drawn.
    loss: scalar, its share of the global batch's loss.
    row_losses: [R], l of each row, without importance weights.
    row_norms: [R], G of each row (``hidden.row_norms``); None where it was not asked for.
    """

    batch: Corrupted
    loss: Tensor
    row_losses: Tensor
    row_norms: Tensor | None = None

    def shown(self, sampler: TimestepSampler) -> tuple[Tensor, Tensor]:
        """t [R], and what a sampler that learns is to learn from at each, [R]."""
        norms = self.row_norms if wants_norms(sampler) else None
        return self.batch.t, self.row_losses if norms is None else norms


def wants_norms(sampler: TimestepSampler) -> bool:
    """Whether a sampler learns from the rows' gradients."""
    return sampler.learns and sampler.learns_from == "gradient"


def backward(
    model: nn.Module,
    loss: MDMLoss,
    batch: Corrupted,
    normalizer: Tensor,
    world: World,
    offloading: AbstractContextManager = NO_OFFLOADING,
    norms: bool = False,
) -> Result:
    """Add a micro-batch's gradient to the parameters'; with ``norms``, measure the rows' G."""
    here = batch.to(world.device)
    # Where gradients are averaged over ranks: the loss is a sum over them.
    factor = world.size if world.averages else 1
    weights = here.targets.weights * (factor / normalizer)
    here = here._replace(targets=here.targets._replace(weights=weights))
    watching: AbstractContextManager[list[Tensor]] = nullcontext([])
    if norms:
        watching = token_norms(model)
    with watching as found:
        with offloading:
            total, ce = forward_loss(model, loss, here)
        total.backward()
    measured = row_norms(here, found[0], normalizer / factor) if norms else None
    return Result(batch, total.detach() / factor, row_losses(here, ce), measured)


@torch.no_grad()
def row_losses(batch: Corrupted, ce: Tensor) -> Tensor:
    """l of each row, the mean over its views, without importance weight. [R], on ce's device.

    ce [M]: of the batch's targets.
    """
    totals = torch.zeros(len(batch.row_scale), device=ce.device)
    totals.index_add_(0, batch.targets.rows.to(ce.device), ce)
    return (totals * batch.row_scale.to(ce.device)).reshape(-1, len(batch.t)).mean(0)


def learn(sampler: TimestepSampler, shown: Sequence[tuple[Tensor, Tensor]], world: World) -> None:
    """Teach a sampler of t what a step showed on all ranks: only one that ``learns``.

    shown: t [R] and row losses or norms [R], whichever it learns from, of each of this rank's
    micro-batches (``Result.shown``). A step whose tally is not finite teaches nothing.
    """
    if not sampler.learns:
        return
    tallies = [sampler.tally(t, values.cpu()) for t, values in shown]
    total = world.sum(torch.stack(tallies).sum(0)).cpu()
    if total.isfinite().all():
        sampler.update(total)
