"""Writing text with a masked diffusion model: masked positions are filled in step by step.

A step predicts every masked position; a sampler then says which of the predictions stay.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.generation.blocks import BlockRows, check_decoding, write_blocks
from mdm_plugin.generation.caches import LayerCaches
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.masked import MaskedRows, SpecialTokens
from mdm_plugin.generation.steps import Generated, Noise, Step, propose, put_step
from mdm_plugin.models import MDMTransformer


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
    seeds = _seeds(seeds, len(ids))
    decoding = decoding or Decoding()
    if decoding.eos_last and special.eos_id is None:
        raise ValueError("eos_last: give eos_id")
    if model.block_length:
        return write_blocks(
            BlockRows(model, ids, max_new_tokens, special), decoding, seeds, on_step
        )
    masks = torch.full((max_new_tokens,), special.mask_id)
    rows = [torch.cat((prompt, masks)) for prompt in ids]
    lengths = torch.tensor([len(prompt) for prompt in ids])
    places = lengths[:, None] + torch.arange(max_new_tokens)
    batch = MaskedRows(model, rows, places, places >= 0, lengths, special)
    return _write(batch, decoding, seeds, on_step)


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
    if model.block_length:
        raise ValueError(
            "a model that writes block by block fills in no places before the last one"
        )
    for name, value in (
        ("block_length", decoding.block_length),
        ("cache", decoding.cache),
        ("cfg_scale", decoding.cfg_scale),
        ("eos_last", decoding.eos_last),
    ):
        if value:
            raise ValueError(f"{name}: not for infilling: leave it out")
    batch = MaskedRows.of(model, [row.cpu() for row in rows], special)
    _write(batch, decoding, _seeds(seeds, len(rows)), None)
    return [batch.tokens[i, : len(row)].to(row.device) for i, row in enumerate(rows)]


def check_lengths(model: MDMTransformer, decoding: Decoding, n: int) -> None:
    """Check that a model can write n tokens by a decoding.

    Raises:
        ValueError: if its blocks and steps do not fit n, or the model's own blocks.
    """
    if model.block_length:
        check_decoding(decoding, model.block_length, n)
    else:
        decoding.steps_per_block(n)


def _write(
    rows: MaskedRows,
    decoding: Decoding,
    seeds: Sequence[int],
    on_step: Callable[[Step], None] | None,
) -> Generated:
    """Fill the rows' places, block by block."""
    n = rows.places.shape[1]
    size, steps = decoding.steps_per_block(n)
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
    noise = Noise(way.seeds, block.start, number)
    candidates = propose(logits, masked, first, (number, steps), decoding, noise)
    chosen = decoding.sampler(candidates, candidates.prediction == way.late) & masked
    rows.put(chosen, candidates.prediction, block)
    if way.on_step:
        now = rows.response()
        way.on_step(Step(now, *put_step(now, block, chosen, candidates)))


def _seeds(seeds: Sequence[int] | None, count: int) -> Sequence[int]:
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} prompts")
    return range(count) if seeds is None else seeds
