"""Rows with masked positions, and a model's predictions for these."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mdm_plugin.generation.caches import LayerCaches
from mdm_plugin.generation.decoding import Decoding
from mdm_plugin.models import MDMTransformer


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


class MaskedRows:
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
        self.held = self.valid.any(1)  # rows of the last whole forward

    @classmethod
    def of(cls, model: MDMTransformer, rows: list[Tensor], special: SpecialTokens) -> "MaskedRows":
        """Rows of tokens with mask tokens in them, anywhere: these are the places to be written.

        Raises:
            ValueError: on a row without any, or one that begins with one, which a shifted model
                cannot fill.
        """
        found = [(row == special.mask_id).nonzero()[:, 0] for row in rows]
        for i, places in enumerate(found):
            if not len(places):
                raise ValueError(f"row {i} has no mask token: there is nothing to fill in")
            if model.shift and places[0] == 0:
                raise ValueError(
                    f"row {i} begins with a mask token, which a shifted model cannot fill"
                )
        most = max(len(places) for places in found)
        places = torch.stack([torch.cat((x, x[-1:].expand(most - len(x)))) for x in found])
        valid = torch.arange(most) < torch.tensor([len(x) for x in found])[:, None]
        nothing = torch.zeros(len(rows), dtype=torch.long)
        endless = TokenIds(special.mask_id, special.pad_id)
        return cls(model, rows, places, valid, nothing, endless)

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
        """fp32 logits of a block's masked places, guided; −inf for the mask token. [B, n, V].

        Other places have zeros, and do not go through the head. Rows with nothing masked in the
        block do not go through the model; with ``caches`` those of the last whole forward do, as
        these are the rows that the caches hold.
        """
        masked = self.masked()[:, block]
        if fresh or not caches:
            self.held = masked.any(1)
        left = self.held
        tokens, attend, places = self.tokens[left], self.attend[left], self.places[left]
        wanted = masked[left]
        if decoding.cfg_scale:
            blank = torch.where(self.prompt[left], self.mask_id, tokens)
            tokens, attend = torch.cat((tokens, blank)), attend.repeat(2, 1, 1)
            places, wanted = places.repeat(2, 1), wanted.repeat(2, 1)
        if caches:
            caches.at(None)
        if fresh or not caches:
            row = torch.arange(len(tokens), device=self.device)[:, None]
            positions = (row * tokens.shape[1] + places[:, block])[wanted]
            logits = self.model(
                tokens, mask=attend, positions=positions, head=lambda head, h: head(h)
            )
        else:
            again = places[:, block if decoding.cache == "dual" else slice(block.start, None)]
            if self.model.shift:  # the block's first token is predicted from the one before it
                again = torch.cat((again[:, :1] - 1, again), 1)
            caches.at(again)
            logits = self.model(
                tokens.gather(1, again),
                mask=attend,
                input_pos=again,
                head=lambda head, h: head(h[:, : wanted.shape[1]][wanted]),
            )
        logits = logits.float().to(self.device)  # parameters offloaded from CUDA rest on the CPU
        if decoding.cfg_scale:
            given, blank = logits.chunk(2)
            logits = blank + (decoding.cfg_scale + 1) * (given - blank)
        logits[..., self.mask_id] = -torch.inf
        every = logits.new_zeros(*masked.shape, logits.shape[-1])
        every[masked] = logits
        return every
