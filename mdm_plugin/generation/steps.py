"""A step of writing, whichever way text is written: what is proposed, and what was done."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.samplers import Candidates, low_confidence
from mdm_plugin.noise import keyed_generator


class Generated(NamedTuple):
    """tokens: [B, n], long, on the model's device. forwards: of the batch; a guided one is two."""

    tokens: Tensor
    forwards: int


class Step(NamedTuple):
    """What a step has done to B responses of n tokens.

    response: [B, n], long, as they are now; the mask token where nothing is written.
    put: [B, n], bool, where the sampler has put the token that is there in this step. Those that
        a first EOS has written after it are not put.
    confidence: [B, n], fp32, the model's probability of what was put (guided, where it is, and
        before temperature, top-p and top-k); 0 elsewhere.
    """

    response: Tensor
    put: Tensor
    confidence: Tensor


class Noise(NamedTuple):
    """Of a step: its numbers are functions of (seed, start, step).

    seeds: of the B rows. start: where its block begins. step: its number in the block.
    """

    seeds: Sequence[int]
    start: int
    step: int


def propose(
    logits: Tensor,
    masked: Tensor,
    first: Tensor,
    step: tuple[int, int],
    decoding: Decoding,
    noise: Noise,
) -> Candidates:
    """Predictions of a block's masked places, from logits [B, n, V].

    masked [B, n], first [B], step: (number, steps), as in ``Candidates``.
    """
    uniform, drawn = _numbers(noise, logits)
    tempered = logits / decoding.temperature if decoding.temperature else logits
    drawn_from = _likeliest(tempered, decoding.top_p, decoding.top_k)
    prediction = _drawn(drawn_from, drawn) if decoding.temperature else drawn_from.argmax(-1)
    p = logits.softmax(-1)
    sampled = p if drawn_from is logits else drawn_from.softmax(-1)
    return Candidates(*step, masked, first, prediction, p, sampled, uniform)


def put_step(
    response: Tensor, columns: slice, chosen: Tensor, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    """``Step.put`` and ``Step.confidence`` of the ``chosen`` [B, m] of some columns of what is
    there now, response [B, n]."""
    put = torch.zeros_like(response, dtype=torch.bool)
    put[:, columns] = chosen & (response[:, columns] == candidates.prediction)
    confidence = torch.zeros_like(response, dtype=torch.float32)
    confidence[:, columns] = torch.where(put[:, columns], low_confidence(candidates), 0)
    return put, confidence


def _likeliest(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Logits with all but the likeliest tokens at −inf; the likeliest one always stays."""
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        kept = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, kept)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _numbers(noise: Noise, logits: Tensor) -> tuple[Tensor, Tensor]:
    """U(0, 1) numbers for the sampler, and to draw tokens by. [B, n] each, fp64; rows' own."""
    shape, found = (2, logits.shape[1]), []
    for seed in noise.seeds:
        generator = keyed_generator(seed, "generate", noise.start, noise.step)
        found.append(torch.rand(shape, generator=generator, dtype=torch.float64))
    first, second = torch.stack(found, 1).to(logits.device)
    return first, second


def _drawn(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens [B, n] of the distributions of ``logits`` [B, n, V]: the u-quantile of each.

    One number for each token, where Gumbel noise takes V of them, drawn on the CPU. The sums are in
    fp64, row by row: in fp32 a tail of 150,000 tokens would be off by its rounding.
    """
    tokens = []
    for row, at in zip(logits, u, strict=True):
        reached = row.double().softmax(-1).cumsum(-1)
        goal = (at[:, None] * reached[:, -1:]).clamp(
            max=reached[:, -1:].nextafter(reached.new_zeros(()))
        )
        tokens.append(torch.searchsorted(reached, goal, right=True).squeeze(-1))
    return torch.stack(tokens)
