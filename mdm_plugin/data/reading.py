"""Raw rows become tokens: which are valid, what is done with the others, and what is reported."""

import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
from tqdm import tqdm

from mdm_plugin.data.cache import Tokens, cached
from mdm_plugin.data.rows import Rows
from mdm_plugin.data.sources import Invalid, Source
from mdm_plugin.errors import UserError
from mdm_plugin.models.tokenizer import ChatTokenizer

Policy = Literal["error", "skip"]


class BadRow(Exception):
    pass


class BadRows:
    """What is done with rows that are not valid: ``chat_dataset``'s arguments of these names.

    Raises:
        ValueError: on an unknown ``on_bad_row``, or a ``max_bad_rows`` below 0.
        UserError: if ``bad_rows_file`` cannot be written.
    """

    def __init__(
        self, on_bad_row: Policy, max_bad_rows: int | None, bad_rows_file: str | None
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}: use error or skip")
        if max_bad_rows is not None and max_bad_rows < 0:
            raise ValueError(f"max_bad_rows is {max_bad_rows}: use 0 or more, or null")
        self.skip, self.most, self.skipped = on_bad_row == "skip", max_bad_rows, 0
        self.kept: Path | None = None  # where they are listed while rows are read
        self.file = Path(bad_rows_file).expanduser() if bad_rows_file else None
        self.identity = {"on_bad_row": on_bad_row, "max_bad_rows": max_bad_rows}
        self.publish()  # cannot be written? known before anything is read

    def __call__(self, place: str, reason: str) -> None:
        """Leave out the row at ``place``, or raise a ``UserError``."""
        reason = " ".join(reason.split())  # a column's name may hold line breaks
        if not self.skip:
            raise UserError(f"{place}: {reason} (on_bad_row: skip to leave it out)")
        self.skipped += 1
        if self.kept:
            with self.kept.open("a") as file:
                file.write(json.dumps({"place": place, "reason": reason}) + "\n")
        if self.most is not None and self.skipped > self.most:
            self.publish()
            raise UserError(f"{place}: {reason}: the bad row beyond max_bad_rows, {self.most}")

    def publish(self) -> None:
        """Copy the list of them to ``bad_rows_file``, on rank 0."""
        if self.file is None or os.environ.get("RANK", "0") != "0":
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(self.kept.read_text() if self.kept else "")
        except OSError as error:
            raise UserError(f"bad_rows_file: {self.file}: {error.strerror}") from error


def _pack(documents: Iterator[Tokens], length: int) -> Iterator[Tokens]:
    """Documents end to end, in rows of ``length`` tokens; the last may be shorter."""
    rest: list[int] = []
    for ids, _ in documents:
        rest += ids
        whole = len(rest) // length * length
        for start in range(0, whole, length):
            yield rest[start : start + length], [True] * length
        rest = rest[whole:]
    if rest:
        yield rest, [True] * len(rest)


def read_once(
    source: Source,
    tokens: Callable[[Mapping[str, Any]], Sequence[Tokens]],
    tokenizer: ChatTokenizer,
    policy: BadRows,
    options: dict[str, Any],
) -> Rows:
    """The rows of a source, tokenised now or at an earlier start.

    tokens: of a raw row, as many rows each time: 1, or 2 that belong together (``Facts.together``).
    options: what ``tokens`` depends on besides the tokenizer; ``together``, if that is not 1.

    Raises:
        UserError: on a bad row, by the policy; on a tokenizer that is no ``ChatTokenizer``.
    """
    if not isinstance(tokenizer, ChatTokenizer):
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} is no ChatTokenizer: derive it from "
            "mdm_plugin.models.ChatTokenizer"
        )

    def read(bad: Path) -> tuple[Iterator[Tokens], Callable[[], str]]:
        bad.write_text("")
        policy.kept = bad
        reader = Reader(tokens, tokenizer, policy, bool(options.get("packed")))
        return reader.rows(source), reader.report

    identity = {
        "source": source.identity,
        "tokenizer": tokenizer.identity(),
        "options": options,
        **policy.identity,
    }
    rows, policy.kept = cached(identity, read, options.get("together", 1))
    policy.publish()
    return rows


class Reader:
    """Tokenises the rows of a source, one after another, and counts what is noteworthy."""

    def __init__(
        self,
        tokens: Callable[[Mapping[str, Any]], Sequence[Tokens]],
        tokenizer: ChatTokenizer,
        policy: BadRows,
        packed: bool,
    ) -> None:
        self.tokens, self.tokenizer, self.policy, self.packed = tokens, tokenizer, policy, packed
        self.limit = tokenizer.max_seq_len
        self.seen = self.cut_rows = self.cut_tokens = 0
        self.names = array("q")  # a hash of each row's id: eight bytes a row

    def rows(self, source: Source) -> Iterator[Tokens]:
        """The valid rows; packed to the limit where that is wanted."""
        good = self._good(source)
        yield from _pack(good, self.limit) if self.packed and self.limit else good
        if self.seen == self.policy.skipped:
            raise UserError(f"all {self.seen} rows were skipped: none is valid")

    def _good(self, source: Source) -> Iterator[Tokens]:
        quiet = not sys.stderr.isatty()
        bar = tqdm(source.rows(), desc="Reading rows", unit=" rows", disable=quiet, leave=False)
        try:
            for place, row in bar:
                self.seen += 1
                try:
                    found = self._one(row)
                except (BadRow, ValueError, KeyError) as error:
                    self.policy(place, str(error))
                else:
                    yield from found
        except OSError as error:
            raise UserError(
                f"source: cannot be read after {self.seen} rows: {error.strerror or error}"
            ) from error

    def _one(self, row: Any) -> list[Tokens]:
        if isinstance(row, Invalid):
            raise BadRow(row.reason)
        if not isinstance(row, Mapping):
            raise BadRow(f"a row is an object with columns, not {type(row).__name__}")
        whole = self.tokens(row)
        found = [self._cut(ids, eligible) for ids, eligible in whole]
        if len(found) > 1 and found[0] == found[1]:
            raise BadRow(f"both answers are the same in the first {self.limit} tokens")
        lost = [len(ids) - len(kept) for (ids, _), (kept, _) in zip(whole, found, strict=True)]
        self.cut_rows, self.cut_tokens = self.cut_rows + any(lost), self.cut_tokens + sum(lost)
        name = row.get("id")
        if isinstance(name, str | int):
            self.names.append(hash((type(name), name)))
        return found

    def _cut(self, ids: list[int], eligible: list[bool]) -> Tokens:
        """Up to the longest row; packed text is cut later, and loses nothing."""
        if self.tokenizer.mask_id in ids:
            raise BadRow("the text holds the mask token itself")
        limit = self.limit
        if limit is None or len(ids) <= limit or self.packed:
            return ids, eligible
        if not any(eligible[:limit]):
            raise BadRow(
                f"{len(ids)} tokens, and max_seq_len {limit} leaves none of its "
                "response: raise tokenizer.max_seq_len"
            )
        return ids[:limit], eligible[:limit]

    def report(self) -> str:
        """One line on what was cut, left out or repeated; empty if nothing."""
        found, skipped = [], self.policy.skipped
        if repeated := len(self.names) - len(numpy.unique(numpy.frombuffer(self.names, "int64"))):
            found.append(f"{repeated} of {self.seen} rows repeat the id of another")
        if skipped:
            found.append(
                f"skipped {skipped} of {self.seen} rows that were not valid or had no response"
            )
        if self.cut_rows:
            found.append(
                f"cut {self.cut_rows} of {self.seen} rows to {self.limit} tokens: "
                f"{self.cut_tokens} tokens are lost"
            )
        return "; ".join(found)
