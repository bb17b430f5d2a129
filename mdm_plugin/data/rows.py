"""Tokenised rows, held in memory in three flat tensors."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One training row of N tokens.

    tokens: [N], long.
    eligible: [N], bool, true for the response, which alone may be masked.
    """

    tokens: Tensor
    eligible: Tensor

    @property
    def prompt(self) -> Tensor:
        """The tokens before the first response."""
        return self.tokens[: int(self.eligible.int().argmax())]


class Rows(torch.utils.data.Dataset[Row]):
    """A data set of ``Row``s: five bytes per token, the same on every rank.

    Args:
        rows: (token ids, eligible) of each row.
        report: one line on what reading cut or left out; empty if nothing.
    """

    def __init__(self, rows: Iterable[tuple[list[int], list[bool]]], report: str = "") -> None:
        tokens, eligible, ends = [], [], [0]
        for ids, may_be_masked in rows:
            tokens.append(torch.tensor(ids, dtype=torch.int32))
            eligible.append(torch.tensor(may_be_masked, dtype=torch.bool))
            ends.append(ends[-1] + len(ids))
        self._tokens = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32)
        self._eligible = torch.cat(eligible) if eligible else torch.empty(0, dtype=torch.bool)
        self._ends = torch.tensor(ends)
        self.report = report

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = slice(int(self._ends[index]), int(self._ends[index + 1]))
        return Row(self._tokens[place].long(), self._eligible[place])

    def padded(self, indices: Tensor, length: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, filled to ``length``: tokens, eligible, and what is no filling; [R, length].

        indices [R], of rows of ``length`` tokens or fewer.
        """
        column = torch.arange(length)
        real = column < self.lengths[indices][:, None]
        place = torch.where(real, self._ends[indices][:, None] + column, 0)
        tokens = torch.where(real, self._tokens[place].long(), fill)
        return tokens, self._eligible[place] & real, real

    def __str__(self) -> str:
        text = f"{len(self)} rows, {int(self.lengths.sum())} tokens"
        return f"{text}; {self.report}" if self.report else text

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [rows], long."""
        return self._ends.diff()

    @property
    def max_token(self) -> int:
        """Largest token id in use."""
        return int(self._tokens.max())

    def fingerprint(self) -> str:
        """A hash of all tokens and of what is eligible: another one is other data."""
        digest = blake2b(digest_size=16)
        for tensor in (self._tokens, self._eligible, self._ends):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
