"""Tokenised rows: in memory, or in an Arrow file that stays on disk."""

import mmap
import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
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


class Stored:
    """An array in a file, of which slices are read as they are asked for.

    Mapped files would do, too; but what a process has touched of them counts as its memory, in
    pages of up to 2 MiB for a row of a few hundred bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, kind: str) -> None:
        self.file, self.offset, self.kind = file, offset, numpy.dtype(kind)

    def __getitem__(self, place: slice) -> NDArray[Any]:
        size = self.kind.itemsize
        start, count = self.offset + place.start * size, (place.stop - place.start) * size
        return numpy.frombuffer(os.pread(self.file.fileno(), count, start), self.kind)


class Chunk(NamedTuple):
    """Some rows, end to end.

    tokens: [T], int32. eligible: [T], bool. ends: [rows + 1], where each row begins, and the end.
    """

    tokens: NDArray[Any] | Stored
    eligible: NDArray[Any] | Stored
    ends: NDArray[Any]


class Facts(NamedTuple):
    """What is known of rows without reading them.

    tokens: in all rows. longest: tokens of the longest. max_token: largest token id.
    fingerprint: a hash of all tokens and of what is eligible: another one is other data.
    report: one line on what reading cut or left out; empty if nothing.
    """

    tokens: int
    longest: int
    max_token: int
    fingerprint: str
    report: str = ""


TOKENS_PER_CHUNK = 1 << 20


class Rows(torch.utils.data.Dataset[Row]):
    """A data set of ``Row``s.

    Args:
        rows: (token ids, eligible) of each row, to be held in memory, five bytes per token.
        report: as in ``Facts``.
    """

    def __init__(self, rows: Iterable[tuple[list[int], list[bool]]], report: str = "") -> None:
        self._use(list(chunks(rows)))
        self.facts = self.find_facts(report)

    @classmethod
    def open(cls, file: Path, facts: Facts) -> "Rows":
        """The rows of an Arrow file that ``mdm_plugin.data.cache`` wrote, left where they are.

        In memory are four bytes for each row, where it ends; tokens are read as they are needed.
        Processes of one machine share what the system keeps of the file.
        """
        import pyarrow

        opened = file.open("rb")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            # Where the file has its arrays: the addresses of the mapped ones, from its start.
            whole = pyarrow.py_buffer(mapped)
            parts = []
            for batch in pyarrow.ipc.open_stream(whole):
                tokens, eligible = batch.column("tokens"), batch.column("eligible")
                places = [x.values.buffers()[1].address - whole.address for x in (tokens, eligible)]
                parts.append(
                    Chunk(
                        Stored(opened, places[0], "int32"),
                        Stored(opened, places[1], "bool"),
                        tokens.offsets.to_numpy().copy(),
                    )
                )
                del tokens, eligible, batch
            del whole
        self = cls.__new__(cls)
        self._use(parts)
        self.facts = facts
        return self

    def _use(self, parts: list[Chunk]) -> None:
        self._chunks = parts
        self._starts = numpy.cumsum([0, *(len(x.ends) - 1 for x in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Chunk, int, int]:
        """A row's chunk, and where in it the row begins and ends."""
        number = int(numpy.searchsorted(self._starts, index, side="right")) - 1
        chunk, place = self._chunks[number], index - int(self._starts[number])
        return chunk, int(chunk.ends[place]), int(chunk.ends[place + 1])

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk, start, end = self._find(index)
        tokens = torch.from_numpy(chunk.tokens[start:end].astype(numpy.int64))
        return Row(tokens, torch.from_numpy(chunk.eligible[start:end].copy()))

    def padded(self, indices: Tensor, length: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, filled to ``length``: tokens, eligible, and what is no filling; [R, length].

        indices [R], of rows of ``length`` tokens or fewer.
        """
        tokens = torch.full((len(indices), length), fill)
        eligible, real = torch.zeros(2, len(indices), length, dtype=torch.bool)
        ids, may_be_masked, no_filling = tokens.numpy(), eligible.numpy(), real.numpy()
        for i, index in enumerate(indices.tolist()):
            chunk, start, end = self._find(index)
            ids[i, : end - start] = chunk.tokens[start:end]
            may_be_masked[i, : end - start] = chunk.eligible[start:end]
            no_filling[i, : end - start] = True
        return tokens, eligible, real

    def lengths_of(self, indices: Tensor) -> Tensor:
        """Tokens of some rows. indices [R] → [R], long."""
        found = (self._find(index) for index in indices.tolist())
        return torch.tensor([end - start for _, start, end in found], dtype=torch.long)

    def eligible_of(self, indices: Tensor) -> Tensor:
        """Eligible tokens of some rows. indices [R] → [R], long."""
        found = (self._find(index) for index in indices.tolist())
        counts = [int(chunk.eligible[start:end].sum()) for chunk, start, end in found]
        return torch.tensor(counts, dtype=torch.long)

    def __str__(self) -> str:
        text = f"{len(self)} rows, {self.facts.tokens} tokens"
        return f"{text}; {self.facts.report}" if self.facts.report else text

    def find_facts(self, report: str = "") -> Facts:
        """The facts, by reading all rows once for each of what is hashed."""
        digest = blake2b(digest_size=16)
        longest, max_token, total = 0, 0, 0
        for chunk in self._chunks:
            tokens = chunk.tokens[0 : int(chunk.ends[-1])]
            digest.update(tokens.tobytes())
            max_token = max(max_token, int(tokens.max(initial=0)))
        for chunk in self._chunks:
            digest.update(chunk.eligible[0 : int(chunk.ends[-1])].tobytes())
        digest.update(numpy.int64(0).tobytes())
        for chunk in self._chunks:
            digest.update((chunk.ends[1:].astype(numpy.int64) + total).tobytes())
            longest = max(longest, int(numpy.diff(chunk.ends).max(initial=0)))
            total += int(chunk.ends[-1])
        return Facts(total, longest, max_token, digest.hexdigest(), report)


def chunks(rows: Iterable[tuple[list[int], list[bool]]]) -> Iterator[Chunk]:
    """Rows in chunks of about ``TOKENS_PER_CHUNK`` tokens, one after another."""
    tokens: list[NDArray[Any]] = []
    eligible: list[NDArray[Any]] = []
    count = 0
    for ids, may_be_masked in rows:
        tokens.append(numpy.array(ids, dtype=numpy.int32))
        eligible.append(numpy.array(may_be_masked, dtype=numpy.bool_))
        count += len(ids)
        if count >= TOKENS_PER_CHUNK:
            yield _chunk(tokens, eligible)
            tokens, eligible, count = [], [], 0
    if tokens:
        yield _chunk(tokens, eligible)


def _chunk(tokens: list[NDArray[Any]], eligible: list[NDArray[Any]]) -> Chunk:
    ends = numpy.cumsum([0, *(len(x) for x in tokens)], dtype=numpy.int32)
    return Chunk(numpy.concatenate(tokens), numpy.concatenate(eligible), ends)
