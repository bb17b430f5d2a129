"""A page that plays how texts were unmasked: each step, each token with its confidence."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

from mdm_plugin.generation.steps import Step
from mdm_plugin.models import ChatTokenizer

PAGE = Path(__file__).with_name("replay.html")
_PLACE = "REPLAY_DATA"  # of the data, in the page


class Replay(NamedTuple):
    """How one text was written.

    prompt: for a reader. text: as it is at the end. length: in tokens, those after its end too.
    steps: of each step that wrote something, in their order, [position, piece, name, confidence]
        of each token. The last pieces of all positions, in order, are the text: a token that has
        none is special, or the first part of a character. name: the token by itself. confidence:
        None for an EOS that another has written.
    """

    prompt: str
    text: str
    length: int
    steps: list[list[tuple[int, str, str, float | None]]]


class Recorder:
    """Keeps the steps of a batch, to make replays of. Its ``add`` is ``generate``'s on_step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Keep a step, on the CPU."""
        self.steps.append(Step(step.response.cpu(), step.put.cpu(), step.confidence.cpu()))

    def replays(self, tokenizer: ChatTokenizer, prompts: Sequence[str]) -> list[Replay]:
        """One for each row of the batch.

        Steps that wrote nothing in a row are not among its own: so a replay, as its text, is the
        same whatever else was in the batch.

        Args:
            tokenizer: of the text.
            prompts: one per row, for a reader.
        """
        return [self._replay(tokenizer, prompt, row) for row, prompt in enumerate(prompts)]

    def _replay(self, tokenizer: ChatTokenizer, prompt: str, row: int) -> Replay:
        final = self.steps[-1].response[row].tolist()
        last = _pieces(tokenizer, final)
        before, steps = torch.full((len(final),), tokenizer.mask_id), []
        for step in self.steps:
            response, put, confidence = (x[row] for x in step)
            written = []
            for place in (response != before).nonzero()[:, 0].tolist():
                token = int(response[place])
                alone = tokenizer.decode([token])
                piece = last[place] if token == final[place] else alone
                name = alone or str(tokenizer.tokenizer.id_to_token(token))
                sure = round(float(confidence[place]), 4) if put[place] else None
                written.append((place, piece, name, sure))
            if written:
                steps.append(written)
            before = response
        return Replay(prompt, tokenizer.decode(final), len(final), steps)


def _pieces(tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    """The text of ``ids``, cut at its tokens. A character of several is with its last one."""
    text, reached, pieces = tokenizer.decode(ids), 0, []
    for i in range(len(ids)):
        so_far = tokenizer.decode(ids[: i + 1])
        # Of a character whose last token is to come, the decoder shows a sign of its own.
        both = zip(so_far[reached:], text[reached:], strict=False)
        end = reached + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        pieces.append(text[reached:end])
        reached = end
    return pieces


def write_replays(file: Path, replays: Sequence[Replay]) -> None:
    """Write a page of its own, which needs nothing else, and no network.

    The data is JSON in ASCII, with no "<", ">" or "&": so no text of a model's can end its
    element.

    Raises:
        OSError: if the file cannot be written.
    """
    data = json.dumps([replay._asdict() for replay in replays])
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    file.write_text(PAGE.read_text(encoding="utf-8").replace(_PLACE, data, 1), encoding="utf-8")
