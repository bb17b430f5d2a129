"""Right answers, counted by a verifier."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation.sharing import Request, complete
from mdm_plugin.generation import Decoding
from mdm_plugin.models import ChatTokenizer, MDMTransformer


class Questions(NamedTuple):
    """Prompts to be answered, and what tells from (completion, row) whether an answer is right."""

    prompts: list[Prompt]
    verify: Callable[[str, Mapping[str, Any]], bool]


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
    questions: Questions,
    world: World,
    *,
    max_new_tokens: int,
    batch_size: int,
    decoding: Decoding | None = None,
    progress: str | None = None,
) -> ExactMatch:
    """Generate an answer to each question and verify it; each rank does its share of both.

    Args:
        model, tokenizer: what answers; under FSDP2, called alike on every rank.
        questions: prompts of ``read_prompts``, with their rows.
        world: the ranks that share them.
        max_new_tokens, decoding: see ``mdm_plugin.generation.generate``.
        batch_size: prompts per forward.
        progress: label of a progress bar; None for none.
    """
    model.eval()
    requests = [Request(x.ids, max_new_tokens, i) for i, x in enumerate(questions.prompts)]
    written = complete(
        model, tokenizer, requests, decoding or Decoding(), world, batch_size, progress
    )
    completions = [tokenizer.decode(ids) for ids in written]
    own = range(world.rank, len(requests), world.size)
    right = sum(bool(questions.verify(completions[i], questions.prompts[i].row)) for i in own)
    correct = int(world.sum(torch.tensor(right)))
    return ExactMatch(correct, len(requests), completions)
