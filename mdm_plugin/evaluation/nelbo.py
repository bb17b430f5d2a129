"""The negative evidence lower bound: an upper bound on −log p(response | prompt)."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdm_plugin.data.rows import Rows
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import ranks as ranks_of
from mdm_plugin.noise import keyed_generator, keyed_uniform

_Z = 1.959964  # of a 95 % interval
# Of the control variate: how alike masks must be in their share of positions to tell of each other,
# and the weight of a token that is as hard as all others. Any values are unbiased.
_WIDTH, _PRIOR = 0.3, 0.2


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


@torch.no_grad()
def bounds(
    model: nn.Module,
    rows: Rows,
    indices: Tensor,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    draws: int = 8,
    seed: int = 0,
    shift: bool = False,
    chunk_size: int = 1024,
    rank: int = 0,
    ranks: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Bound:
    """Estimates of the bound of some rows, from ``draws`` masks of each.

    A row's bound is Σ_l E_S[f(S)], f(S) = (1/l)·Σ_{i∈S} CE_i, over the counts l = 1..N and the sets
    S of l positions (LLaDA's Eq. 6, no eps). The counts are spread evenly (``even_counts``), and
    what is easy to foresee of f(S) is taken out (``controlled``). All masks are functions of (seed,
    row, draw): the same rows give the same numbers with any batch size and number of ranks.

    Args:
        model: an ``MDMTransformer``, in eval mode; under FSDP2, called alike on every rank.
        rows: the data.
        indices: [R], which of them.
        mask_id, pad_id: token ids. Padding is neither predicted nor attended to.
        batch_size: sequences per forward.
        device: of the model.
        draws: forwards per row.
        seed: of the draws.
        shift, chunk_size: as in ``MDMLoss``.
        rank, ranks: which share to compute; shares are summed over the ranks.
        group: of the ranks; None for all processes.

    Raises:
        ValueError: if ``draws`` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: use 1 or more")
    loss = MDMLoss("response", "ones", shift, chunk_size)
    found = torch.zeros(2, len(indices), dtype=torch.float64)
    size = max(1, min(batch_size // draws, -(-len(indices) // ranks)))
    # Under FSDP2 every rank must run as many forwards: short shares repeat row 0, unused.
    for step in range(-(-len(indices) // (size * ranks))):
        start = (step * ranks + rank) * size
        own = torch.arange(len(indices))[start : start + size]
        row = indices[own]
        if ranks > 1:
            row = torch.cat((row, indices[:1].expand(size - len(own))))
        tokens, eligible, real = rows.padded(row, int(rows.lengths[row].max()), pad_id)
        n = eligible.sum(1)
        offset = torch.cat(
            [
                torch.rand(1, generator=keyed_generator(seed, "nelbo count", draws, i))
                for i in row.tolist()
            ]
        )
        count = torch.stack(
            [even_counts(int(k), draws, float(o)) for k, o in zip(n, offset, strict=True)]
        )
        length = tokens.shape[1]
        places = (row[:, None] * draws + torch.arange(draws)).flatten()
        u = keyed_uniform(seed, "nelbo mask", draws, places=places, length=length)
        jobs = torch.arange(len(row)).repeat_interleave(draws)
        mask = (ranks_of(u, eligible[jobs]) < count.flatten()[:, None]) & eligible[jobs]
        ce = torch.zeros(len(jobs), length, dtype=torch.float64)
        for part in torch.arange(len(jobs)).split(batch_size):
            here = tokens[jobs[part]]
            one = torch.ones(len(part), dtype=torch.float64)
            targets = loss.targets(here, mask[part][None], one[None], one, n[jobs[part]])
            targets = targets.to(device)
            _, values = model(
                torch.where(mask[part], mask_id, here).to(device),
                mask=real[jobs[part], None].to(device),
                positions=targets.positions,
                head=partial(loss, targets=targets),
            )
            block = ce[part]
            block[mask[part]] = values.double().cpu()
            ce[part] = block
        for j in range(len(own)):
            at = slice(j * draws, (j + 1) * draws)
            found[:, start + j] = torch.stack(
                controlled(ce[at][:, eligible[j]], mask[at][:, eligible[j]], count[j])
            )
    if ranks > 1:
        found = found.to(device)
        dist.all_reduce(found, group=group)
    return Bound(*found.cpu())


def even_counts(n: int, draws: int, offset: float) -> Tensor:
    """How many of ``n`` positions each draw masks: as even as can be over 1..n, ascending. [draws].

    With no more draws than n, a systematic sample that begins at ``offset`` in [0, 1): each count
    has the probability draws / n. With more, every count is there, the lightest, whose losses vary
    most, once more than the others.
    """
    if draws < n:
        return ((offset + torch.arange(draws, dtype=torch.float64)) * n / draws).long() + 1
    times = torch.full((n,), draws // n)
    times[: draws % n] += 1
    return torch.arange(1, n + 1).repeat_interleave(times)


def controlled(ce: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The bound of a row from K masks, and the variance of that; scalars, fp64.

    Most of how f(S) varies is which tokens S holds: some are hard under every mask. So each mask
    S_k has a control variate: what the *other* masks say of every token, h_i, a mean of CE_i over
    those of about as many positions. z_k = (1/N)·Σ_i h_i + (1/l)·Σ_{i∈S_k} (CE_i − h_i) has the
    mean of f(S_k), because h does not depend on S_k and each position is in S_k with probability
    l/N.

    The variance is estimated from the differences of masks of neighbouring counts, which overstates
    it by what the counts' means differ.

    Args:
        ce: [K, N], CE_i under mask k, 0 where not masked.
        mask: [K, N], bool, S_k.
        count: [K], l of each, as of ``even_counts``.
    """
    draws, n = mask.shape
    times = torch.bincount(count, minlength=n + 1)[count] if draws >= n else draws / n
    weight = 1 / (times * torch.ones(draws, dtype=torch.float64))
    if draws == 1:
        return (weight * ce.sum(1) / count).sum(), torch.tensor(math.nan, dtype=torch.float64)
    member, share = mask.double(), count.double() / n
    near = torch.exp(-(((share[:, None] - share) / _WIDTH) ** 2) / 2).fill_diagonal_(0)
    total, seen = near @ ce, near @ member
    typical = total.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    foreseen = (total + _PRIOR * typical) / (seen + _PRIOR)
    z = foreseen.mean(1) + (ce - foreseen * member).sum(1) / count
    squares = (weight[1:] * weight[:-1] * z.diff().square()).sum() / 2
    return (weight * z).sum(), squares * draws / (draws - 1)


def summary(bound: Bound, tokens: Tensor) -> NELBO:
    """The bound of all rows from that of each, and their numbers of response tokens [R]."""
    rows, total = len(tokens), int(tokens.sum())
    nats = float(bound.nats.sum()) / total
    # Of a ratio of sums, by its linearisation.
    residual = bound.nats - nats * tokens
    spread = (rows / max(1, rows - 1) * residual.square().sum()).sqrt() / total
    return NELBO(nats, float(bound.variance.sum().sqrt()) / total, float(spread), rows, total)


@torch.no_grad()
def nelbo(
    model: nn.Module,
    rows: Rows,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    draws: int = 8,
    seed: int = 0,
    shift: bool = False,
    chunk_size: int = 1024,
    rank: int = 0,
    ranks: int = 1,
    group: dist.ProcessGroup | None = None,
) -> NELBO:
    """The bound of all rows; arguments and errors as of ``bounds``."""
    was_training = model.training
    model.eval()
    values = bounds(
        model,
        rows,
        torch.arange(len(rows)),
        mask_id=mask_id,
        pad_id=pad_id,
        batch_size=batch_size,
        device=device,
        draws=draws,
        seed=seed,
        shift=shift,
        chunk_size=chunk_size,
        rank=rank,
        ranks=ranks,
        group=group,
    )
    model.train(was_training)
    return summary(values, response_tokens(rows))


def response_tokens(rows: Rows) -> Tensor:
    """[R], how many tokens of each row are eligible."""
    return torch.tensor([int(rows[i].eligible.sum()) for i in range(len(rows))])
