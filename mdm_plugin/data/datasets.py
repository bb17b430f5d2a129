"""Builders of data sets for the config's ``dataset``, with the arguments of torchtune's own.

Every row is tokenised before training begins, so that a bad one stops the run in its first
minute and not in its third day.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torchtune.data import (
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
    validate_messages,
)
from tqdm import tqdm

from mdm_plugin.data.rows import Rows
from mdm_plugin.data.sources import Invalid, read_rows
from mdm_plugin.errors import UserError
from mdm_plugin.models.tokenizer import ChatTokenizer

Policy = Literal["error", "skip"]
Tokens = tuple[list[int], list[bool]]  # ids, eligible


class _BadRow(Exception):
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
        self.file: Path | None = None
        if bad_rows_file is not None and os.environ.get("RANK", "0") == "0":
            self.file = Path(bad_rows_file).expanduser()
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text("")
            except OSError as error:
                raise UserError(f"bad_rows_file: {self.file}: {error.strerror}") from error

    def __call__(self, place: str, reason: str) -> None:
        """Leave out the row at ``place``, or raise a ``UserError``."""
        if not self.skip:
            raise UserError(f"{place}: {reason} (on_bad_row: skip to leave it out)")
        self.skipped += 1
        if self.file:
            with self.file.open("a") as file:
                file.write(json.dumps({"place": place, "reason": reason}) + "\n")
        if self.most is not None and self.skipped > self.most:
            raise UserError(f"{place}: {reason}: the bad row beyond max_bad_rows, {self.most}")


def chat_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str,
    data_files: str | list[str] | None = None,
    split: str = "train",
    conversation_column: str | None = None,
    conversation_style: Literal["openai", "sharegpt"] = "openai",
    new_system_prompt: str | None = None,
    train_on_input: bool = False,
    on_bad_row: Policy = "error",
    max_bad_rows: int | None = None,
    bad_rows_file: str | None = None,
    **load_dataset_kwargs: Any,
) -> Rows:
    """Conversations: {"messages": [{"role", "content"}, …]} or ShareGPT's {"from", "value"}.

    Every assistant turn is a response (eligible for masking); the rest is prompt.

    Args:
        tokenizer: renders the chat template.
        source, data_files, split, load_dataset_kwargs: see ``mdm_plugin.data.sources.read_rows``.
        conversation_column: column that holds the turns; None for "messages" or, in ShareGPT's
            style, "conversations".
        conversation_style: ``openai`` or ``sharegpt``.
        new_system_prompt: a system turn in place of each row's own.
        train_on_input: make the other turns eligible too.
        on_bad_row: ``error`` stops at a row that is not valid or has no response, with its
            place; ``skip`` leaves it out and reports how many.
        max_bad_rows: more than so many skipped ones stop the run too; None for any number.
        bad_rows_file: a file for the places and the reasons of those skipped, a JSON line each.

    Raises:
        UserError: on a source that cannot be read, or a bad row under ``error``.
    """
    styles = {
        "openai": (OpenAIToMessages, "messages", "role", "content"),
        "sharegpt": (ShareGPTToMessages, "conversations", "from", "value"),
    }
    if conversation_style not in styles:
        raise ValueError(f"conversation_style is {conversation_style!r}: use openai or sharegpt")
    transform, default, role, content = styles[conversation_style]
    column = conversation_column or default
    to_messages = transform(
        train_on_input=train_on_input,
        column_map={default: column},
        new_system_prompt=new_system_prompt,
    )

    def tokens(row: Mapping[str, Any]) -> Tokens:
        turns = row.get(column)
        if not isinstance(turns, list):
            raise _BadRow(f"no list {column!r} (columns: {', '.join(row)})")
        for i, turn in enumerate(turns):
            if not isinstance(turn, Mapping) or not all(
                isinstance(turn.get(k), str) for k in (role, content)
            ):
                raise _BadRow(f'{column}[{i}] is not {{"{role}": text, "{content}": text}}')
        return _tokenize(tokenizer, to_messages(row)["messages"])

    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    rows = read_rows(source, data_files, split, **load_dataset_kwargs)
    return _build(rows, tokens, tokenizer, policy)


def instruct_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str,
    data_files: str | list[str] | None = None,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    new_system_prompt: str | None = None,
    train_on_input: bool = False,
    on_bad_row: Policy = "error",
    max_bad_rows: int | None = None,
    bad_rows_file: str | None = None,
    **load_dataset_kwargs: Any,
) -> Rows:
    """Pairs of texts, one user turn and one assistant turn each.

    Args:
        column_map: names of the columns "input" and "output" where they differ.
        tokenizer, source, data_files, split, new_system_prompt, train_on_input, on_bad_row,
            max_bad_rows, bad_rows_file, load_dataset_kwargs: as in ``chat_dataset``.

    Raises:
        UserError: as ``chat_dataset``.
    """
    columns = {"input": "input", "output": "output", **(column_map or {})}
    to_messages = InputOutputToMessages(
        train_on_input=train_on_input, column_map=columns, new_system_prompt=new_system_prompt
    )

    def tokens(row: Mapping[str, Any]) -> Tokens:
        for column in (columns["input"], columns["output"]):
            if not isinstance(row.get(column), str):
                raise _BadRow(f"no text in {column!r} (columns: {', '.join(row)})")
        return _tokenize(tokenizer, to_messages(row)["messages"])

    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    rows = read_rows(source, data_files, split, **load_dataset_kwargs)
    return _build(rows, tokens, tokenizer, policy)


def text_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str,
    data_files: str | list[str] | None = None,
    split: str = "train",
    column: str = "text",
    packed: bool = False,
    on_bad_row: Policy = "error",
    max_bad_rows: int | None = None,
    bad_rows_file: str | None = None,
    **load_dataset_kwargs: Any,
) -> Rows:
    """Plain text, one document per row, all of it eligible: pretraining.

    Args:
        column: the column that holds the text.
        packed: join the documents, an EOS after each, and cut them into rows of
            ``tokenizer.max_seq_len`` tokens, as LLaDA's pretraining does: no token is lost or
            padded but in the last row, and documents of a row attend to each other.
        tokenizer, source, data_files, split, on_bad_row, max_bad_rows, bad_rows_file,
            load_dataset_kwargs: as in ``chat_dataset``.

    Raises:
        UserError: as ``chat_dataset``; if ``packed`` and the tokenizer has no ``max_seq_len``.
    """
    if packed and tokenizer.max_seq_len is None:
        raise UserError("dataset.packed: how long is a row? set tokenizer.max_seq_len")

    def tokens(row: Mapping[str, Any]) -> Tokens:
        if not isinstance(row.get(column), str):
            raise _BadRow(f"no text in {column!r} (columns: {', '.join(row)})")
        if not row[column]:
            raise _BadRow(f"{column!r} is empty")
        ids = [*tokenizer.encode(row[column]), tokenizer.eos_id]
        return ids, [True] * len(ids)

    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    rows = read_rows(source, data_files, split, **load_dataset_kwargs)
    return _build(rows, tokens, tokenizer, policy, packed)


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


def _tokenize(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> Tokens:
    try:
        validate_messages(list(messages))
    except ValueError as error:
        raise _BadRow(str(error)) from error
    responses = [m for m in messages if m.role == "assistant"]
    if not responses:
        raise _BadRow("no assistant turn: there is no response to learn")
    if not all(m.text_content.strip() for m in responses):
        raise _BadRow("an assistant turn is empty: there is no response to learn")
    ids, masked = tokenizer.tokenize_messages(list(messages))
    return ids, [not m for m in masked]


def _build(
    rows: Iterator[tuple[str, Any]],
    tokens: Callable[[Mapping[str, Any]], Tokens],
    tokenizer: ChatTokenizer,
    policy: BadRows,
    packed: bool = False,
) -> Rows:
    limit = tokenizer.max_seq_len
    read = cut_rows = cut_tokens = repeated = 0
    names: set[Any] = set()

    def good() -> Iterator[Tokens]:
        nonlocal read, cut_rows, cut_tokens, repeated
        quiet = os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
        for place, row in tqdm(rows, desc="Reading rows", unit=" rows", disable=quiet, leave=False):
            read += 1
            try:
                if isinstance(row, Invalid):
                    raise _BadRow(row.reason)
                if not isinstance(row, Mapping):
                    raise _BadRow(f"a row is an object with columns, not {type(row).__name__}")
                ids, eligible = tokens(row)
                if tokenizer.mask_id in ids:
                    raise _BadRow("the text holds the mask token itself")
                if limit is not None and len(ids) > limit and not packed:
                    if not any(eligible[:limit]):
                        raise _BadRow(
                            f"{len(ids)} tokens, and max_seq_len {limit} leaves none of its "
                            "response: raise tokenizer.max_seq_len"
                        )
                    cut_rows, cut_tokens = cut_rows + 1, cut_tokens + len(ids) - limit
                    ids, eligible = ids[:limit], eligible[:limit]
            except (_BadRow, ValueError, KeyError) as error:
                policy(place, str(error))
                continue
            name = row.get("id")
            if isinstance(name, str | int):
                repeated += name in names
                names.add(name)
            yield ids, eligible

    result = Rows(_pack(good(), limit) if packed and limit else good())
    if not len(result):
        raise UserError(f"all {read} rows were skipped: none is valid")
    report = []
    if repeated:
        report.append(f"{repeated} of {read} rows repeat the id of another")
    if policy.skipped:
        report.append(
            f"skipped {policy.skipped} of {read} rows that were not valid or had no response"
        )
    if cut_rows:
        report.append(
            f"cut {cut_rows} of {read} rows to {limit} tokens: {cut_tokens} tokens are lost"
        )
    result.report = "; ".join(report)
    return result
