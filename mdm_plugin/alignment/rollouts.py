"""Answers that the model samples while it is trained, and what is scored of them."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.data.batches import Batch
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.noise import seed_of


class Rollout(NamedTuple):
    """This rank's answers of a step, G to each prompt, in micro-batches.

    batches: prompts with answers, as rows. texts, prompts: of each micro-batch, one for each row.
    tokens: written in answers, up to their ends. finished: share of answers with an end. seconds:
    it took.
    """

    batches: list[Batch]
    texts: list[list[str]]
    prompts: list[list[Prompt]]
    tokens: int
    finished: float
    seconds: float


def roll_out(
    model: MDMTransformer,
    tokenizer: ChatTokenizer,
    micro_batches: Sequence[tuple[list[Prompt], Tensor]],
    group: int,
    decoding: Decoding,
    max_new_tokens: int,
    world: World,
    key: tuple[int | str, ...],
) -> Rollout:
    """Sample G answers to each prompt. Called on every rank, each with its own prompts.

    An answer's noise is a function of (key, place of its prompt, its number): the same whichever
    rank writes it, and beside whichever others.

    Args:
        micro_batches: prompts, and their places [P] among those of the step.
        group: G.
        key: of the noise, e.g. ``(seed, "rollout", step)``.
    """
    start, training = time.perf_counter(), model.training
    model.eval()
    batches, texts, asked, tokens, ends = [], [], [], 0, 0
    with uneven_forwards(model, world):
        for prompts, places in micro_batches:
            rows = [x for x in prompts for _ in range(group)]
            at = (places[:, None] * group + torch.arange(group)).flatten()
            written = generate(
                model,
                [x.ids for x in rows],
                decoding,
                special=tokenizer,
                max_new_tokens=max_new_tokens,
                seeds=[seed_of(*key, place) for place in at.tolist()],
            ).tokens.cpu()
            answers = [_to_its_end(x, tokenizer.eos_id) for x in written]
            ends += sum(int(x[-1] == tokenizer.eos_id) for x in answers)
            tokens += sum(len(x) for x in answers)
            batches.append(_rows(rows, answers, at, tokenizer.pad_id))
            texts.append([tokenizer.decode(x.tolist()) for x in answers])
            asked.append(rows)
    model.train(training)
    count = max(1, sum(len(x) for x in texts))
    return Rollout(batches, texts, asked, tokens, ends / count, time.perf_counter() - start)


def _to_its_end(tokens: Tensor, eos: int) -> Tensor:
    """An answer up to its first EOS, with that."""
    ends = (tokens == eos).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


def _rows(prompts: Sequence[Prompt], answers: Sequence[Tensor], places: Tensor, pad: int) -> Batch:
    length = max(len(x.ids) + len(y) for x, y in zip(prompts, answers, strict=True))
    tokens = torch.full((len(answers), length), pad)
    eligible, real = torch.zeros(2, len(answers), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, end = len(prompt.ids), len(prompt.ids) + len(answer)
        tokens[i, :first], tokens[i, first:end] = torch.tensor(prompt.ids), answer
        eligible[i, first:end], real[i, :end] = True, True
    u = torch.full((len(answers), length), math.nan, dtype=torch.float64)  # each draw has its own
    return Batch(tokens, eligible, real[:, None], u, places)
