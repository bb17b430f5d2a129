"""Writing text with a masked diffusion model: masked positions are filled in step by step.

A step predicts every masked position; a sampler then says which of the predictions stay.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.generation.caches import LayerCaches
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.masked import MaskedRows, SpecialTokens
from mdm_plugin.generation.samplers import Candidates, low_confidence
from mdm_plugin.models import MDMTransformer
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


@torch.no_grad()
def generate(
    model: MDMTransformer,
    prompts: Sequence[Tensor | Sequence[int]],
    decoding: Decoding | None = None,
    *,
    special: SpecialTokens,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generated:
    """The model's responses to prompts of any lengths, each the same as it would be alone.

    Args:
        model: in eval mode.
        prompts: token ids, [N_b] each.
        decoding: None for LLaDA's defaults, low-confidence remasking at temperature 0.
        special: the tokenizer, or ``TokenIds``. With an ``eos_id``, a row ends once all before its
            first EOS is written, and is EOS from there; the text is the same, the forwards are
            fewer.
        max_new_tokens: length of every response.
        seeds: one per prompt, of its noise; None for 0, 1, ….
        on_step: called after each step with what it has done.

    Raises:
        ValueError: on an empty prompt or one with the mask token in it, on rows longer than the
            model takes, or lengths and steps that do not fit each other.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
    ids = [torch.as_tensor(prompt, dtype=torch.long).cpu() for prompt in prompts]
    for i, prompt in enumerate(ids):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty")
        if (prompt == special.mask_id).any():
            raise ValueError(f"prompt {i} holds the mask token: infill fills such rows")
    masks = torch.full((max_new_tokens,), special.mask_id)
    rows = [torch.cat((prompt, masks)) for prompt in ids]
    lengths = torch.tensor([len(prompt) for prompt in ids])
    places = lengths[:, None] + torch.arange(max_new_tokens)
    batch = MaskedRows(model, rows, places, places >= 0, lengths, special)
    return _write(batch, decoding or Decoding(), seeds, on_step)


@torch.no_grad()
def infill(
    model: MDMTransformer,
    rows: Sequence[Tensor],
    decoding: Decoding | None = None,
    *,
    special: SpecialTokens,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """``rows`` of tokens with their mask tokens, wherever they are, filled in.

    Arguments as in ``generate``; blocks, caches and guidance are for text after a prompt.

    Raises:
        ValueError: as ``generate``, on a row without a mask token, and on those options.
    """
    decoding = decoding or Decoding()
    for name, value in (
        ("block_length", decoding.block_length),
        ("cache", decoding.cache),
        ("cfg_scale", decoding.cfg_scale),
        ("eos_last", decoding.eos_last),
    ):
        if value:
            raise ValueError(f"{name}: not for infilling: leave it out")
    batch = MaskedRows.of(model, [row.cpu() for row in rows], special)
    _write(batch, decoding, seeds, None)
    return [batch.tokens[i, : len(row)].to(row.device) for i, row in enumerate(rows)]


def _write(
    rows: MaskedRows,
    decoding: Decoding,
    seeds: Sequence[int] | None,
    on_step: Callable[[Step], None] | None,
) -> Generated:
    """Fill the rows' places, block by block."""
    count, n = rows.places.shape
    size, steps = decoding.steps_per_block(n)
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts")
    if decoding.eos_last and rows.eos_id is None:
        raise ValueError("eos_last: give eos_id")
    late = rows.eos_id if decoding.eos_last and rows.eos_id is not None else -1  # -1: no token
    forwards = 0
    with LayerCaches(rows.model) if decoding.cache else nullcontext() as caches:
        way = _Way(decoding, seeds, caches, late, on_step)
        for start in range(0, n, size):
            block = slice(start, start + size)
            first = rows.masked()[:, block].sum(1)
            index = 0
            while rows.masked()[:, block].any():
                _advance(rows, way, block, first, index, steps)
                forwards += 2 if decoding.cfg_scale else 1
                index += 1
    return Generated(rows.response(), forwards)


class _Way(NamedTuple):
    """What all steps have in common. late: the token to be chosen last; −1: none."""

    decoding: Decoding
    seeds: Sequence[int]
    caches: LayerCaches | None
    late: int
    on_step: Callable[[Step], None] | None


def _advance(
    rows: MaskedRows, way: _Way, block: slice, first: Tensor, number: int, steps: int
) -> None:
    """A step of a block; ``first`` to ``steps`` as in ``Candidates``. The memory that it needs,
    several times that of the logits, is free when it ends."""
    decoding, masked = way.decoding, rows.masked()[:, block]
    fresh = number % decoding.refresh_every == 0 if decoding.refresh_every else number == 0
    logits = rows.logits(block, decoding, way.caches, fresh)
    uniform, drawn = _noise(way.seeds, block.start, number, logits)
    tempered = logits / decoding.temperature if decoding.temperature else logits
    drawn_from = _likeliest(tempered, decoding.top_p, decoding.top_k)
    prediction = _drawn(drawn_from, drawn) if decoding.temperature else drawn_from.argmax(-1)
    p = logits.softmax(-1)
    candidates = Candidates(
        number,
        steps,
        masked,
        first,
        prediction,
        p,
        p if drawn_from is logits else drawn_from.softmax(-1),
        uniform,
    )
    chosen = decoding.sampler(candidates, prediction == way.late) & masked
    rows.put(chosen, prediction, block)
    if way.on_step:
        way.on_step(_step(rows.response(), block, chosen, candidates))


def _step(response: Tensor, block: slice, chosen: Tensor, candidates: Candidates) -> Step:
    """The step that has put the ``chosen`` [B, block] of a block's candidates."""
    put = torch.zeros_like(response, dtype=torch.bool)
    put[:, block] = chosen & (response[:, block] == candidates.prediction)
    confidence = torch.zeros_like(response, dtype=torch.float32)
    confidence[:, block] = torch.where(put[:, block], low_confidence(candidates), 0)
    return Step(response, put, confidence)


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


def _noise(seeds: Sequence[int], start: int, index: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """U(0, 1) numbers for the sampler, and to draw tokens by. [B, n] each, fp64; rows' own."""
    n = logits.shape[1]
    numbers = torch.stack(
        [
            torch.rand(
                2, n, generator=keyed_generator(seed, "generate", start, index), dtype=torch.float64
            )
            for seed in seeds
        ],
        1,
    )
    first, second = numbers.to(logits.device)
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
