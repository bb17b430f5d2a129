"""Block diffusion: rows as [masked views | clean copy], and who attends to whom in them.

A row is cut into blocks of S tokens from its beginning. A masked view's token sees its own block of
that view, and the clean tokens of all earlier blocks; a clean token sees clean tokens up to its own
block (BD3-LM, arXiv 2503.09573). No clean token sees a masked one, so that V views share one clean
copy: (V + 1)·L tokens, where a copy for each are 2·V·L.

What nobody looks at is left out: of the views, the blocks before the first one that is predicted;
of the clean copy, the last block. With one block, nothing is left of the copy, and the row is that
of a model without blocks.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

# Queries of one call of attention on the CPU: so many that a call is worth it, and so few that the
# keys which none of them sees are few.
QUERIES = 128


class BlockAttention:
    """The layout of R rows of L tokens in blocks, V views of each, and their attention.

    A row's W = V·(L − first) + (L − S) tokens are those of its views, from ``first`` on, and then
    the clean ones, without the last block.

    Args:
        block: S, tokens of a block.
        length: L, a multiple of S.
        first: columns of a row that come before its views begin, a multiple of S.
        views: V.
        real: [R, L], bool, what is no padding; None for all.

    Raises:
        ValueError: if a length is no multiple of S.
    """

    def __init__(
        self, block: int, length: int, first: int = 0, views: int = 1, real: Tensor | None = None
    ) -> None:
        if length % block or first % block or not 0 <= first < length:
            raise ValueError(f"length {length} and first {first} are to be multiples of {block}")
        self.block, self.length, self.first, self.views, self.real = (
            block,
            length,
            first,
            views,
            real,
        )
        self.noisy, self.clean = length - first, length - block
        self.width = views * self.noisy + self.clean
        self.block_mask: Any = None
        self._calls: dict[tuple[int, bool], tuple[slice, slice, Tensor | None]] = {}

    def lay_out(self, views: Tensor, clean: Tensor) -> Tensor:
        """[R, W] of views [V, R, L] and clean tokens [R, L], of tokens or of anything else."""
        shown = views[:, :, self.first :].transpose(0, 1).flatten(1)
        return torch.cat((shown, clean[:, : self.clean]), 1)

    def columns(self) -> Tensor:
        """The column in the row, 0..L − 1, of each of its W tokens. [W], long."""
        shown = torch.arange(self.first, self.length).repeat(self.views)
        return torch.cat((shown, torch.arange(self.clean)))

    def positions(self, view: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Where a view's token of a row is in the flattened [R · W]. [M] each."""
        return row * self.width + view * self.noisy + column - self.first

    def column_of(self, positions: Tensor) -> Tensor:
        """The column of a view's token in the flattened [R · W]. [M] → [M]."""
        return positions % self.width % self.noisy + self.first

    def before(self, positions: Tensor) -> Tensor:
        """The token that a shifted model predicts a view's token from: the one before it.

        Of its own view within a block. A block's first token is predicted from the clean copy, as
        it is when text is written: so blocks of one token are an autoregressive model. [M] → [M].
        """
        column = self.column_of(positions)
        row = positions // self.width
        clean = row * self.width + self.views * self.noisy + column - 1
        one_before = torch.where(column % self.block == 0, clean, positions - 1)
        return torch.where(column == 0, positions, one_before)

    def allowed(self) -> Tensor:
        """Who attends to whom, [R, W, W] or [1, W, W], bool: the definition."""
        column, block, view = self.columns(), self.block_of(), self.view()
        allowed = _sees(view[:, None], block[:, None], view, block)[None]
        return allowed if self.real is None else allowed & self.real[:, None, column]

    def to(self, device: torch.device) -> "BlockAttention":
        """For a model on ``device``: on CUDA with flex attention's ``BlockMask``."""
        if device.type == "cuda" and self.block_mask is None:
            self.block_mask = self.flex(device)
        return self

    def flex(self, device: torch.device) -> Any:
        """``allowed`` as flex attention's ``BlockMask``, computed without [W, W]."""
        real = None if self.real is None else self.real[:, self.columns()]
        return _flex(torch.zeros_like(self.columns()), self.view(), self.block_of(), real, device)

    def view(self) -> Tensor:
        """The view of each of a row's W tokens; −1 for the clean ones. [W], long."""
        sizes = torch.tensor([self.noisy] * self.views + [self.clean])
        return torch.tensor([*range(self.views), -1]).repeat_interleave(sizes)

    def block_of(self) -> Tensor:
        """The block of each of a row's W tokens. [W], long."""
        return self.columns() // self.block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attention of q, k and v [R, heads, W, d], by calls over some blocks each."""
        sizes = [self.noisy] * self.views + [self.clean]
        *noisy_q, clean_q = q.split(sizes, 2)
        *noisy_k, clean_k = k.split(sizes, 2)
        *noisy_v, clean_v = v.split(sizes, 2)
        found = []
        for own_q, own_k, own_v in zip(noisy_q, noisy_k, noisy_v, strict=True):
            for start in self._starts(clean=False):
                own, before, mask = self._call(start, clean=False)
                keys = torch.cat((own_k[:, :, own], clean_k[:, :, before]), 2)
                values = torch.cat((own_v[:, :, own], clean_v[:, :, before]), 2)
                found.append(_attend(own_q[:, :, own], keys, values, mask, dropout))
        for start in self._starts(clean=True):
            own, before, mask = self._call(start, clean=True)
            keys, values = clean_k[:, :, : own.stop], clean_v[:, :, : own.stop]
            found.append(_attend(clean_q[:, :, own], keys, values, mask, dropout))
        return torch.cat(found, 2)

    def with_masks(self, change: Callable[[Tensor], Tensor]) -> "BlockAttention":
        """The same with its masks as ``change`` gives them, e.g. as fake tensors."""
        other = copy.copy(self)
        calls = [(start, clean) for clean in (False, True) for start in self._starts(clean)]
        found = {key: self._call(*key) for key in calls}
        other._calls = {
            key: (own, before, None if mask is None else change(mask))
            for key, (own, before, mask) in found.items()
        }
        return other

    def _starts(self, clean: bool) -> range:
        """The first queries of the calls."""
        return range(0, self.clean if clean else self.noisy, self._step())

    def _step(self) -> int:
        return self.block * max(1, QUERIES // self.block)

    def _call(self, start: int, clean: bool) -> tuple[slice, slice, Tensor | None]:
        """The queries of a call, the clean keys of earlier blocks for it, and its mask."""
        if (start, clean) not in self._calls:
            offset, end = (0, self.clean) if clean else (self.first, self.noisy)
            own = slice(start, min(start + self._step(), end))
            first, last = own.start + offset, own.stop + offset  # as columns
            before = slice(0, 0 if clean else last - self.block)
            query = torch.arange(first, last)
            keys = torch.arange(last) if clean else torch.cat((query, torch.arange(before.stop)))
            view = torch.full_like(keys, -1)
            if not clean:  # any view's number does: no other view's keys are here
                view[: len(query)] = 0
            mask = _sees(view[:1], query[:, None] // self.block, view, keys // self.block)
            if self.real is not None:
                mask = mask & self.real[:, None, None, keys]
            self._calls[start, clean] = own, before, None if mask.all() else mask
        return self._calls[start, clean]


def _sees(view: Tensor, block: Tensor, other_view: Tensor, other_block: Tensor) -> Tensor:
    """Whether a token of a view and a block attends to another one; −1 is the clean copy."""
    own = (view == other_view) & (block == other_block)
    return own | ((other_view == -1) & (block > other_block))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class PackedBlocks:
    """Rows in blocks one after another in a single sequence: each as its ``BlockAttention`` has it.

    Args:
        rows: of each row, for one row each. Their widths add up to T.
    """

    def __init__(self, rows: list[BlockAttention]) -> None:
        self.rows = rows
        self.widths = [x.width for x in rows]
        self.block_mask: Any = None
        starts = torch.tensor([0, *self.widths[:-1]]).cumsum(0)
        self._before = torch.cat(
            [x.before(torch.arange(x.width)) + s for x, s in zip(rows, starts, strict=True)]
        )

    def before(self, positions: Tensor) -> Tensor:
        """As ``BlockAttention.before``, of places in [T]."""
        return self._before.to(positions.device)[positions]

    def columns(self) -> Tensor:
        """The column in its row of each token. [T], long."""
        return torch.cat([x.columns() for x in self.rows])

    def to(self, device: torch.device) -> "PackedBlocks":
        """As ``BlockAttention.to``."""
        if device.type == "cuda" and self.block_mask is None:
            self.block_mask = self.flex(device)
        return self

    def flex(self, device: torch.device) -> Any:
        """As flex attention's ``BlockMask``."""
        row = torch.arange(len(self.rows)).repeat_interleave(torch.tensor(self.widths))
        view = torch.cat([x.view() for x in self.rows])
        block = torch.cat([x.block_of() for x in self.rows])
        real = torch.cat(
            [x.columns() >= 0 if x.real is None else x.real[0, x.columns()] for x in self.rows]
        )
        return _flex(row, view, block, real[None], device)

    def with_masks(self, change: Callable[[Tensor], Tensor]) -> "PackedBlocks":
        """As ``BlockAttention.with_masks``."""
        other = copy.copy(self)
        other.rows = [x.with_masks(change) for x in self.rows]
        return other

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """Attention of q, k and v [1, heads, T, d], a row after another."""
        parts = zip(self.rows, *(x.split(self.widths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([row(*own, dropout) for row, *own in parts], 2)


def _flex(
    row: Tensor, view: Tensor, block: Tensor, real: Tensor | None, device: torch.device
) -> Any:
    """A ``BlockMask`` of T tokens by the row, the view and the block of each, [T]; a clean one's
    view is −1. real: [R, T] or None."""
    row, view, block = (x.to(device) for x in (row, view, block))
    real = None if real is None else real.to(device)

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees = _sees(view[query], block[query], view[key], block[key])
        allowed = (row[query] == row[key]) & sees
        return allowed if real is None else allowed & real[b, key]

    total, rows = len(row), None if real is None else len(real)
    return create_block_mask(
        rule, rows, None, total, total, device=str(device), _compile=device.type == "cuda"
    )
