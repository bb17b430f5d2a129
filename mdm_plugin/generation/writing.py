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
from mdm_plugin.generation.samplers import Candidates
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator


class Generated(NamedTuple):
    """tokens: [B, n], long, on the model's device. forwards: of the batch; a guided one is two."""

    tokens: Tensor
    forwards: int


@torch.no_grad()
def generate(
    model: MDMTransformer,
    prompts: Sequence[Tensor | Sequence[int]],
    decoding: Decoding | None = None,
    *,
    special: SpecialTokens,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
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
        on_step: called after each step with the responses as they are, [B, max_new_tokens].

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
    on_step: Callable[[Tensor], None] | None,
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
        for start in range(0, n, size):
            block = slice(start, start + size)
            first = rows.masked()[:, block].sum(1)
            index = 0
            while (masked := rows.masked()[:, block]).any():
                fresh = index % (decoding.refresh_every or n + 1) == 0
                logits = rows.logits(block, decoding, caches, fresh)
                forwards += 2 if decoding.cfg_scale else 1
                uniform, gumbel = _noise(seeds, start, index, logits, decoding.temperature)
                tempered = logits / decoding.temperature if decoding.temperature else logits
                drawn_from = _likeliest(tempered, decoding.top_p, decoding.top_k)
                noisy = drawn_from if gumbel is None else drawn_from.double() + gumbel
                prediction = noisy.argmax(-1)
                p = logits.softmax(-1)
                chosen = decoding.sampler(
                    Candidates(
                        index,
                        steps,
                        masked,
                        first,
                        prediction,
                        p,
                        p if drawn_from is logits else drawn_from.softmax(-1),
                        uniform,
                    ),
                    prediction == late,
                )
                rows.put(chosen & masked, prediction, block)
                index += 1
                if on_step:
                    on_step(rows.response())
    return Generated(rows.response(), forwards)


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


def _noise(
    seeds: Sequence[int], start: int, index: int, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """U(0, 1) numbers [B, n] and, at a temperature, Gumbel noise [B, n, V], fp64; rows' own."""
    _, n, vocabulary = logits.shape
    uniform, gumbel = [], []
    for seed in seeds:
        generator = keyed_generator(seed, "generate", start, index)
        uniform.append(torch.rand(n, generator=generator, dtype=torch.float64))
        if temperature:
            u = torch.rand(n, vocabulary, generator=generator, dtype=torch.float64)
            gumbel.append(-(-u.clamp(min=1e-300).log()).log())
    noise = torch.stack(gumbel).to(logits.device) if temperature else None
    return torch.stack(uniform).to(logits.device), noise
