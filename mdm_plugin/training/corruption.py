"""Noise in: the rows of a batch with their masks drawn, as a model takes them."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_plugin.contract import Blocks, Estimator, Times, Views
from mdm_plugin.data.batches import Batch, GlobalBatches
from mdm_plugin.errors import UserError
from mdm_plugin.loss import Targets
from mdm_plugin.models.blocks import BlockAttention, PackedBlocks
from mdm_plugin.models.transformer import MDMTransformer, row_mask
from mdm_plugin.noise import keyed_generator


class Corrupted(NamedTuple):
    """A micro-batch with its masks drawn: V views of R rows of L tokens.

    Of a model with blocks (``corrupt_blocks``): read blocks for rows in what follows, but for
    noisy, attend and input_pos.

    noisy: [V·R, L], long, what the model sees; [R, W] of a ``BlockAttention``.
    attend: [V·R, 1, L], bool, or None; of packed rows, what ``models.row_mask`` gives; of rows in
        blocks, a ``BlockAttention``.
    targets: what it is to predict.
    normalizer: scalar, fp64, this micro-batch's share of the loss's normaliser.
    t: [R], fp64.
    importance: [R], fp64, the importance weight of each row, of its t or of its count.
    row_scale: [V·R], fp32: times the sum of a sequence's CE, its row loss l.
    eligible: number of eligible positions in the R rows.
    places: [R], long, of the rows in the global batch.
    n: [R], long, eligible positions of each.
    row: [R], long, the row of the micro-batch that each is (of).
    input_pos: [1, T], long, of packed rows; [R, W] of rows in blocks; else None.
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
    n: Tensor
    row: Tensor
    input_pos: Tensor | None = None
    sequence: Tensor | None = None

    @property
    def views(self) -> int:
        """V."""
        return len(self.row_scale) // len(self.t)

    def row_means(self, losses: Tensor) -> Tensor:
        """Losses l of the micro-batch's rows, from those of their blocks. [R] → [rows]."""
        if not isinstance(self.attend, BlockAttention | PackedBlocks):
            return losses
        return self.of_rows(losses.cpu() * self.n) / self.of_rows(self.n)

    def of_rows(self, values: Tensor) -> Tensor:
        """Sums over what is of one row, by row of the micro-batch: values [R], CPU → [rows]."""
        return values.new_zeros(int(self.row[-1]) + 1).index_add_(0, self.row, values)

    @property
    def target_rows(self) -> Tensor:
        """The row of the micro-batch that each target is in. [M]."""
        return self.row[self.targets.rows % len(self.row)]

    def target_places(self) -> tuple[Tensor, Tensor]:
        """Of each target its row in the micro-batch and its column in that. [M] each; of what is
        not packed."""
        positions = self.targets.positions
        if isinstance(self.attend, BlockAttention):
            column = self.attend.column_of(positions)
        else:
            column = positions % self.noisy.shape[1]
        return self.target_rows, column

    def to(self, device: torch.device) -> "Corrupted":
        """All that the step on ``device`` uses there, without waiting for it."""
        mask = self.attend
        if isinstance(mask, BlockAttention | PackedBlocks):
            mask = mask.to(device)
        elif self.input_pos is None:
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

    Rows in blocks are packed with their views and clean copies (``PackedBlocks``).

    Each attends to itself alone and has positions from 0: the loss and its gradient are those of
    the padded batch. The whole is filled to a multiple of ``multiple`` tokens (of 128 on CUDA).
    """
    if isinstance(batch.attend, BlockAttention):
        return _pack_blocks(batch, batch.attend)
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


def _pack_blocks(batch: Corrupted, attend: BlockAttention) -> Corrupted:
    """Each row from its own first block to its own last one."""
    size, count = attend.block, len(batch.noisy)
    columns, view = attend.columns(), attend.view()
    real = torch.ones(count, attend.length).bool() if attend.real is None else attend.real
    ends = -(-real.sum(1) // size) * size  # of whole blocks
    row, column = batch.target_places()
    firsts = torch.full((count,), attend.length).scatter_reduce(0, row, column, "amin")
    rows, kept = [], []
    for i, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        first = min(first, end - 1) // size * size
        own = BlockAttention(size, end, first, attend.views, real[i : i + 1, :end])
        shown = columns < torch.where(view < 0, end - size, end)
        kept.append(shown & ((view < 0) | (columns >= first)))
        rows.append(own)
    chosen = torch.stack(kept)
    new = chosen.flatten().cumsum(0) - 1
    packed = PackedBlocks(rows)
    return batch._replace(
        noisy=batch.noisy[chosen][None],
        attend=packed,
        targets=batch.targets._replace(positions=new[batch.targets.positions]),
        input_pos=packed.columns()[None],
    )


def corrupt(batch: Batch, times: Times, estimator: Estimator) -> Corrupted:
    """Draw the masks of a micro-batch of R rows.

    Args:
        batch: the rows and their noise.
        times: of the global batch, [n] each; the micro-batch takes its places.
        estimator: its masking, its loss, which gives the masked positions their weights, and w.
    """
    if estimator.blocks:
        return corrupt_blocks(batch, times, estimator, estimator.blocks)
    loss = estimator.loss
    t, n, importance, views = _draw(batch, times, estimator)
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
        n=n,
        row=torch.arange(rows),
    )


def corrupt_blocks(batch: Batch, times: Times, estimator: Estimator, blocks: Blocks) -> Corrupted:
    """``corrupt`` for a model that writes block by block: [V views | clean copy] of each row.

    To the sampler and the mask, each of the P blocks with something to predict is a row. Its loss
    counts in its row by its share of the eligible positions: a row loss is Σ_b (N_b / N) · l_b.

    times: of the global batch's blocks, where ``batch.first_block`` numbers them; of its rows
        otherwise: [n].
    """
    loss, size = estimator.loss, blocks.length
    rows, length = batch.tokens.shape
    fill = -length % size
    tokens, eligible = F.pad(batch.tokens, (0, fill)), F.pad(batch.eligible, (0, fill))
    whole = length + fill
    real = None if batch.attend is None else F.pad(batch.attend[:, 0], (0, fill))
    if real is None and fill:
        real = torch.arange(whole).expand(rows, -1) < length

    def cut(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, size))

    row, block = cut(eligible).any(2).nonzero(as_tuple=True)
    places = batch.places[row]
    if batch.first_block is None:
        number = places
    else:
        number = batch.first_block[row] + torch.arange(len(row)) - torch.searchsorted(row, row)
    own = Batch(
        cut(tokens)[row, block],
        cut(eligible)[row, block],
        None,
        cut(F.pad(batch.u, (0, fill)))[row, block],
        number,
    )
    t, n, importance, views = _draw(own, times, estimator)
    count, all_n = len(views.mask), batch.eligible.sum(1)
    attend = BlockAttention(size, whole, int(block.min()) * size, count, real)
    hidden = torch.zeros(count, rows, whole // size, size, dtype=torch.bool)
    hidden[:, row, block] = views.mask if views.hidden is None else views.hidden
    noisy = torch.where(hidden.flatten(2), estimator.mask_id, tokens)
    targets = loss.targets(own.tokens, views.mask, views.inverse_p, importance, all_n[row])
    part, within = targets.rows % len(row), targets.positions % size
    positions = attend.positions(targets.rows // len(row), row[part], block[part] * size + within)
    return Corrupted(
        noisy=attend.lay_out(noisy, tokens),
        attend=attend,
        targets=targets._replace(positions=positions),
        normalizer=loss.normalizer(hidden.flatten(2), all_n),
        t=t,
        importance=importance,
        row_scale=(views.inverse_p / n).reshape(-1).float(),
        eligible=int(n.sum()),
        places=places,
        n=n,
        row=row,
        input_pos=attend.columns().expand(rows, -1),
    )


def _draw(batch: Batch, times: Times, estimator: Estimator) -> tuple[Tensor, Tensor, Tensor, Views]:
    """Of each row t, its eligible positions and its importance weight, [R]; and the views."""
    t, n = times.t[batch.places], batch.eligible.sum(1)
    importance = times.row_weights(batch.places, n, estimator.masking, estimator.w)
    views = estimator.masking(t, batch.u, batch.eligible, estimator.w)
    check_views(views, estimator, batch)
    return t, n, importance, views


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


def corrupted_step(batches: GlobalBatches, step: int, estimator: Estimator) -> list[Corrupted]:
    """This rank's micro-batches of a step with their t and masks drawn: functions of (seed, step,
    place) alone."""
    first = first_blocks(batches, batches.indices(step), estimator.blocks)
    count = batches.size if first is None else int(first[-1])
    times = estimator.timesteps(count, keyed_generator(batches.seed, "t", step), estimator.w)
    check_times(times, estimator, count)
    own = [batch.numbered(first) for batch in batches.micro_batches(step)]
    return [corrupt(batch, times, estimator) for batch in own]


def first_blocks(batches: GlobalBatches, indices: Tensor, blocks: Blocks | None) -> Tensor | None:
    """The number of each row's first block with something to predict among those of a global batch
    of the rows at ``indices`` [n], and last how many there are: [n + 1], long. None where rows have
    one t each."""
    if blocks is None or blocks.one_t:
        return None
    ends = batches.blocks_of(indices, blocks.length).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends))
