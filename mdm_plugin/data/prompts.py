"""Prompts to generate from: one on the command line, a file of them, or stdin."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mdm_plugin.data.sources import Invalid, read_rows
from mdm_plugin.errors import UserError
from mdm_plugin.models.tokenizer import ChatTokenizer


class Prompt(NamedTuple):
    """A prompt, tokenised.

    place: file and line. row: what the output line begins with. ids: of the rendered prompt.
    text: its turns for a reader, without the template; of ``read_prompts`` alone.
    turns: as they were rendered; empty for a text to be continued; of ``read_prompts`` alone.
    """

    place: str
    row: dict[str, Any]
    ids: list[int]
    text: str = ""
    turns: tuple[Mapping[str, str], ...] = ()


def read_prompts(
    tokenizer: ChatTokenizer,
    prompt: str | None = None,
    prompts: str | None = None,
    system_prompt: str | None = None,
    chat: bool = True,
) -> list[Prompt]:
    """The prompts, tokenised.

    Args:
        tokenizer: renders the chat template.
        prompt: a single one.
        prompts: a file of them: .jsonl, .json or .parquet rows with ``prompt`` or ``messages``
            (a last assistant turn is left out), any other file a prompt per line; ``-`` for stdin,
            a prompt per line.
        system_prompt: a system turn before each ``prompt``.
        chat: each is a user's turn; False for text to be continued.

    Raises:
        UserError: unless one of ``prompt`` and ``prompts`` is given; on a file that is missing or
            empty, or a row that is no prompt, with its place.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('prompt, prompts: give one of them: prompt="text", or prompts=file')
    rows = [("prompt", prompt)] if prompts is None else _read(prompts)
    found = []
    for place, row in rows:
        if isinstance(row, Invalid):
            raise UserError(f"{place}: {row.reason}")
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: a row is an object with prompt or messages")
        turns = _turns(row, place, system_prompt, chat)
        ids = tokenizer.encode(turns) if isinstance(turns, str) else tokenizer.prompt(turns)
        if tokenizer.mask_id in ids:
            raise UserError(f"{place}: the prompt holds the mask token itself")
        kept = () if isinstance(turns, str) else tuple(turns)
        found.append(Prompt(place, dict(row), ids, _shown(turns), kept))
    if not found:
        raise UserError(f"prompts: {prompts} has no prompts")
    return found


def _read(prompts: str) -> Iterator[tuple[str, Any]]:
    if prompts == "-":
        lines, name = sys.stdin.read().splitlines(), "stdin"
    elif Path(prompts).suffix in (".jsonl", ".json", ".ndjson", ".parquet"):
        yield from read_rows(prompts)
        return
    else:
        file, name = Path(prompts).expanduser(), prompts
        if not file.is_file():
            raise UserError(f"prompts: {file} does not exist")
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"prompts: {file} is not UTF-8 text: {error.reason}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}:{number}", line


def _turns(
    row: Mapping[str, Any], place: str, system_prompt: str | None, chat: bool
) -> list[Mapping[str, str]] | str:
    """The turns that the model answers, or a text that it goes on from."""
    messages, text = row.get("messages"), row.get("prompt")
    if messages is None:
        if not isinstance(text, str) or not text:
            raise UserError(f"{place}: no text in 'prompt', and no 'messages'")
        if not chat:
            return text
        messages = [{"role": "user", "content": text}]
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
    turns = list(messages) if isinstance(messages, list) else []
    if turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if not turns or not all(
        isinstance(x, Mapping) and isinstance(x.get("content"), str) and x.get("role")
        for x in turns
    ):
        raise UserError(f'{place}: messages is not a list of {{"role", "content"}} turns')
    return turns


def _shown(turns: list[Mapping[str, str]] | str) -> str:
    """For a reader: who says what, where more than one turn is there."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
