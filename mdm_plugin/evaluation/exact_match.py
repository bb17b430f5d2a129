"""Right answers, counted by a verifier."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from tqdm import tqdm

from mdm_plugin.data.prompts import Prompt
from mdm_plugin.generation import Decoding, complete
from mdm_plugin.models.tokenizer import ChatTokenizer


class ExactMatch(NamedTuple):
    """correct of total rows, and each row's completion."""

    correct: int
    total: int
    completions: list[str]

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the accuracy."""
        return wilson(self.correct, self.total)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927)."""
    z, n, p = 1.959964, total, correct / total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def exact_match(
    model: nn.Module,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    verify: Callable[[str, Mapping[str, Any]], bool],
    *,
    max_new_tokens: int,
    batch_size: int,
    decoding: Decoding | None = None,
    progress: str | None = None,
) -> ExactMatch:
    """Generate an answer to each prompt and verify it.

    Args:
        model: an ``MDMTransformer``.
        tokenizer: its tokenizer.
        prompts: of ``read_prompts``, with their rows.
        verify: (completion, row) → whether it is right.
        max_new_tokens, decoding: see ``mdm_plugin.generation.generate``.
        batch_size: prompts per forward.
        progress: label of a progress bar; None for none.
    """
    model.eval()
    completions: list[str] = []
    for start in tqdm(
        range(0, len(prompts), batch_size), desc=progress, disable=progress is None, leave=False
    ):
        batch = prompts[start : start + batch_size]
        written = complete(
            model,
            tokenizer,
            [prompt.ids for prompt in batch],
            decoding,
            max_new_tokens=max_new_tokens,
            seeds=range(start, start + len(batch)),
        )
        completions += [tokenizer.decode(ids) for ids in written.tokens.tolist()]
    right = sum(bool(verify(text, x.row)) for text, x in zip(completions, prompts, strict=True))
    return ExactMatch(right, len(prompts), completions)
