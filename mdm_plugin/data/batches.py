"""Which rows a step trains on, and how they are laid out: functions of (seed, step) alone."""

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mdm_plugin.data.rows import Rows
from mdm_plugin.errors import UserError
from mdm_plugin.noise import keyed_generator, keyed_uniform


class Batch(NamedTuple):
    """R rows padded to L tokens, with their noise and their places in the global batch.

    tokens: [R, L], long.
    eligible: [R, L], bool, the positions that may be masked.
    attend: [R, 1, L], bool, false at padding; None where nothing is padding.
    u: [R, L], fp64, noise of U(0, 1) for the masks.
    places: [R], long, in 0..global batch − 1.
    first_block: [R], long, the number of each row's first block with something to predict among
        all of those of the global batch (``training.corruption.first_blocks``); None where all
        blocks of a row have its t, and in models without blocks.
    """

    tokens: Tensor
    eligible: Tensor
    attend: Tensor | None
    u: Tensor
    places: Tensor
    first_block: Tensor | None = None

    def numbered(self, first: Tensor | None) -> "Batch":
        """With ``first_block``, from the numbers of all rows of the global batch by place."""
        return self if first is None else self._replace(first_block=first[self.places])


class Split(NamedTuple):
    """What a global batch is made of, and whose share this is.

    batch_size: rows of a micro-batch. ranks, rank: how many share the batch, and which this is.
    accumulation: micro-batches of each rank.
    """

    batch_size: int
    ranks: int = 1
    rank: int = 0
    accumulation: int = 1

    @property
    def size(self) -> int:
        """Rows of a global batch."""
        return self.batch_size * self.ranks * self.accumulation


class Padding(NamedTuple):
    """How rows of one batch become of one length.

    pad_id: token of padding.
    eos_id: LLaDA's way: rows are filled with this token (EOS) to the longest of the global batch,
        and the filling is part of the response, to be predicted and attended to. None: padding is
        neither.
    multiple: lengths are rounded up to it, so that fewer shapes occur.
    max_len: never pad beyond this.
    """

    pad_id: int
    eos_id: int | None = None
    multiple: int = 1
    max_len: int | None = None

    def length(self, longest: int) -> int:
        """What rows up to so long are padded to."""
        length = -(-longest // self.multiple) * self.multiple
        return length if self.max_len is None else min(length, max(self.max_len, longest))


class GlobalBatches:
    """The batches of a run: each epoch a new order, cut into global batches.

    A row's place in a global batch is (micro-batch · ranks + rank) · batch_size + index, and its
    noise depends on (seed, step, place) alone: whichever rank and micro-batch a row falls to, it is
    masked alike. The rows of an epoch that fill no whole global batch are left out of it. Rows of
    one example (``Facts.together``) have places next to each other, in their order.

    Args:
        rows: the data.
        split: of a global batch over micro-batches and ranks.
        padding: of rows.
        seed: of the order and of the noise.
        shuffle: a new order in each epoch; else the data's own.
        layout: which rows of a global batch make up a micro-batch. ``"padded"``: by place.
            ``"grouped"``: rows of like length, so that little is padded. ``"packed"``: as many
            tokens for each as can be, for rows that are then packed. None changes any row's noise.

    Raises:
        UserError: if the rows do not fill one global batch.
    """

    def __init__(
        self,
        rows: Rows,
        split: Split,
        padding: Padding,
        *,
        seed: int,
        shuffle: bool = True,
        layout: Literal["padded", "grouped", "packed"] = "padded",
    ) -> None:
        self.size = split.size
        self.steps_per_epoch = len(rows) // self.size
        if not self.steps_per_epoch:
            raise UserError(
                f"batch_size: {len(rows)} rows do not fill one global batch of {self.size} = "
                f"{split.batch_size} per rank × {split.ranks} ranks × {split.accumulation} "
                "accumulation steps"
            )
        self.rows, self.split, self.padding = rows, split, padding
        self.seed, self.shuffle, self.layout = seed, shuffle, layout
        self._order: tuple[int, Tensor] | None = None

    def of(self, rows: Rows) -> "GlobalBatches":
        """The same for other rows: to ``collate`` them."""
        other = copy.copy(self)
        other.rows, other._order = rows, None
        return other

    def row_indices(self, step: int) -> Tensor:
        """Rows of the global batch of ``step`` (0, 1, … over all epochs) by place, as numbered in
        the data set that was read. [size], long."""
        return self.rows.numbers_of(self.indices(step))

    def indices(self, step: int) -> Tensor:
        """Rows of the global batch of ``step`` by place. [size], long."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            each = self.rows.facts.together
            examples = torch.arange(len(self.rows) // each)
            if self.shuffle:
                generator = keyed_generator(self.seed, "order", epoch)
                examples = torch.randperm(len(examples), generator=generator)
            rows = examples[:, None] * each + torch.arange(each)
            self._order = epoch, rows.flatten()
        return self._order[1][within * self.size : (within + 1) * self.size]

    def blocks_of(self, indices: Tensor, size: int) -> Tensor:
        """How many blocks of ``size`` tokens with something to predict the rows of a global batch
        have. indices [n] → [n], long."""
        longest = int(self.rows.lengths_of(indices).max())
        length = longest if self.padding.eos_id is None else self.padding.length(longest)
        _, eligible, real = self.rows.padded(indices, length, self.padding.pad_id)
        if self.padding.eos_id is not None:
            eligible |= ~real
        whole = torch.nn.functional.pad(eligible, (0, -length % size))
        return whole.unflatten(1, (-1, size)).any(2).sum(1)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of ``step``, in the order of accumulation."""
        indices = self.indices(step)
        longest = int(self.rows.lengths_of(indices).max())
        return [
            self.collate(indices[places], places, ("mask", step), longest)
            for places in self.places(step)
        ]

    def places(self, step: int) -> list[Tensor]:
        """The places of the rows of this rank's micro-batches of ``step``. [R] each."""
        lengths = self.rows.lengths_of(self.indices(step))
        return list(self._places(lengths)[:, self.split.rank])

    def _places(self, lengths: Tensor) -> Tensor:
        """The places of a global batch, as micro-batches. [accumulation, ranks, batch_size]."""
        rows, ranks, _, accumulation = self.split
        slots, shape = accumulation * ranks, (accumulation, ranks, rows)
        if self.layout == "padded":
            return torch.arange(self.size).view(shape)
        order = lengths.argsort(stable=True, descending=True)
        if self.layout == "grouped":  # the ranks' shares of a micro-batch are alike too
            return order.view(accumulation, rows, ranks).transpose(1, 2)
        dealt = order.view(rows, slots)
        dealt[1::2] = dealt[1::2].flip(1)  # to and fro
        return dealt.t().reshape(shape)

    def collate(
        self, indices: Tensor, places: Tensor, key: tuple[int | str, ...], longest: int
    ) -> Batch:
        """Some rows as a batch; the noise of each depends on (seed, *key, its place).

        indices [R], places [R]. longest: the longest row of all that make up one gradient; EOS
        padding goes as far.
        """
        pad, eos = self.padding.pad_id, self.padding.eos_id
        if eos is None:
            longest = int(self.rows.lengths_of(indices).max())
        length = self.padding.length(longest)
        tokens, eligible, real = self.rows.padded(indices, length, pad if eos is None else eos)
        u = keyed_uniform(self.seed, *key, places=places, length=length)
        if eos is not None:
            return Batch(tokens, eligible | ~real, None, u, places)
        return Batch(tokens, eligible, real[:, None], u, places)
