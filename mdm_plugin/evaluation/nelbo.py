"""The negative evidence lower bound: an upper bound on −log p(response | prompt)."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdm_plugin.data.rows import Rows
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement
from mdm_plugin.noise import keyed_generator, keyed_uniform
from mdm_plugin.timesteps import stratified_uniform

_Z = 1.959964  # of a 95 % interval


class NELBO(NamedTuple):
    """The bound per response token, over all rows, in nats.

    nats: its estimate.
    error: standard error of that, of the masks drawn for these rows; NaN for 2 draws.
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
) -> Tensor:
    """Estimates of the bound of some rows, one for each pair of masks. [R, draws / 2], nats, fp64.

    A row's bound is Σ over its tokens, E_l [(N/l) · Σ CE over l masked positions] (LLaDA's Eq. 6,
    no eps). The masks are pairs that together mask all (``masking.Complement``), their counts
    stratified over the row's pairs, in order. All are functions of (seed, row, pair): the same
    rows give the same numbers with any batch size and number of ranks.

    Args:
        model: an ``MDMTransformer``, in eval mode; under FSDP2, called alike on every rank.
        rows: the data.
        indices: [R], which of them.
        mask_id, pad_id: token ids. Padding is neither predicted nor attended to.
        batch_size: sequences per forward, rounded down to pairs.
        device: of the model.
        draws: forwards per row, an even number.
        seed: of the draws.
        shift, chunk_size: as in ``MDMLoss``.
        rank, ranks: which share to compute; shares are summed over ranks.

    Raises:
        ValueError: if ``draws`` is odd or below 2.
    """
    if draws < 2 or draws % 2:
        raise ValueError(f"draws is {draws}: use an even number; masks come in pairs")
    loss = MDMLoss("response", "inverse_p", shift, chunk_size)
    masking, pairs, size = Complement(), draws // 2, max(1, batch_size // 2)
    # Job i is pair i mod `pairs` of row i // `pairs`. Under FSDP2 every rank must run as many
    # forwards: short shares are filled with job 0, unused.
    jobs = len(indices) * pairs
    found = torch.zeros(jobs, dtype=torch.float64)
    for step in range(-(-jobs // (size * ranks))):
        start = (step * ranks + rank) * size
        own = torch.arange(start, min(start + size, jobs))
        mine = own if len(own) else torch.zeros(1, dtype=torch.long)
        row, pair = indices[mine // pairs], mine % pairs
        tokens, eligible, real = rows.padded(row, int(rows.lengths[row].max()), pad_id)
        key = row * pairs + pair
        u = keyed_uniform(seed, "nelbo mask", pairs, places=key, length=tokens.shape[1])
        strata = {i: _counts(pairs, seed, i) for i in set(row.tolist())}
        t = torch.stack([strata[i][j] for i, j in zip(row.tolist(), pair.tolist(), strict=True)])
        mask, inverse_p, _ = masking(t, u, eligible)
        count = eligible.sum(1)
        one = torch.ones(len(mine), dtype=torch.float64)
        targets = loss.targets(tokens, mask, inverse_p, one, count).to(device)
        noisy = torch.where(mask, mask_id, tokens).flatten(0, 1).to(device)
        _, ce = model(
            noisy,
            mask=real[:, None].repeat(2, 1, 1).to(device),
            head=lambda head, hidden, targets=targets: loss(head, hidden, targets),
        )
        sums = torch.zeros(2 * len(mine), device=device)
        sums.index_add_(0, targets.rows, ce.float())
        values = (sums.cpu().double().view(2, -1) * inverse_p).mean(0)
        found[own] = values[: len(own)]
    if ranks > 1:
        found = found.to(device)
        dist.all_reduce(found)
    return found.cpu().view(len(indices), pairs)


def _counts(pairs: int, seed: int, row: int) -> Tensor:
    """t of a row's pairs, one in each stratum, in order."""
    return stratified_uniform(pairs, keyed_generator(seed, "nelbo t", pairs, row)).sort().values


def summary(values: Tensor, tokens: Tensor) -> NELBO:
    """The bound of rows from their ``bounds`` [R, K] and numbers of response tokens [R].

    The error of a row's mean over K strata is estimated from the differences of neighbours, the
    last and the first among them (t and 1 − t give the same pairs of counts). That overstates it by
    what the strata's means differ. It is not known for K = 1.
    """
    rows, strata = values.shape
    total = int(tokens.sum())
    each = values.mean(1)
    nats = float(each.sum()) / total
    squares = (values - values.roll(1, dims=1)).square().sum()
    variance = float(squares) / (2 * strata**2) if strata > 1 else math.nan
    # Of a ratio of sums, by its linearisation.
    residual = each - nats * tokens
    spread = (rows / max(1, rows - 1) * residual.square().sum()).sqrt() / total
    return NELBO(nats, variance**0.5 / total, float(spread), rows, total)


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
    )
    model.train(was_training)
    return summary(values, response_tokens(rows))


def response_tokens(rows: Rows) -> Tensor:
    """[R], how many tokens of each row are eligible."""
    return torch.tensor([int(rows[i].eligible.sum()) for i in range(len(rows))])
