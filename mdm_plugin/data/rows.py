"""Tokenised rows: in memory, or in an Arrow file that stays on disk."""

import copy
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

    tokens: NDArray[Any]
    eligible: NDArray[Any]
    ends: NDArray[Any]


class Part(NamedTuple):
    """The tokens of a chunk, and what is eligible, in memory or in a file. [T] each."""

    tokens: NDArray[Any] | Stored
    eligible: NDArray[Any] | Stored


class Facts(NamedTuple):
    """What is known of rows without reading them.

    tokens: in all rows. longest: tokens of the longest. max_token: the largest token id, or more.
    fingerprint: a hash of all tokens and of what is eligible: another one is other data.
    report: one line on what reading cut or left out; empty if nothing.
    together: rows of one example, next to each other: 2 for a preference (``preference_dataset``).
    """

    tokens: int
    longest: int
    max_token: int
    fingerprint: str
    report: str = ""
    together: int = 1


TOKENS_PER_CHUNK = 1 << 20


class Rows(torch.utils.data.Dataset[Row]):
    """A data set of ``Row``s.

    Args:
        rows: (token ids, eligible) of each row, to be held in memory, five bytes per token.
        report, together: as in ``Facts``.
    """

    def __init__(
        self, rows: Iterable[tuple[list[int], list[bool]]], report: str = "", together: int = 1
    ) -> None:
        held = list(chunks(rows))
        self._use([Part(x.tokens, x.eligible) for x in held], [x.ends for x in held])
        self.facts = self.find_facts(report, together)

    @classmethod
    def open(cls, file: Path, facts: Facts) -> "Rows":
        """The rows of an Arrow file that ``mdm_plugin.data.cache`` wrote, left where they are.

        In memory are eight bytes for each row, where it ends; tokens are read as they are needed.
        Processes of one machine share what the system keeps of the file.

        Raises:
            OSError, ValueError: if it is no such file.
        """
        import pyarrow

        opened, parts, ends = file.open("rb"), [], []
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            # Where the file has its arrays: the addresses of the mapped ones, from its start.
            whole = pyarrow.py_buffer(mapped)
            for batch in pyarrow.ipc.open_stream(whole):
                tokens, eligible = batch.column("tokens"), batch.column("eligible")
                places = [x.values.buffers()[1].address - whole.address for x in (tokens, eligible)]
                parts.append(
                    Part(Stored(opened, places[0], "int32"), Stored(opened, places[1], "bool"))
                )
                ends.append(tokens.offsets.to_numpy().copy())
                del tokens, eligible, batch
            del whole
        self = cls.__new__(cls)
        self._use(parts, ends)
        self.facts = facts
        return self

    def _use(self, parts: list[Part], ends: list[NDArray[Any]]) -> None:
        self._parts = parts
        self._chosen: NDArray[Any] | None = None  # rows, where these are not all that were read
        # Where each part begins among all tokens, and where each row does; and the ends.
        self._starts = numpy.cumsum([0, *(int(x[-1]) for x in ends)])
        within = [
            x[1:].astype(numpy.int64) + start
            for x, start in zip(ends, self._starts[:-1], strict=True)
        ]
        self._ends = numpy.concatenate([numpy.zeros(1, numpy.int64), *within])

    def choose(self, indices: Tensor, report: str = "") -> "Rows":
        """Some of these rows, left where they are: up to four bytes more in memory for each.

        No token is read for it. The ``max_token`` is that of all of these rows, and the fingerprint
        a hash of theirs and of the indices.

        Args:
            indices: [R], long, each in 0..len − 1, in the order that the rows are to have.
            report: as in ``Facts``.
        """
        digest = blake2b(self.facts.fingerprint.encode(), digest_size=16)
        digest.update(indices.numpy().tobytes())
        lengths = self.lengths_of(indices)
        view = copy.copy(self)
        view._chosen = self.numbers_of(indices).numpy().astype(numpy.min_scalar_type(len(self)))
        view.facts = Facts(
            int(lengths.sum()),
            int(lengths.max()),
            self.facts.max_token,
            digest.hexdigest(),
            report,
            self.facts.together,
        )
        return view

    def numbers_of(self, indices: Tensor) -> Tensor:
        """The numbers that some rows have in the data set that was read. indices [R] → [R], long.

        They are the indices themselves, but where the rows are some that were chosen of it.
        """
        if self._chosen is None:
            return indices
        return torch.from_numpy(self._chosen[indices.numpy()].astype(numpy.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    def _read(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A row's tokens, and what of them is eligible."""
        row = index if self._chosen is None else int(self._chosen[index])
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        number = int(numpy.searchsorted(self._starts, start, side="right")) - 1
        part, first = self._parts[number], int(self._starts[number])
        place = slice(start - first, end - first)
        return part.tokens[place], part.eligible[place]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens, eligible = self._read(index)
        return Row(torch.from_numpy(tokens.astype(numpy.int64)), torch.from_numpy(eligible.copy()))

    def padded(self, indices: Tensor, length: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows, filled to ``length``: tokens, eligible, and what is no filling; [R, length].

        indices [R], of rows of ``length`` tokens or fewer.
        """
        tokens = torch.full((len(indices), length), fill)
        eligible, real = torch.zeros(2, len(indices), length, dtype=torch.bool)
        ids, may_be_masked, no_filling = tokens.numpy(), eligible.numpy(), real.numpy()
        for i, index in enumerate(indices.tolist()):
            own, eligible_here = self._read(index)
            ids[i, : len(own)] = own
            may_be_masked[i, : len(own)] = eligible_here
            no_filling[i, : len(own)] = True
        return tokens, eligible, real

    def lengths_of(self, indices: Tensor) -> Tensor:
        """Tokens of some rows. indices [R] → [R], long."""
        row = self.numbers_of(indices).numpy()
        return torch.from_numpy(self._ends[row + 1] - self._ends[row])

    def eligible_of(self, indices: Tensor) -> Tensor:
        """Eligible tokens of some rows. indices [R] → [R], long."""
        counts = [int(self._read(index)[1].sum()) for index in indices.tolist()]
        return torch.tensor(counts, dtype=torch.long)

    def __str__(self) -> str:
        each = self.facts.together
        examples = f"{len(self)} rows" if each == 1 else f"{len(self) // each} preferences"
        text = f"{examples}, {self.facts.tokens} tokens"
        return f"{text}; {self.facts.report}" if self.facts.report else text

    def find_facts(self, report: str = "", together: int = 1) -> Facts:
        """The facts, by reading all rows once for each of what is hashed."""
        digest, max_token = blake2b(digest_size=16), 0
        sizes = [int(x) for x in numpy.diff(self._starts)]
        for part, size in zip(self._parts, sizes, strict=True):
            tokens = part.tokens[0:size]
            digest.update(tokens.tobytes())
            max_token = max(max_token, int(tokens.max(initial=0)))
        for part, size in zip(self._parts, sizes, strict=True):
            digest.update(part.eligible[0:size].tobytes())
        digest.update(self._ends.tobytes())
        longest = int(numpy.diff(self._ends).max(initial=0))
        name = digest.hexdigest()
        return Facts(int(self._ends[-1]), longest, max_token, name, report, together)


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
