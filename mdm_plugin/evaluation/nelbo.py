"""The negative evidence lower bound: an upper bound on −log p(response | prompt)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdm_plugin.data.rows import Rows
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation.block_bounds import (
    BlockDraws,
    block_bounds,
    draw_blocks,
    most_draws,
)
from mdm_plugin.evaluation.counts import controlled, even_counts
from mdm_plugin.generation import SpecialTokens
from mdm_plugin.loss import MDMLoss, Targets
from mdm_plugin.masking import random_order
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator, keyed_uniform

_Z = 1.959964  # of a 95 % interval


class NELBO(NamedTuple):
    """The bound per response token, over all rows, in nats.

    nats: its estimate.
    error: standard error of that, of the masks drawn for these rows; NaN for 1 draw.
    spread: standard error of it as a mean over all rows that these are a sample of.
    rows, tokens: how many rows, and tokens in their responses.
    """

    nats: float
    error: float
    spread: float
    rows: int
    tokens: int

    def interval(self) -> tuple[float, float]:
        """95 % interval of the bound of these rows."""
        return self.nats - _Z * self.error, self.nats + _Z * self.error

    def report(self) -> dict[str, float]:
        """Nats and bits per token and the bound on perplexity, with 95 % intervals."""
        low, high = self.interval()
        return {
            "nats_per_token": self.nats,
            "nats_per_token_low": low,
            "nats_per_token_high": high,
            "nats_per_token_standard_error_over_rows": self.spread,
            "bits_per_token": self.nats / math.log(2),
            "bits_per_token_low": low / math.log(2),
            "bits_per_token_high": high / math.log(2),
            "perplexity_bound": math.exp(self.nats),
            "perplexity_bound_low": math.exp(low),
            "perplexity_bound_high": math.exp(high),
            "rows": self.rows,
            "tokens": self.tokens,
        }


class Bound(NamedTuple):
    """Estimates of the bound of R rows, over their responses. nats: [R], variance: [R], fp64.

    variance: of the masks drawn, in nats²; NaN for a single draw.
    """

    nats: Tensor
    variance: Tensor


class _Draws(NamedTuple):
    """The masks of R rows, K of each, over the N tokens of the longest response.

    tokens, eligible, real: [R, L], the rows, filled up, and what of them is no filling.
    counts: [R, K], positions that each draw masks.
    masks: [U, N], bool, those that differ. row: [U], whose each is. number: [R, K], each draw's.
    """

    tokens: Tensor
    eligible: Tensor
    real: Tensor
    counts: Tensor
    masks: Tensor
    row: Tensor
    number: Tensor


@dataclass(frozen=True)
class BoundEstimator:
    """Estimates the bound of rows, from some masks of each.

    A row's bound is Σ_l E_S[f(S)], f(S) = (1/l)·Σ_{i∈S} CE_i, over the counts l = 1..N and the sets
    S of l positions (LLaDA's Eq. 6, no eps). The counts are spread evenly (``even_counts``), and
    what is easy to foresee of f(S) is taken out (``controlled``). All masks are functions of (seed,
    place, draw): the same rows give the same numbers with any batch size and number of ranks.

    Args:
        special: the tokenizer, or its special tokens. Padding is neither predicted nor attended to.
        world: whose ranks share the rows, and whose device the model is on.
        batch_size: sequences per forward.
        draws: masks of each row, and so its forwards.
        seed: of the draws.
        chunk_size: as in ``MDMLoss``.

    Raises:
        ValueError: if ``draws`` is below 1.
    """

    special: SpecialTokens
    world: World
    batch_size: int
    draws: int = 8
    seed: int = 0
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: use 1 or more")

    @torch.no_grad()
    def bounds(
        self, model: nn.Module, rows: Rows, indices: Tensor, places: Tensor | None = None
    ) -> Bound:
        """The bounds of the rows at ``indices`` [R].

        model: in eval mode; under FSDP2, called alike on every rank.
        places: [R], ≥ 0, below 2^40, of each row's noise; None for ``indices``. Rows of one place
            share it: number j of a draw is that of the j-th response token, and the shares of
            tokens masked are the same. Each bound is as good as by noise of its own, and the
            difference of two that have tokens in common is better.
        """
        places = indices if places is None else places
        ranks, rank = self.world.size, self.world.rank
        blocks = model.block_length if isinstance(model, MDMTransformer) else None
        found = torch.zeros(2, len(indices), dtype=torch.float64)
        most = self._masks(rows, indices, blocks)
        size = max(1, min(self.batch_size // most, -(-len(indices) // ranks)))
        for step in range(-(-len(indices) // (size * ranks))):
            start = (step * ranks + rank) * size
            own = torch.arange(len(indices))[start : start + size]
            count = len(own)
            if ranks > 1:  # short shares repeat the first row, unused
                own = torch.cat((own, torch.zeros(size - count, dtype=torch.long)))
            if blocks:
                padded = rows.padded(
                    indices[own], int(rows.lengths_of(indices[own]).max()), self.special.pad_id
                )
                each = draw_blocks(padded, places[own], blocks, self.draws, self.seed)
                values = block_bounds(each, partial(self._forward_blocks, model))
                found[:, start : start + count] = torch.stack(values)[:, :count]
                continue
            drawn = self._draw(rows, indices[own], places[own])
            ce = self._forward(model, drawn)
            for j, n in enumerate(drawn.eligible.sum(1).tolist()[:count]):
                masks = drawn.number[j]
                found[:, start + j] = torch.stack(
                    controlled(ce[masks, :n], drawn.masks[masks, :n], drawn.counts[j])
                )
        nats, variance = self.world.sum(found).cpu()
        return Bound(nats, variance)

    def _masks(self, rows: Rows, indices: Tensor, blocks: int | None) -> int:
        """How many masks of a row may differ: few of a response of a few tokens, or of blocks."""
        if blocks:
            return most_draws(self.draws, blocks)
        # Under FSDP2, ranks that share rows run as many forwards as each other: one for each draw.
        if self.world.size > 1 or not len(indices):
            return self.draws
        return min(self.draws, 2 ** max(1, int(rows.eligible_of(indices).max())) - 1)

    def _draw(self, rows: Rows, row: Tensor, places: Tensor) -> _Draws:
        """The masks of some rows."""
        draws, seed = self.draws, self.seed
        length = int(rows.lengths_of(row).max())
        tokens, eligible, real = rows.padded(row, length, self.special.pad_id)
        offsets = [
            torch.rand(1, generator=keyed_generator(seed, "nelbo count", draws, i))
            for i in places.tolist()
        ]
        n = eligible.sum(1)
        counts = torch.stack(
            [even_counts(int(k), draws, float(o)) for k, o in zip(n, offsets, strict=True)]
        )
        places = (places[:, None] * draws + torch.arange(draws)).flatten()
        u = keyed_uniform(seed, "nelbo mask", draws, places=places, length=int(n.max()))
        own = (torch.arange(u.shape[1]) < n[:, None]).repeat_interleave(draws, 0)
        masks = (random_order(u, own) < counts.flatten()[:, None]) & own
        of = torch.arange(len(row)).repeat_interleave(draws)
        number = torch.arange(len(of))
        if self.world.size == 1:
            each = torch.cat((of[:, None], masks), 1)
            each, number = torch.unique(each, dim=0, return_inverse=True)
            of, masks = each[:, 0], each[:, 1:].bool()
        return _Draws(tokens, eligible, real, counts, masks, of, number.view(-1, draws))

    def _forward(self, model: nn.Module, drawn: _Draws) -> Tensor:
        """CE of each masked token of a response, else 0. [U, N], fp64."""
        loss = MDMLoss("response", self.chunk_size)
        device = self.world.device
        ce = torch.zeros(drawn.masks.shape, dtype=torch.float64)
        for part in torch.arange(len(ce)).split(self.batch_size):
            row, masks = drawn.row[part], drawn.masks[part]
            tokens, eligible = drawn.tokens[row], drawn.eligible[row]
            n = eligible.sum(1)
            mask = torch.zeros_like(eligible)
            mask[eligible] = masks[torch.arange(masks.shape[1]) < n[:, None]]
            one = torch.ones(len(part), dtype=torch.float64)
            targets = loss.targets(tokens, mask[None], one[None], one, n).to(device)
            _, values = model(
                torch.where(mask, self.special.mask_id, tokens).to(device),
                mask=drawn.real[row, None].to(device),
                positions=targets.positions,
                head=partial(loss, targets=targets),
            )
            block = torch.zeros(masks.shape, dtype=torch.float64)
            block[masks] = values.double().cpu()
            ce[part] = block
        return ce

    def _forward_blocks(self, model: nn.Module, drawn: BlockDraws) -> Tensor:
        """CE of each masked token, else 0, of rows in blocks. [K, R, L], fp64."""
        parts = drawn.mask.split(self.batch_size)
        if len(parts) > 1:  # no more sequences in a forward than it is to have
            each = [self._forward_blocks(model, drawn._replace(mask=part)) for part in parts]
            return torch.cat(each)
        loss, device, mask = MDMLoss("response", self.chunk_size), self.world.device, drawn.mask
        attend = drawn.attention()
        view, row, column = mask.nonzero(as_tuple=True)
        targets = Targets(
            attend.positions(view, row, column),
            drawn.tokens[row, column],
            row,
            torch.ones(len(row)),
        ).to(device)
        noisy = torch.where(mask, self.special.mask_id, drawn.tokens)
        _, values = model(
            attend.lay_out(noisy, drawn.tokens).to(device),
            mask=attend.to(device),
            input_pos=attend.columns().expand(len(noisy[0]), -1).to(device),
            positions=targets.positions,
            head=partial(loss, targets=targets),
        )
        ce = torch.zeros(mask.shape, dtype=torch.float64)
        ce[mask] = values.double().cpu()
        return ce

    def nelbo(self, model: nn.Module, rows: Rows) -> NELBO:
        """The bound of all rows together; the model is in eval mode meanwhile."""
        was_training = model.training
        model.eval()
        every = torch.arange(len(rows))
        values = self.bounds(model, rows, every)
        model.train(was_training)
        return summary(values, rows.eligible_of(every))


def summary(bound: Bound, tokens: Tensor) -> NELBO:
    """The bound of all rows from that of each, and their numbers of response tokens [R]."""
    rows, total = len(tokens), int(tokens.sum())
    nats = float(bound.nats.sum()) / total
    # Of a ratio of sums, by its linearisation.
    residual = bound.nats - nats * tokens
    spread = (rows / max(1, rows - 1) * residual.square().sum()).sqrt() / total
    return NELBO(nats, float(bound.variance.sum().sqrt()) / total, float(spread), rows, total)
