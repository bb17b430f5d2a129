"""Writing with a model of blocks: one after another, with an exact cache.

A finished block sees no later one (``mdm_plugin.models.blocks``). So its keys and values are kept
for good, and a step forwards the block that is being written alone. Blocks are counted from a row's
first token: a prompt may end anywhere in one, and rows of other lengths are in other blocks. The
first step of a block forwards the one before it once more, finished now, and keeps that.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.generation.masked import SpecialTokens
from mdm_plugin.generation.samplers import Candidates
from mdm_plugin.generation.steps import Generated, Noise, Step, propose, put_step
from mdm_plugin.models import MDMTransformer


class PrefixCache(nn.Module):
    """Keys and values of the finished blocks, in the place of torchtune's KV cache.

    Those of a forward come after them; with ``keep``, the first so many columns stay. [B, heads,
    columns, head size] each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.keep: int | None = None

    @torch.compiler.disable  # a graph would be made for each number of columns that is kept
    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, of finished blocks and of this forward."""
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        if self.keep is not None:
            self.k, self.v = k[:, :, : self.keep].clone(), v[:, :, : self.keep].clone()
        return k, v


class PrefixCaches:
    """The caches of all layers, in place while this is open. stored: columns that are kept."""

    def __init__(self, model: MDMTransformer) -> None:
        self.attentions = [layer.attn for layer in model.layers]
        self.stored = 0

    def __enter__(self) -> "PrefixCaches":
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = PrefixCache(), True
        return self

    def __exit__(self, *_: object) -> None:
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = None, False

    def keep(self, columns: int | None) -> None:
        """Of the next forward, and all before, keep so many columns; None: as many as there are."""
        for attention in self.attentions:
            attention.kv_cache.keep = columns
        self.stored = self.stored if columns is None else columns

    def choose(self, rows: Tensor) -> None:
        """Go on with some of the rows. [B'], long."""
        for attention in self.attentions:
            cache = attention.kv_cache
            if cache.k is not None:
                cache.k, cache.v = cache.k[rows], cache.v[rows]


class BlockRows:
    """B rows on the model's device: prompts, then n places, then the rest of the last block.

    tokens: [B, L], with the mask token where nothing is written. written: [B, L], bool, what of a
    row the model writes, in whole blocks: what is beyond n is written and not given out.
    """

    def __init__(
        self, model: MDMTransformer, prompts: list[Tensor], n: int, special: SpecialTokens
    ) -> None:
        assert model.block_length is not None
        self.model, self.size, self.n = model, model.block_length, n
        self.mask_id, self.eos_id = special.mask_id, special.eos_id
        ends = [-(-(len(x) + n) // self.size) * self.size for x in prompts]
        length, limit = max(ends), int(model.max_seq_len)
        if length > limit:
            raise ValueError(
                f"prompt and response have {length} tokens, in whole blocks of {self.size}, the "
                f"model takes {limit}"
            )
        tokens = torch.full((len(prompts), length), special.pad_id)
        for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
            tokens[i, : len(prompt)], tokens[i, len(prompt) : end] = prompt, special.mask_id
        self.device = next(model.parameters()).device
        self.tokens = tokens.to(self.device)
        self.written = self.tokens == self.mask_id
        starts = torch.tensor([len(x) for x in prompts])
        self.places = (starts[:, None] + torch.arange(n)).to(self.device)
        self.first = min(int(x) // self.size for x in starts)
        self.blocks = length // self.size

    def response(self) -> Tensor:
        """[B, n]."""
        return self.tokens.gather(1, self.places)

    def masked(self, block: int) -> Tensor:
        """What of a block is still to be written. [B, S], bool."""
        return self.tokens[:, block * self.size : (block + 1) * self.size] == self.mask_id

    def unfinished(self) -> Tensor:
        """The rows with something left to write. [B'], long."""
        return (self.tokens == self.mask_id).any(1).nonzero()[:, 0]

    def put(self, rows: Tensor, chosen: Tensor, prediction: Tensor, block: int) -> None:
        """Write predictions [B', S] of some rows where ``chosen`` [B', S], and EOS after a first
        EOS with all written before."""
        row, column = chosen.nonzero(as_tuple=True)
        self.tokens[rows[row], block * self.size + column] = prediction[row, column]
        if self.eos_id is not None:
            whole = ((self.tokens != self.mask_id) | ~self.written).cumprod(1) > 0
            ended = ((self.tokens == self.eos_id) & self.written & whole).cumsum(1) > 0
            self.tokens[ended & self.written] = self.eos_id

    def mask(self, first: int, last: int) -> Tensor:
        """Who attends to whom: queries in the columns first..last, keys up to last. [1, q, k]."""
        query = torch.arange(first, last, device=self.device)[:, None] // self.size
        return (query >= torch.arange(last, device=self.device) // self.size)[None]


class BlockWriter:
    """Writes the block that is being written, of the rows that are not finished."""

    def __init__(
        self,
        rows: BlockRows,
        caches: PrefixCaches | None,
        decoding: Decoding,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.rows, self.caches, self.decoding, self.on_step = rows, caches, decoding, on_step
        late = rows.eos_id if decoding.eos_last else None
        self.late = -1 if late is None else late  # to be chosen last; -1: no token
        self.alive = torch.arange(len(rows.tokens), device=rows.device)
        self.before: Tensor | None = None  # logits of the block's first tokens, of a shifted model

    def begin(self, alive: Tensor) -> None:
        """A new block, for some of the rows so far."""
        if self.caches and len(alive) < len(self.alive):
            self.caches.choose(torch.searchsorted(self.alive, alive))
        self.alive, self.before = alive, None

    def advance(
        self, block: int, masked: Tensor, first: Tensor, step: tuple[int, int], noise: Noise
    ) -> None:
        """A step of a block; ``masked`` to ``step`` as ``propose`` takes them. The memory that it
        needs, several times that of the logits, is free when it ends."""
        logits = self.logits(block, masked)
        candidates = propose(logits, masked, first, step, self.decoding, noise)
        chosen = self.decoding.sampler(candidates, candidates.prediction == self.late) & masked
        self.rows.put(self.alive, chosen, candidates.prediction, block)
        if self.on_step:
            self.on_step(_step(self.rows, self.alive, block, chosen, candidates))

    def logits(self, block: int, masked: Tensor) -> Tensor:
        """fp32 logits of a block's masked places [B', S], −inf for the mask token. [B', S, V].

        Other places have zeros, and do not go through the head.
        """
        rows, caches, size, model = self.rows, self.caches, self.rows.size, self.rows.model
        last, fresh = (block + 1) * size, caches is None or self.before is None
        first = 0 if caches is None else caches.stored if fresh else block * size
        if caches:
            caches.keep(block * size if fresh else None)
        tokens = rows.tokens[self.alive, first:last]
        wanted = masked
        if model.shift and not fresh:  # the token before the block's first one is not forwarded
            wanted = masked.clone()
            wanted[:, 0] = False
        row, column = wanted.nonzero(as_tuple=True)
        found = model(
            tokens,
            mask=rows.mask(first, last),
            input_pos=torch.arange(first, last, device=rows.device).expand(len(tokens), -1),
            positions=row * tokens.shape[1] + column + block * size - first,
            head=lambda head, h: head(h),
        )
        found = found.float().to(rows.device)  # parameters offloaded from CUDA rest on the CPU
        found[..., rows.mask_id] = -torch.inf
        every = found.new_zeros(*masked.shape, found.shape[-1])
        every[wanted] = found
        if fresh:
            self.before = every[:, 0].clone()
        elif model.shift and self.before is not None:
            every[:, 0] = torch.where(masked[:, :1], self.before, 0)
        return every


def check_decoding(decoding: Decoding, size: int, n: int) -> tuple[int, int]:
    """(tokens that are written before the next ones of a block, steps for them) of n tokens.

    Raises:
        ValueError: on what a model of blocks of ``size`` tokens cannot do.
    """
    part = decoding.block_length or size
    if size % part:
        raise ValueError(f"block_length {part} does not divide the model's blocks of {size} tokens")
    for name, value in (
        ("cache dual", decoding.cache == "dual"),
        ("refresh_every", decoding.refresh_every),
        ("cfg_scale", decoding.cfg_scale),
    ):
        if value:
            raise ValueError(f"{name}: not for a model that writes block by block: leave it out")
    steps = part if decoding.steps is None else -(-decoding.steps * part // n)
    if steps > part:
        raise ValueError(f"steps is {decoding.steps}: use 1 to the response's {n} tokens")
    return part, steps if decoding.sampler.needs_steps else 0


def write_blocks(
    rows: BlockRows,
    decoding: Decoding,
    seeds: Sequence[int],
    on_step: Callable[[Step], None] | None,
) -> Generated:
    """Fill the rows' places, block by block; with ``decoding.cache``, from kept keys and values.

    Raises:
        ValueError: as ``check_decoding``.
    """
    size, forwards = rows.size, 0
    part, steps = check_decoding(decoding, size, rows.n)
    with PrefixCaches(rows.model) if decoding.cache else nullcontext() as caches:
        writer = BlockWriter(rows, caches, decoding, on_step)
        for block in range(rows.first, rows.blocks):
            alive = rows.unfinished()
            if not len(alive):
                break
            if caches is None:
                alive = alive[rows.masked(block)[alive].any(1)]
            writer.begin(alive)
            own = [seeds[i] for i in alive.tolist()]
            for start in range(0, size, part):
                inside = torch.zeros(size, dtype=torch.bool, device=rows.device)
                inside[start : start + part] = True
                first = (rows.masked(block)[alive] & inside).sum(1)
                number = 0
                while (masked := rows.masked(block)[alive] & inside).any():
                    noise = Noise(own, block * size + start, number)
                    writer.advance(block, masked, first, (number, steps), noise)
                    forwards, number = forwards + 1, number + 1
    return Generated(rows.response(), forwards)


def _step(
    rows: BlockRows, alive: Tensor, block: int, chosen: Tensor, candidates: Candidates
) -> Step:
    """What has been done to a block [B', S] of some rows, as that to all responses [B, n]."""
    columns = slice(block * rows.size, (block + 1) * rows.size)
    done = put_step(rows.tokens[alive], columns, chosen, candidates)
    every = [x.new_zeros(rows.tokens.shape).index_copy(0, alive, x) for x in done]
    put, confidence = (x.gather(1, rows.places) for x in every)
    return Step(rows.response(), put, confidence)
