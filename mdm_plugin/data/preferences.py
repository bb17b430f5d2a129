"""Preferences: two answers to one prompt, of which one is better."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchtune.data import Message

from mdm_plugin.data.cache import Tokens
from mdm_plugin.data.datasets import check_turns, tokenize
from mdm_plugin.data.reading import BadRow, BadRows, Policy, read_once
from mdm_plugin.data.rows import Rows
from mdm_plugin.data.sources import find_source
from mdm_plugin.models.tokenizer import ChatTokenizer

_KEYS = {"openai": ("role", "content"), "sharegpt": ("from", "value")}
_ROLES = {"human": "user", "gpt": "assistant"}


def preference_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str,
    data_files: str | list[str] | None = None,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    conversation_style: Literal["openai", "sharegpt"] = "openai",
    new_system_prompt: str | None = None,
    on_bad_row: Policy = "error",
    max_bad_rows: int | None = None,
    bad_rows_file: str | None = None,
    **load_dataset_kwargs: Any,
) -> Rows:
    """Preferences: row 2k is a preference's chosen answer, and row 2k + 1 the rejected one.

    A raw row has torchtune's conversations ``chosen`` and ``rejected``, lists of turns that differ
    in the last one alone; or a ``prompt``, a text or turns, and ``chosen`` and ``rejected``, texts.
    The last turn is the answer, all of it eligible for masking; what is before it is prompt.

    Args:
        column_map: names of the columns "prompt", "chosen" and "rejected" where they differ.
        conversation_style: of the turns: ``openai`` has role and content, ``sharegpt`` from and
            value.

    The other arguments are those of ``chat_dataset``.

    Raises:
        UserError: as ``chat_dataset``; on a row whose prompts differ, or whose answers are equal.
        ValueError: on an unknown ``conversation_style`` or column.
    """
    if conversation_style not in _KEYS:
        raise ValueError(f"conversation_style is {conversation_style!r}: use openai or sharegpt")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    if unknown := set(column_map or {}) - set(columns):
        raise ValueError(f"column_map has {sorted(unknown)[0]!r}: use prompt, chosen and rejected")
    columns |= column_map or {}
    keys = _KEYS[conversation_style]

    def tokens(row: Mapping[str, Any]) -> list[Tokens]:
        chosen, rejected = (_conversation(row, columns, x, keys) for x in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise BadRow(
                f"{columns['chosen']} and {columns['rejected']} differ before the last turn: both "
                "are to answer one prompt"
            )
        if chosen[-1] == rejected[-1]:
            raise BadRow(f"{columns['chosen']} and {columns['rejected']} are the same answer")
        return [_tokens(tokenizer, x, new_system_prompt) for x in (chosen, rejected)]

    options = {
        "kind": "preference",
        "together": 2,
        "columns": columns,
        "style": conversation_style,
        "new_system_prompt": new_system_prompt,
    }
    policy = BadRows(on_bad_row, max_bad_rows, bad_rows_file)
    found = find_source(source, data_files, split, **load_dataset_kwargs)
    return read_once(found, tokens, tokenizer, policy, options)


def _conversation(
    row: Mapping[str, Any], columns: Mapping[str, str], which: str, keys: tuple[str, str]
) -> list[tuple[str, str]]:
    """(role, text) of each turn, the last one the answer."""
    answer = row.get(columns[which])
    if isinstance(answer, list):
        turns = _turns(row, columns[which], keys)
        if len(turns) > 1 or not isinstance(row.get(columns["prompt"]), list):
            return turns
        return [*_turns(row, columns["prompt"], keys), *turns]
    if not isinstance(answer, str):
        raise BadRow(f"no conversation or text in {columns[which]!r} (columns: {', '.join(row)})")
    prompt = row.get(columns["prompt"])
    if isinstance(prompt, str):
        before = [("user", prompt)]
    elif isinstance(prompt, list):
        before = _turns(row, columns["prompt"], keys)
    else:
        raise BadRow(
            f"no prompt in {columns['prompt']!r}, which {columns[which]!r}, a text, would answer "
            f"(columns: {', '.join(row)})"
        )
    return [*before, ("assistant", answer)]


def _turns(row: Mapping[str, Any], column: str, keys: tuple[str, str]) -> list[tuple[str, str]]:
    role, content = keys
    check_turns(row, column, role, content)
    return [(_ROLES.get(turn[role], turn[role]), turn[content]) for turn in row[column]]


def _tokens(tokenizer: ChatTokenizer, turns: list[tuple[str, str]], system: str | None) -> Tokens:
    """The conversation's tokens; what is eligible is the last turn."""
    if not turns or turns[-1][0] != "assistant":
        raise BadRow("the last turn is not an assistant's: there is no answer to compare")
    if system is not None:
        turns = [("system", system), *(x for x in turns if x[0] != "system")]
    messages = [Message(role=role, content=text, masked=True) for role, text in turns[:-1]]
    messages.append(Message(role="assistant", content=turns[-1][1], masked=False))
    return tokenize(tokenizer, messages)


def paired(
    turns: Sequence[Mapping[str, str]], answers: Sequence[str], right: Sequence[bool]
) -> list[dict[str, Any]]:
    """Preferences of a prompt's answers, each of a right one over a wrong one: raw rows for
    ``preference_dataset``.

    Equal answers count once, empty ones not at all. The first right one is set beside the first
    wrong one, and so on: as many rows as the rarer kind has answers.

    Args:
        turns: the prompt's, {"role", "content"} each.
        answers, right: texts, and which of them are right.
    """
    kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for answer, is_right in zip(answers, right, strict=True):
        if answer.strip():
            kinds[bool(is_right)].setdefault(answer)
    before = [dict(turn) for turn in turns]
    return [
        {
            name: [*before, {"role": "assistant", "content": text}]
            for name, text in (("chosen", good), ("rejected", bad))
        }
        for good, bad in zip(kinds[True], kinds[False], strict=False)
    ]
