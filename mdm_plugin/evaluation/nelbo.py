"""The negative evidence lower bound: an upper bound on −log p(response | prompt)."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from mdm_plugin.data.rows import Rows
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount
from mdm_plugin.noise import keyed_generator, keyed_uniform
from mdm_plugin.timesteps import stratified_uniform


class NELBO(NamedTuple):
    """nats: per response token, over all rows. rows: how many. tokens: their responses' tokens."""

    nats: float
    rows: int
    tokens: int


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
    """Σ over rows of E_l [(N/l) · Σ CE over l masked positions], per response token.

    Each row is masked ``draws`` times with a fixed count l (``masking.FixedCount``: LLaDA's
    Eq. 6, no eps) and counts stratified over the row's draws. Every draw is a function of (seed,
    row, draw): the same rows give the same number at every evaluation, with any batch size and
    number of ranks. Padding is neither predicted nor attended to.

    Args:
        model: an ``MDMTransformer``, in eval mode; under FSDP2, called alike on every rank.
        rows: what to evaluate.
        mask_id, pad_id: token ids.
        batch_size: sequences per forward.
        device: of the model.
        draws: forwards per row.
        seed: of the draws.
        shift, chunk_size: as in ``MDMLoss``.
        rank, ranks: which share to compute; sums are reduced over ranks.
    """
    was_training = model.training
    model.eval()
    loss = MDMLoss("response", "inverse_p", shift, chunk_size)
    # Job i is draw i mod `draws` of row i // `draws`. Under FSDP2 every rank must run as many
    # forwards: short shares are filled with job 0, unused.
    jobs = len(rows) * draws
    steps = -(-jobs // (batch_size * ranks))
    sums = torch.zeros(1, dtype=torch.float64)
    for step in range(steps):
        start = (step * ranks + rank) * batch_size
        mine = torch.arange(start, min(start + batch_size, jobs))
        weight = torch.ones(max(len(mine), 1), dtype=torch.float64)
        if not len(mine):
            mine, weight = torch.zeros(1, dtype=torch.long), weight * 0
        row, draw = mine // draws, mine % draws
        tokens, eligible, real = rows.padded(row, int(rows.lengths[row].max()), pad_id)
        u = keyed_uniform(seed, "nelbo mask", places=mine, length=tokens.shape[1])
        counts = [
            stratified_uniform(draws, keyed_generator(seed, "nelbo t", i)) for i in row.tolist()
        ]
        t = torch.stack(counts)[torch.arange(len(mine)), draw]
        mask, inverse_p, _ = FixedCount()(t, u, eligible)
        # MDMLoss divides by N; the NELBO of a row is the sum over its tokens.
        count = eligible.sum(1)
        targets = loss.targets(tokens, mask, inverse_p, weight * count, count).to(device)
        noisy = torch.where(mask[0], mask_id, tokens).to(device)
        total, _ = model(
            noisy,
            mask=real[:, None].to(device),
            head=lambda head, hidden, targets=targets: loss(head, hidden, targets),
        )
        sums += total.double().cpu()
    if ranks > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    model.train(was_training)
    responses = sum(int(rows[i].eligible.sum()) for i in range(len(rows)))
    return NELBO(sums.item() / draws / responses, len(rows), responses)
