"""Builders of data sets for the config's ``dataset``, with the arguments of torchtune's own.

Every row is tokenised before training begins, so that a bad one stops the run in its first
minute and not in its third day; once, into a file (``mdm_plugin.data.cache``).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchtune.data import (
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
    validate_messages,
)

from mdm_plugin.data.cache import Tokens
from mdm_plugin.data.reading import BadRow, BadRows, Policy, read_once
from mdm_plugin.data.rows import Rows
from mdm_plugin.data.sources import find_source
from mdm_plugin.errors import UserError
from mdm_plugin.models.tokenizer import ChatTokenizer

_STYLES: dict[str, tuple[Any, str, str, str]] = {
    "openai": (OpenAIToMessages, "messages", "role", "content"),
    "sharegpt": (ShareGPTToMessages, "conversations", "from", "value"),
}


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
        source, data_files, split, load_dataset_kwargs: see ``mdm_plugin.data.sources.find_source``.
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
    if conversation_style not in _STYLES:
        raise ValueError(f"conversation_style is {conversation_style!r}: use openai or sharegpt")
    transform, default, role, content = _STYLES[conversation_style]
    column = conversation_column or default
    to_messages = transform(
        train_on_input=train_on_input,
        column_map={default: column},
        new_system_prompt=new_system_prompt,
    )

    def tokens(row: Mapping[str, Any]) -> list[Tokens]:
        check_turns(row, column, role, content)
        return [tokenize(tokenizer, to_messages(row)["messages"])]

    options = {
        "kind": "chat",
        "column": column,
        "style": conversation_style,
        "new_system_prompt": new_system_prompt,
        "train_on_input": train_on_input,
    }
    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    found = find_source(source, data_files, split, **load_dataset_kwargs)
    return read_once(found, tokens, tokenizer, policy, options)


def check_turns(row: Mapping[str, Any], column: str, role: str, content: str) -> None:
    """Check that a row's column holds turns.

    Raises:
        BadRow: if not.
    """
    turns = row.get(column)
    if not isinstance(turns, list):
        raise BadRow(
            f"no list {column!r} (columns: {', '.join(row)}); pairs of texts go by instruct_dataset"
        )
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(k), str) for k in (role, content)
        ):
            raise BadRow(f'{column}[{i}] is not {{"{role}": text, "{content}": text}}')


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

    The other arguments are those of ``chat_dataset``.

    Raises:
        UserError: as ``chat_dataset``.
    """
    columns = {"input": "input", "output": "output", **(column_map or {})}
    to_messages = InputOutputToMessages(
        train_on_input=train_on_input, column_map=columns, new_system_prompt=new_system_prompt
    )

    def tokens(row: Mapping[str, Any]) -> list[Tokens]:
        for column in (columns["input"], columns["output"]):
            if not isinstance(row.get(column), str):
                raise BadRow(f"no text in {column!r} (columns: {', '.join(row)})")
        return [tokenize(tokenizer, to_messages(row)["messages"])]

    options = {
        "kind": "instruct",
        "columns": columns,
        "new_system_prompt": new_system_prompt,
        "train_on_input": train_on_input,
    }
    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    found = find_source(source, data_files, split, **load_dataset_kwargs)
    return read_once(found, tokens, tokenizer, policy, options)


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

    The other arguments are those of ``chat_dataset``.

    Raises:
        UserError: as ``chat_dataset``; if ``packed`` and the tokenizer has no ``max_seq_len``.
    """
    if packed and tokenizer.max_seq_len is None:
        raise UserError("dataset.packed: how long is a row? set tokenizer.max_seq_len")

    def tokens(row: Mapping[str, Any]) -> list[Tokens]:
        if not isinstance(row.get(column), str):
            raise BadRow(f"no text in {column!r} (columns: {', '.join(row)})")
        if not row[column]:
            raise BadRow(f"{column!r} is empty")
        ids = [*tokenizer.encode(row[column]), tokenizer.eos_id]
        return [(ids, [True] * len(ids))]

    options = {"kind": "text", "column": column, "packed": packed}
    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    found = find_source(source, data_files, split, **load_dataset_kwargs)
    return read_once(found, tokens, tokenizer, policy, options)


def tokenize(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> Tokens:
    """A conversation's tokens, and which are a response's.

    Raises:
        BadRow: if the turns are not in order, or a response is missing or empty.
    """
    try:
        validate_messages(list(messages))
    except ValueError as error:
        raise BadRow(str(error)) from error
    responses = [m for m in messages if m.role == "assistant"]
    if not responses:
        raise BadRow("no assistant turn: there is no response to learn")
    if not all(m.text_content.strip() for m in responses):
        raise BadRow("an assistant turn is empty: there is no response to learn")
    ids, masked = tokenizer.tokenize_messages(list(messages))
    return ids, [not m for m in masked]
