"""The likelihood bound of a model that writes block by block: the sum of its blocks' bounds.

−log p(response | prompt) = −Σ_b log p(block b | the clean tokens before it), and each term has the
bound of a row (``nelbo``), over the block's positions. All blocks of a row are masked in the same
forward, each by a count and a set of its own, and a row's K draws share one clean copy. A block of
so few tokens that K draws are all of its masks has each of them once, and no error: so blocks of
one token have the likelihood itself.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdm_plugin.evaluation.counts import controlled, even_counts
from mdm_plugin.masking import random_order
from mdm_plugin.models.blocks import BlockAttention
from mdm_plugin.noise import keyed_generator, keyed_uniform


class BlockDraws(NamedTuple):
    """The masks of R rows of L tokens in blocks of S, K of each.

    tokens, real: [R, L], filled up to whole blocks; what is no filling. mask: [K, R, L], bool.
    row, block: [P], of each block with something to predict; eligible: [P, S], what that is.
    counts: [P, K], positions of it that each draw masks.
    """

    tokens: Tensor
    real: Tensor
    mask: Tensor
    row: Tensor
    block: Tensor
    eligible: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        """S."""
        return self.eligible.shape[1]

    def attention(self) -> BlockAttention:
        """The layout of the rows, with K views."""
        views, _, length = self.mask.shape
        first = int(self.block.min()) * self.size
        return BlockAttention(self.size, length, first, views, self.real)

    def cut(self, x: Tensor) -> Tensor:
        """What the blocks have of x [..., R, L]: [..., P, S]."""
        return x.unflatten(-1, (-1, self.size))[..., self.row, self.block, :]


def most_draws(draws: int, size: int) -> int:
    """How many masks of a block of ``size`` tokens may differ, ``draws`` at most."""
    return min(draws, 2**size - 1)


def every_mask(own: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """All masks of the tokens ``own`` [S], bool, and once more the first of them, to ``draws``.

    [draws, S], bool, and how many tokens each masks, [draws].
    """
    n = int(own.sum())
    number = torch.arange(draws) % (2**n - 1) + 1
    masks = torch.zeros(draws, len(own), dtype=torch.bool)
    masks[:, own] = (number[:, None] >> torch.arange(n)) % 2 > 0
    return masks, masks.sum(1)


def draw_blocks(
    rows: tuple[Tensor, Tensor, Tensor], places: Tensor, size: int, draws: int, seed: int
) -> BlockDraws:
    """The masks of some rows; functions of (seed, place, block, draw), whatever rows are with them.

    rows: tokens, eligible and what is no filling, [R, L] each. places: [R]. size: S.
    """
    fill = -rows[0].shape[1] % size
    tokens, eligible, real = (F.pad(x, (0, fill)) for x in rows)
    length = tokens.shape[1]
    row, block = eligible.unflatten(1, (-1, size)).any(2).nonzero(as_tuple=True)
    own = eligible.unflatten(1, (-1, size))[row, block]
    n = own.sum(1)
    draws = most_draws(draws, size)
    offsets = [
        float(torch.rand(1, generator=keyed_generator(seed, "nelbo count", draws, place, b)))
        for place, b in zip(places[row].tolist(), block.tolist(), strict=True)
    ]
    counts = torch.stack(
        [even_counts(k, draws, o) for k, o in zip(n.tolist(), offsets, strict=True)]
    )
    at = (places[:, None] * draws + torch.arange(draws)).flatten()
    u = keyed_uniform(seed, "nelbo mask", draws, places=at, length=length)
    u = u.unflatten(0, (len(places), draws)).unflatten(2, (-1, size))[row, :, block]
    among = own[:, None].expand(-1, draws, -1)
    order = random_order(u.flatten(0, 1), among.flatten(0, 1)).view_as(u)
    chosen = (order < counts[:, :, None]) & among
    for i, k in enumerate(n.tolist()):
        if most_draws(draws, k) == 2**k - 1:
            chosen[i], counts[i] = every_mask(own[i], draws)
    mask = torch.zeros(draws, len(tokens), length // size, size, dtype=torch.bool)
    mask[:, row, block] = chosen.transpose(0, 1)
    return BlockDraws(tokens, real, mask.flatten(2), row, block, own, counts)


def block_bounds(
    drawn: BlockDraws, cross_entropies: Callable[[BlockDraws], Tensor]
) -> tuple[Tensor, Tensor]:
    """The bound of each row and its variance. [R], [R], fp64.

    cross_entropies: gives CE of each masked token, else 0, [K, R, L], fp64.
    """
    ce, mask = drawn.cut(cross_entropies(drawn)), drawn.cut(drawn.mask)
    found = torch.zeros(2, len(drawn.tokens), dtype=torch.float64)
    for i, row in enumerate(drawn.row.tolist()):
        own, count = drawn.eligible[i], drawn.counts[i]
        n = int(own.sum())
        if (every := 2**n - 1) <= len(ce):
            # Of the sets of l tokens each is one of (n over l).
            weights = [1 / (k * math.comb(n, k)) for k in count[:every].tolist()]
            found[0, row] += torch.tensor(weights, dtype=torch.float64) @ ce[:every, i].sum(1)
            continue
        found[:, row] += torch.stack(controlled(ce[:, i, own], mask[:, i, own], count))
    return found[0], found[1]
