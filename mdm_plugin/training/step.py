"""The part of a training step that is masked diffusion: noise in, loss out."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm_plugin.contract import Estimator, Times, TimestepSampler, Views
from mdm_plugin.data.batches import Batch, GlobalBatches
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss, Targets
from mdm_plugin.models.transformer import MDMTransformer, row_mask
from mdm_plugin.noise import keyed_generator
from mdm_plugin.training.hidden import row_norms, token_norms

NO_OFFLOADING: AbstractContextManager = nullcontext()


class Corrupted(NamedTuple):
    """A micro-batch with its masks drawn: V views of R rows of L tokens.

    noisy: [V·R, L], long, what the model sees.
    attend: [V·R, 1, L], bool, or None; of packed rows, what ``models.row_mask`` gives.
    targets: what it is to predict.
    normalizer: scalar, fp64, this micro-batch's share of the loss's normaliser.
    t: [R], fp64.
    importance: [R], fp64, the importance weight of each row, of its t or of its count.
    row_scale: [V·R], fp32: times the sum of a sequence's CE, its row loss l.
    eligible: number of eligible positions in the R rows.
    places: [R], long, of the rows in the global batch.
    input_pos: [1, T], long, of packed rows; else None.
    sequence: [T], long, of packed rows the sequence that each token is of, V·R for filling; else
        None.
    """

    noisy: Tensor
    attend: Any
    targets: Targets
    normalizer: Tensor
    t: Tensor
    importance: Tensor
    row_scale: Tensor
    eligible: int
    places: Tensor
    input_pos: Tensor | None = None
    sequence: Tensor | None = None

    @property
    def views(self) -> int:
        """V."""
        return len(self.row_scale) // len(self.t)

    def to(self, device: torch.device) -> "Corrupted":
        """All that the step on ``device`` uses there, without waiting for it."""
        mask = self.attend
        if self.input_pos is None:
            mask = None if mask is None else to_device(mask, device)
        return self._replace(
            noisy=to_device(self.noisy, device),
            attend=mask,
            targets=Targets(*(to_device(x, device) for x in self.targets)),
            row_scale=to_device(self.row_scale, device),
            input_pos=None if self.input_pos is None else to_device(self.input_pos, device),
        )


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``; to CUDA from pinned memory, while the device works on."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def pack(
    batch: Corrupted, model: MDMTransformer, device: torch.device, multiple: int = 1
) -> Corrupted:
    """The same V·R sequences without their padding, one after another in a single one.

    Each attends to itself alone and has positions from 0: the loss and its gradient are those of
    the padded batch. The whole is filled to a multiple of ``multiple`` tokens (of 128 on CUDA).
    """
    count, length = batch.noisy.shape
    real = (
        torch.ones(count, length, dtype=torch.bool) if batch.attend is None else batch.attend[:, 0]
    )
    kept = real.flatten()
    lengths = real.sum(1)
    position = torch.arange(length).expand(count, -1)[real]
    multiple = multiple if device.type != "cuda" else math.lcm(multiple, 128)
    if filling := -len(position) % multiple:
        lengths = torch.cat((lengths, torch.tensor([filling])))
    new = kept.cumsum(0) - 1
    targets = batch.targets._replace(positions=new[batch.targets.positions])
    return batch._replace(
        noisy=F.pad(batch.noisy.flatten()[kept], (0, filling))[None],
        attend=row_mask(lengths, device, model.layers[0].attn.is_causal),
        targets=targets,
        input_pos=F.pad(position, (0, filling))[None],
        sequence=F.pad(kept.nonzero().squeeze(1) // length, (0, filling), value=count),
    )


def corrupt(batch: Batch, times: Times, estimator: Estimator) -> Corrupted:
    """Draw the masks of a micro-batch of R rows.

    Args:
        batch: the rows and their noise.
        times: of the global batch, [n] each; the micro-batch takes its places.
        estimator: its masking, its loss, which gives the masked positions their weights, and w.
    """
    masking, loss = estimator.masking, estimator.loss
    t, n = times.t[batch.places], batch.eligible.sum(1)
    importance = times.row_weights(batch.places, n, masking, estimator.w)
    views = masking(t, batch.u, batch.eligible, estimator.w)
    check_views(views, estimator, batch)
    count, rows, length = views.mask.shape
    hidden = views.mask if views.hidden is None else views.hidden
    return Corrupted(
        noisy=torch.where(hidden, estimator.mask_id, batch.tokens).reshape(count * rows, length),
        attend=None if batch.attend is None else batch.attend.repeat(count, 1, 1),
        targets=loss.targets(batch.tokens, views.mask, views.inverse_p, importance, n),
        normalizer=loss.normalizer(views.mask, n),
        t=t,
        importance=importance,
        row_scale=(views.inverse_p / n).reshape(-1).float(),
        eligible=int(n.sum()),
        places=batch.places,
    )


def check_times(times: object, estimator: Estimator, n: int) -> None:
    """Check what a sampler of t gives for n rows.

    Raises:
        UserError: if it is not as ``mdm_plugin.contract.Times`` says.
    """
    name = f"timesteps: {type(estimator.timesteps).__name__}"
    if not isinstance(times, Times):
        raise UserError(
            f"{name} gives a {type(times).__name__}: return mdm_plugin.contract.Times(t, weight, "
            "density)"
        )
    for part, x in (("t", times.t), ("weight", times.weight)):
        if x.shape != (n,) or x.dtype != torch.float64:
            raise UserError(
                f"{name} gives {part} of shape {list(x.shape)} and {x.dtype}: {n} rows want [{n}] "
                "and torch.float64"
            )
    if not (((times.t >= 0) & (times.t <= 1)).all() and (times.weight > 0).all()):
        raise UserError(f"{name} gives a t outside of [0, 1], or a weight that is not above 0")
    if times.density is not None and not (times.density.values > 0).all():
        raise UserError(f"{name} gives a density that is 0 somewhere: mix it with the uniform one")


def check_views(views: object, estimator: Estimator, batch: Batch) -> None:
    """Check what a mask gives for the rows of a batch.

    Raises:
        UserError: if it is not as ``mdm_plugin.contract.Views`` says.
    """
    masking = estimator.masking
    name, count = f"masking: {type(masking).__name__}", masking.views
    if not isinstance(views, Views):
        raise UserError(
            f"{name} gives a {type(views).__name__}: return mdm_plugin.contract.Views(mask, "
            "inverse_p)"
        )
    rows, length = batch.tokens.shape
    shapes = list(views.mask.shape), list(views.inverse_p.shape)
    if shapes[0][1:] == [rows, length] and shapes[0][0] != count:
        raise UserError(
            f"{name} gives {shapes[0][0]} views and declares {count}: say views = {shapes[0][0]}"
        )
    if shapes != ([count, rows, length], [count, rows]) or views.mask.dtype != torch.bool:
        raise UserError(
            f"{name} gives a mask of shape {shapes[0]} and {views.mask.dtype}, and inverse_p of "
            f"{shapes[1]}: {count} views of {rows} rows of {length} tokens want "
            f"{[count, rows, length]} and torch.bool, and {[count, rows]}"
        )
    if (views.mask & ~batch.eligible).any():
        raise UserError(f"{name} masks what is not eligible: end with `mask & eligible`")


def step_times(batches: GlobalBatches, step: int, estimator: Estimator) -> Times:
    """The t of a step's global batch: a function of (seed, step) alone."""
    generator = keyed_generator(batches.seed, "t", step)
    times = estimator.timesteps(batches.size, generator, estimator.w)
    check_times(times, estimator, batches.size)
    return times


def corrupted_step(batches: GlobalBatches, step: int, estimator: Estimator) -> list[Corrupted]:
    """This rank's micro-batches of a step with their masks drawn: functions of (seed, step, place)
    alone."""
    times = step_times(batches, step, estimator)
    return [corrupt(batch, times, estimator) for batch in batches.micro_batches(step)]


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
