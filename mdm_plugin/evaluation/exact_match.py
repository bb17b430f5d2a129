"""Right answers, counted by a verifier."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from mdm_plugin.data.prompts import Prompt
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer


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
    """95 % score interval of a share (Wilson 1927), scipy's."""
    from scipy.stats import binomtest  # it takes half a second, and few need it

    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def exact_match(
    model: MDMTransformer,
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
        model, tokenizer: what answers.
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
        written = generate(
            model,
            [prompt.ids for prompt in batch],
            decoding,
            special=tokenizer,
            max_new_tokens=max_new_tokens,
            seeds=range(start, start + len(batch)),
        )
        completions += [tokenizer.decode(ids) for ids in written.tokens.tolist()]
    right = sum(bool(verify(text, x.row)) for text, x in zip(completions, prompts, strict=True))
    return ExactMatch(right, len(prompts), completions)
