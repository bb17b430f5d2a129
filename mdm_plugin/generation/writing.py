"""Writing text with a masked diffusion model: masked positions are filled in step by step.

A step predicts every masked position; a sampler then says which of the predictions stay.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mdm_plugin.generation.caches import LayerCaches
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.samplers import Candidates
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator


class SpecialTokens(Protocol):
    """A tokenizer, of which its special tokens are used."""

    @property
    def mask_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int | None: ...


class TokenIds(NamedTuple):
    """Special tokens by themselves. Without eos_id, rows do not end before their length."""

    mask_id: int
    pad_id: int
    eos_id: int | None = None


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
    batch = _Rows(model, rows, places, places >= 0, lengths, special)
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
    found = [(row.cpu() == special.mask_id).nonzero()[:, 0] for row in rows]
    for i, places in enumerate(found):
        if not len(places):
            raise ValueError(f"row {i} has no mask token: there is nothing to fill in")
        if model.shift and places[0] == 0:
            raise ValueError(f"row {i} begins with a mask token, which a shifted model cannot fill")
    most = max(len(places) for places in found)
    places = torch.stack([torch.cat((x, x[-1:].expand(most - len(x)))) for x in found])
    valid = torch.arange(most) < torch.tensor([len(x) for x in found])[:, None]
    nothing = torch.zeros(len(rows), dtype=torch.long)
    endless = TokenIds(special.mask_id, special.pad_id)
    batch = _Rows(model, [r.cpu() for r in rows], places, valid, nothing, endless)
    _write(batch, decoding, seeds, None)
    return [batch.tokens[i, : len(row)].to(row.device) for i, row in enumerate(rows)]


class _Rows:
    """Rows on the model's device, padded: B rows of L tokens, n places of each to be written.

    tokens: [B, L]. attend: [B, 1, L], what is no padding. places: [B, n]. valid: [B, n], which of
    them are the row's own. prompt: [B, L], bool.
    """

    def __init__(
        self,
        model: MDMTransformer,
        rows: list[Tensor],
        places: Tensor,
        valid: Tensor,
        prompt_lengths: Tensor,
        special: SpecialTokens,
    ) -> None:
        length, limit = max(len(row) for row in rows), int(model.max_seq_len)
        if length > limit:
            raise ValueError(f"prompt and response have {length} tokens, the model takes {limit}")
        self.model, self.mask_id, self.eos_id = model, special.mask_id, special.eos_id
        tokens = torch.full((len(rows), length), special.pad_id)
        attend = torch.zeros(len(rows), 1, length, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], attend[i, 0, : len(row)] = row, True
        self.device = next(model.parameters()).device
        self.tokens, self.attend = tokens.to(self.device), attend.to(self.device)
        self.places, self.valid = places.to(self.device), valid.to(self.device)
        self.prompt = (torch.arange(length) < prompt_lengths[:, None]).to(self.device)

    def response(self) -> Tensor:
        """[B, n]."""
        return self.tokens.gather(1, self.places)

    def masked(self) -> Tensor:
        """[B, n], bool: places still to be written."""
        return (self.response() == self.mask_id) & self.valid

    def put(self, chosen: Tensor, prediction: Tensor, block: slice) -> None:
        """Write predictions where ``chosen``, and EOS after a first EOS with all written before."""
        row, column = chosen.nonzero(as_tuple=True)
        self.tokens[row, self.places[:, block][row, column]] = prediction[row, column]
        if self.eos_id is not None:
            response = self.response()
            written = (response != self.mask_id).cumprod(1)
            ended = (((response == self.eos_id) & (written > 0)).cumsum(1) > 0) & self.valid
            self.tokens[ended.nonzero()[:, 0], self.places[ended]] = self.eos_id

    def logits(
        self, block: slice, decoding: Decoding, caches: LayerCaches | None, fresh: bool
    ) -> Tensor:
        """fp32 logits of a block's places, [B, n, V], guided; −inf for the mask token."""
        n, start = self.places.shape[1], block.start
        tokens, attend, places = self.tokens, self.attend, self.places
        if decoding.cfg_scale:
            blank = torch.where(self.prompt, self.mask_id, tokens)
            tokens, attend = torch.cat((tokens, blank)), attend.repeat(2, 1, 1)
            places = places.repeat(2, 1)
        source = places[:, block] - int(self.model.shift)
        row = torch.arange(len(tokens), device=self.device)[:, None]
        if caches:
            caches.at(None)
        if fresh or not caches:
            logits = self.model(tokens, mask=attend, head=lambda head, h: head(h[row, source]))
        else:
            again = places[:, block if decoding.cache == "dual" else slice(start, n)]
            if self.model.shift:  # the block's first token is predicted from the one before it
                again = torch.cat((again[:, :1] - 1, again), 1)
            caches.at(again)
            size = source.shape[1]
            logits = self.model(
                tokens.gather(1, again),
                mask=attend,
                input_pos=again,
                head=lambda head, h: head(h[:, :size]),
            )
        logits = logits.float()
        if decoding.cfg_scale:
            given, blank = logits.chunk(2)
            logits = blank + (decoding.cfg_scale + 1) * (given - blank)
        logits[..., self.mask_id] = -torch.inf
        return logits


def _write(
    rows: _Rows,
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
