"""Writing text with a masked diffusion model: masked positions are filled in step by step.

A step predicts every masked position; a sampler then says which of the predictions stay. A sampler
is a small class of one method, named in a config by its dotted path:

- ``Remasking``: a number of positions per step, those first in an order (LLaDA, Dream);
- ``Threshold``: all that the model is sure enough of (Fast-dLLM);
- ``Stable``: all that it is sure of and has stopped changing its mind about (KLASS).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mdm_plugin.noise import keyed_generator

Cache = Literal["prefix", "dual"]


class Step(NamedTuple):
    """What a sampler chooses from: B rows, the n positions of the block being written.

    number, steps: number of the step in its block, from 0, and how many there are to be; steps is
        0 where the sampler decides that.
    masked: [B, n], bool, positions still to be filled.
    first: [B], how many positions of the block were masked at its start.
    prediction: [B, n], the tokens proposed.
    model: [B, n, V], the model's probabilities.
    sampled: [B, n, V], those that the predictions were drawn from: after temperature, top-p, top-k.
    uniform: [B, n], U(0, 1) numbers of the rows' own.
    """

    number: int
    steps: int
    masked: Tensor
    first: Tensor
    prediction: Tensor
    model: Tensor
    sampled: Tensor
    uniform: Tensor


class Sampler(Protocol):
    needs_steps: bool

    def __call__(self, step: Step, late: Tensor) -> Tensor: ...


def low_confidence(x: Step) -> Tensor:
    """The model's probability of the prediction (LLaDA, arXiv 2502.09992, Algorithm 5)."""
    return x.model.gather(-1, x.prediction[..., None])[..., 0]


def random(x: Step) -> Tensor:
    """Any order (LLaDA, Algorithm 4)."""
    return x.uniform


def maskgit_plus(x: Step) -> Tensor:
    """Its probability under what it was drawn from (Dream, arXiv 2508.15487; MaskGIT)."""
    return x.sampled.gather(-1, x.prediction[..., None])[..., 0]


def entropy(x: Step) -> Tensor:
    """Minus the entropy of what it was drawn from (Dream)."""
    return (x.sampled * (x.sampled + 1e-10).log()).sum(-1)


def margin(x: Step) -> Tensor:
    """The best token's probability over the second's (Dream's top-k margin)."""
    best = x.sampled.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


ORDERS: dict[str, Callable[[Step], Tensor]] = {
    f.__name__: f for f in (low_confidence, random, maskgit_plus, entropy, margin)
}


def _order(name: str) -> Callable[[Step], Tensor]:
    if name not in ORDERS:
        raise ValueError(f"order is {name!r}: use one of {', '.join(ORDERS)}")
    return ORDERS[name]


def _score(order: Callable[[Step], Tensor], x: Step, late: Tensor) -> Tensor:
    """Of the masked positions; those to come ``late`` below all others, filled ones at −inf."""
    score = order(x).double()
    score = torch.where(late, score - 1e6, score)
    return score.masked_fill(~x.masked, -torch.inf)


def _first(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [B] positions of highest score, [B, n]; never one at −inf."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < count[:, None]) & (score > -torch.inf)


class Remasking:
    """Each step fills a number of positions, the first in ``order``; the rest stay masked.

    Args:
        order: ``low_confidence``, ``random``, ``maskgit_plus``, ``entropy`` or ``margin``.
        schedule: how many a step: ``even``, with the remainder in the first steps (LLaDA);
            ``linear``, ⌊masked · (1 − s/t)⌋ for t on an even grid from 1 to 1e-3 and s the
            next point, and all in the last step (Dream).

    Raises:
        ValueError: on an unknown order or schedule.
    """

    needs_steps = True

    def __init__(self, order: str = "low_confidence", schedule: str = "even") -> None:
        if schedule not in ("even", "linear"):
            raise ValueError(f"schedule is {schedule!r}: use even or linear")
        self.order, self.schedule = _order(order), schedule

    def __call__(self, step: Step, late: Tensor) -> Tensor:
        if self.schedule == "even":
            count = step.first // step.steps + (step.number < step.first % step.steps)
        elif step.number == step.steps - 1:
            count = step.first
        else:
            grid = torch.linspace(1, 1e-3, step.steps + 1)
            t, s = grid[step.number], grid[step.number + 1]
            count = (step.masked.sum(1) * (1 - s / t).to(step.masked.device)).int()
        return _first(_score(self.order, step, late), count)


class Threshold:
    """Each step fills all positions whose score is at least ``threshold``, or else the best one.

    Parallel decoding by confidence (Fast-dLLM, arXiv 2505.22618).

    Args:
        threshold: of the score, in (0, 1] for probabilities.
        order: as in ``Remasking``.

    Raises:
        ValueError: on an unknown order.
    """

    needs_steps = False

    def __init__(self, threshold: float = 0.9, order: str = "low_confidence") -> None:
        self.threshold, self.order = threshold, _order(order)

    def __call__(self, step: Step, late: Tensor) -> Tensor:
        score = _score(self.order, step, late)
        return (score >= self.threshold) | _first(score, step.masked.any(1).long())


class Stable:
    """Each step fills the positions that the model is sure of and that have settled.

    A position has settled when the KL divergence of its distribution from the step before's was
    below ``kl_threshold`` in the last ``history`` steps. If there is none, the ``at_least`` most
    confident are filled. (KLASS, arXiv 2511.05664.)

    Args:
        threshold: of the model's probability of the prediction.
        kl_threshold: in nats.
        history: steps, 1 or more.
        at_least: positions per step, 1 or more.

    Raises:
        ValueError: on a history or number below 1.
    """

    needs_steps = False

    def __init__(
        self,
        threshold: float = 0.9,
        kl_threshold: float = 0.01,
        history: int = 2,
        at_least: int = 1,
    ) -> None:
        if history < 1 or at_least < 1:
            raise ValueError(f"history is {history}, at_least {at_least}: use 1 or more")
        self.threshold, self.kl_threshold = threshold, kl_threshold
        self.history, self.at_least = history, at_least
        self._before, self._settled = torch.empty(0), torch.empty(0)

    def __call__(self, step: Step, late: Tensor) -> Tensor:
        now = step.model.clamp(min=1e-12).log()
        if step.number == 0:
            self._settled = torch.zeros_like(step.prediction)
        else:
            kl = (step.model * (now - self._before)).sum(-1)
            self._settled = torch.where(kl < self.kl_threshold, self._settled + 1, 0)
        self._before = now
        score = _score(low_confidence, step, late)
        chosen = (score > self.threshold) & (self._settled >= self.history)
        fallback = _first(score, torch.full_like(step.first, self.at_least))
        return torch.where(chosen.any(1, keepdim=True), chosen, fallback)


class BlockCache(nn.Module):
    """Keys and values of a layer's attention, in the place of torchtune's KV cache.

    After a forward over whole rows, forwards over some of their positions attend to the rest as it
    was then. [B, heads, L, head size] each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.k, self.v = torch.empty(0), torch.empty(0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values, of all positions or of ``positions`` [B, m]; give all."""
        if self.positions is None:
            self.k, self.v = k, v
        else:
            index = self.positions[:, None, :, None].expand_as(k)
            self.k, self.v = self.k.scatter(2, index, k), self.v.scatter(2, index, v)
        return self.k, self.v


class _Caches:
    """The caches of all layers, in place while this is open."""

    def __init__(self, model: nn.Module) -> None:
        self.attentions = [layer.attn for layer in model.layers]  # type: ignore[union-attr]

    def __enter__(self) -> "_Caches":
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = BlockCache(), True
        return self

    def __exit__(self, *_: object) -> None:
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = None, False

    def at(self, positions: Tensor | None) -> None:
        for attention in self.attentions:
            attention.kv_cache.positions = positions


@dataclass(frozen=True)
class Decoding:
    """How text is written.

    Args:
        steps: number of steps, for samplers that take a number; None for one position a step.
        block_length: the response is written block by block, left to right; None for one block.
        sampler: which predictions stay at each step.
        temperature: 0 takes the likeliest token; else tokens are drawn, by Gumbel noise in fp64.
        top_p, top_k: draw from the likeliest tokens only, to a total probability or a number.
        cfg_scale: w of classifier-free guidance: (w + 1) · logits − w · logits without the prompt.
        eos_last: EOS is chosen where nothing else can be (LLaDA's confidence_eos_eot_inf).
        cache: after the first step of a block, forward only its positions (``dual``) or those from
            its start to the end (``prefix``), the others' keys and values being those of that
            first step: an approximation (Fast-dLLM, arXiv 2505.22618).
        refresh_every: with a cache, a whole forward every so many steps of a block; 1 is exact.
        shift: the model predicts the token at i from position i − 1 (Dream).

    Raises:
        ValueError: on a value out of range, or one that the others leave without effect.
    """

    steps: int | None = None
    block_length: int | None = None
    sampler: Sampler = field(default_factory=Remasking)
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    eos_last: bool = False
    cache: Cache | None = None
    refresh_every: int | None = None
    shift: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "block_length", "top_k", "refresh_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: use 1 or more")
        if self.steps is not None and not self.sampler.needs_steps:
            raise ValueError(
                f"steps is {self.steps}: {type(self.sampler).__name__} takes as many as it needs: "
                "leave it out"
            )
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError(
                f"temperature is {self.temperature}, cfg_scale {self.cfg_scale}: use 0 or more"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use more than 0, to 1")
        if self.cache not in (None, "prefix", "dual"):
            raise ValueError(f"cache is {self.cache!r}: use prefix, dual or null")
        if self.refresh_every is not None and self.cache is None:
            raise ValueError("refresh_every: there is no cache to refresh: set cache")

    def steps_per_block(self, length: int) -> tuple[int, int]:
        """(length of a block, steps in it; 0 if the sampler decides) for ``length`` tokens.

        Raises:
            ValueError: if they do not fit each other.
        """
        block = self.block_length or length
        if length % block:
            raise ValueError(f"block_length {block} does not divide the response's {length} tokens")
        blocks, steps = length // block, self.steps or length
        if steps > length:
            raise ValueError(f"steps is {steps}: use 1 to the response's {length} tokens")
        if steps % blocks:
            raise ValueError(f"steps is {steps}: use a multiple of the {blocks} blocks")
        return block, steps // blocks if self.sampler.needs_steps else 0


class SpecialTokens(Protocol):
    """A tokenizer, of which its special tokens are used."""

    mask_id: int
    pad_id: int
    eos_id: int


class Generated(NamedTuple):
    """tokens: [B, n], long, on the model's device. forwards: of the batch; a guided one is two."""

    tokens: Tensor
    forwards: int


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Tensor],
    decoding: Decoding | None = None,
    *,
    mask_id: int,
    pad_id: int,
    max_new_tokens: int,
    eos_id: int | None = None,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Generated:
    """The model's responses to prompts of any lengths, each the same as it would be alone.

    Args:
        model: an ``MDMTransformer``, in eval mode.
        prompts: token ids, [N_b] each.
        decoding: None for LLaDA's defaults, low-confidence remasking at temperature 0.
        mask_id, pad_id: token ids.
        max_new_tokens: length of every response.
        eos_id: if given, a row ends once all before its first EOS is written, and is EOS from
            there; the text is the same, the forwards are fewer.
        seeds: one per prompt, of its noise; None for 0, 1, ….
        on_step: called after each step with the responses as they are, [B, max_new_tokens].

    Raises:
        ValueError: on an empty prompt or one with the mask token in it, on rows longer than the
            model takes, or lengths and steps that do not fit each other.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty")
        if (prompt == mask_id).any():
            raise ValueError(f"prompt {i} holds the mask token: infill fills such rows")
    masks = torch.full((max_new_tokens,), mask_id)
    rows = [torch.cat((prompt.cpu(), masks)) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    places = lengths[:, None] + torch.arange(max_new_tokens)
    batch = _Rows(model, rows, places, places >= 0, lengths, mask_id, pad_id, eos_id)
    return _write(batch, decoding or Decoding(), seeds, on_step)


def complete(
    model: nn.Module,
    tokenizer: SpecialTokens,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding | None,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Generated:
    """``generate`` after prompts of token ids, with the tokenizer's special tokens."""
    return generate(
        model,
        [torch.tensor(ids) for ids in prompts],
        decoding,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        max_new_tokens=max_new_tokens,
        seeds=seeds,
        on_step=on_step,
    )


@torch.no_grad()
def infill(
    model: nn.Module,
    rows: Sequence[Tensor],
    decoding: Decoding | None = None,
    *,
    mask_id: int,
    pad_id: int,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """``rows`` of tokens with their mask tokens, wherever they are, filled in.

    Arguments as in ``generate``; blocks, caches and guidance are for text after a prompt.

    Raises:
        ValueError: as ``generate``, on a row without a mask token, and on those options.
    """
    decoding = decoding or Decoding()
    for name in ("block_length", "cache", "cfg_scale", "eos_last"):
        if getattr(decoding, name):
            raise ValueError(f"{name}: not for infilling: leave it out")
    found = [(row.cpu() == mask_id).nonzero()[:, 0] for row in rows]
    for i, places in enumerate(found):
        if not len(places):
            raise ValueError(f"row {i} has no mask token: there is nothing to fill in")
        if decoding.shift and places[0] == 0:
            raise ValueError(f"row {i} begins with a mask token, which a shifted model cannot fill")
    most = max(len(places) for places in found)
    places = torch.stack([torch.cat((x, x[-1:].expand(most - len(x)))) for x in found])
    valid = torch.arange(most) < torch.tensor([len(x) for x in found])[:, None]
    nothing = torch.zeros(len(rows), dtype=torch.long)
    batch = _Rows(model, [r.cpu() for r in rows], places, valid, nothing, mask_id, pad_id, None)
    _write(batch, decoding, seeds, None)
    return [batch.tokens[i, : len(row)].to(row.device) for i, row in enumerate(rows)]


class _Rows:
    """Rows on the model's device, padded: B rows of L tokens, n places of each to be written.

    tokens: [B, L]. attend: [B, 1, L], what is no padding. places: [B, n]. valid: [B, n], which of
    them are the row's own. prompt: [B, L], bool.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: list[Tensor],
        places: Tensor,
        valid: Tensor,
        prompt_lengths: Tensor,
        mask_id: int,
        pad_id: int,
        eos_id: int | None,
    ) -> None:
        length, limit = max(len(row) for row in rows), int(model.max_seq_len)  # type: ignore
        if length > limit:
            raise ValueError(f"prompt and response have {length} tokens, the model takes {limit}")
        self.model, self.mask_id, self.eos_id = model, mask_id, eos_id
        tokens = torch.full((len(rows), length), pad_id)
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
        self, block: slice, decoding: Decoding, caches: _Caches | None, fresh: bool
    ) -> Tensor:
        """fp32 logits of a block's places, [B, n, V], guided; −inf for the mask token."""
        n, start = self.places.shape[1], block.start
        tokens, attend, places = self.tokens, self.attend, self.places
        if decoding.cfg_scale:
            blank = torch.where(self.prompt, self.mask_id, tokens)
            tokens, attend = torch.cat((tokens, blank)), attend.repeat(2, 1, 1)
            places = places.repeat(2, 1)
        source = places[:, block] - int(decoding.shift)
        row = torch.arange(len(tokens), device=self.device)[:, None]
        if caches:
            caches.at(None)
        if fresh or not caches:
            logits = self.model(tokens, mask=attend, head=lambda head, h: head(h[row, source]))
        else:
            again = places[:, block if decoding.cache == "dual" else slice(start, n)]
            if decoding.shift:  # the block's first token is predicted from the one before it
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
    with _Caches(rows.model) if decoding.cache else nullcontext() as caches:
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
                    Step(
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
