"""Answers that the model samples while it is trained, and what is scored of them."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdm_plugin.alignment.bounds import everywhere
from mdm_plugin.alignment.rewards import Reward, reward_answers
from mdm_plugin.data.batches import Batch, GlobalBatches, Padding
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World
from mdm_plugin.generation import Decoding, Moments, cache_gap, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.noise import keyed_uniform, seed_of


class Rollout(NamedTuple):
    """This rank's answers of a step, G to each prompt, in micro-batches.

    batches: prompts with answers, as rows. texts, prompts: of each micro-batch, one for each row.
    tokens: written in answers, up to their ends. finished: share of answers with an end. seconds:
    it took. cache_gap: mean of ``generation.cache_gap`` over the answers, at a token of each that
    is drawn evenly; None without a cache.
    """

    batches: list[Batch]
    texts: list[list[str]]
    prompts: list[list[Prompt]]
    tokens: int
    finished: float
    seconds: float
    cache_gap: float | None

    def markdown(self, rewards: Tensor, most: int = 4) -> str:
        """The answers to this rank's first prompts, ``most`` or fewer, each with its reward.

        rewards: [S], of all ranks' answers by their places.
        """
        shown: dict[str, str] = {}
        answers = zip(self.prompts[0], self.texts[0], self.batches[0].places, strict=True)
        for prompt, answer, place in answers:
            head = "**prompt**\n\n    " + prompt.text.replace("\n", "\n    ")
            text = f"**{float(rewards[place]):g}**\n\n    " + answer.replace("\n", "\n    ")
            shown[prompt.place] = shown.get(prompt.place, head) + "\n\n" + text
        return "\n\n---\n\n".join(list(shown.values())[:most])

    def figures(self, size: int, world: World) -> dict[str, float]:
        """What is shown of ``size`` answers of all ranks."""
        facts = [self.tokens, self.finished, self.seconds, self.cache_gap or 0.0]
        tokens, finished, seconds, gap = world.sum(torch.tensor(facts)).tolist()
        found = {
            "rollout/length": tokens / size,
            "rollout/finished": finished / world.size,
            "rollout/seconds": seconds / world.size,
            "rollout/tokens_per_second": tokens / max(seconds / world.size, 1e-9),
        }
        return found if self.cache_gap is None else {**found, "rollout/cache_gap": gap / world.size}


class Writing(NamedTuple):
    """group: G, answers to a prompt. decoding, max_new_tokens: of each."""

    group: int
    decoding: Decoding
    max_new_tokens: int


def asked(
    prompts: Sequence[Prompt], batches: GlobalBatches, step: int
) -> list[tuple[list[Prompt], Tensor]]:
    """The prompts of this rank's micro-batches of a step, and their places [P]."""
    numbers = batches.row_indices(step)
    return [([prompts[i] for i in numbers[x].tolist()], x) for x in batches.places(step)]


def roll_out(
    model: MDMTransformer,
    tokenizer: ChatTokenizer,
    micro_batches: Sequence[tuple[list[Prompt], Tensor]],
    how: Writing,
    padding: Padding,
    world: World,
    key: tuple[int | str, ...],
) -> Rollout:
    """Sample G answers to each prompt. Called on every rank, each with its own prompts.

    An answer's noise is a function of (key, place of its prompt, its number): the same whichever
    rank writes it, and beside whichever others.

    Args:
        micro_batches: prompts, and their places [P] among those of the step.
        how: G, and how answers are written.
        padding: of the rows of prompts with answers.
        key: of the noise, e.g. ``(seed, "rollout", step)``.
    """
    start, training, group = time.perf_counter(), model.training, how.group
    model.eval()
    batches, texts, asked, gaps, tokens, ends = [], [], [], [], 0, 0
    with uneven_forwards(model, world):
        for prompts, places in micro_batches:
            rows = [x for x in prompts for _ in range(group)]
            at = (places[:, None] * group + torch.arange(group)).flatten()
            answers, gap = _write(model, tokenizer, [x.ids for x in rows], at, how, key)
            gaps.append(gap)
            ends += sum(int(x[-1] == tokenizer.eos_id) for x in answers)
            tokens += sum(len(x) for x in answers)
            batches.append(_rows(rows, answers, at, padding))
            texts.append([tokenizer.decode(x.tolist()) for x in answers])
            asked.append(rows)
    model.train(training)
    count = max(1, sum(len(x) for x in texts))
    mean = float(torch.cat(gaps).mean()) if approximate(model, how.decoding) else None
    return Rollout(batches, texts, asked, tokens, ends / count, time.perf_counter() - start, mean)


def approximate(model: MDMTransformer, decoding: Decoding) -> bool:
    """Whether text is written by an approximation of the model: with a cache, unless the model
    writes block by block, whose cache is exact."""
    return decoding.cache is not None and model.block_length is None


def _write(
    model: MDMTransformer,
    tokenizer: ChatTokenizer,
    prompts: list[list[int]],
    places: Tensor,
    how: Writing,
    key: tuple[int | str, ...],
) -> tuple[list[Tensor], Tensor]:
    """An answer to each prompt, up to its end; and where that is ``approximate`` the gap at a token
    of each, [R]."""
    moments = Moments()
    written = generate(
        model,
        prompts,
        how.decoding,
        special=tokenizer,
        max_new_tokens=how.max_new_tokens,
        seeds=[seed_of(*key, place) for place in places.tolist()],
        on_step=moments.add if approximate(model, how.decoding) else None,
    ).tokens.cpu()
    answers = [_to_its_end(x, tokenizer.eos_id) for x in written]
    if not approximate(model, how.decoding):
        return answers, torch.zeros(0)
    u = keyed_uniform(*key, "gap", places=places, length=1)[:, 0]
    chosen = (u * torch.tensor([len(x) for x in answers])).long()
    return answers, cache_gap(model, prompts, moments, chosen, how.decoding, tokenizer)


def rewarded(
    rollout: Rollout, rewards: Sequence[Reward], timeout: float, size: int, world: World
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """What the answers of all ranks are worth, by their places: [size], the whole and its parts;
    and where there is none, the line of the prompt and what happened. As ``reward_answers``."""
    found = [
        reward_answers(rewards, texts, [x.row for x in prompts], timeout)
        for texts, prompts in zip(rollout.texts, rollout.prompts, strict=True)
    ]
    failures = [
        f"{prompts[row].place}: {line}"
        for prompts, part in zip(rollout.prompts, found, strict=True)
        for row, line in part.failures
    ]
    places = [x.places for x in rollout.batches]
    total = everywhere([x.total for x in found], places, size, world)
    parts = {
        x.name: everywhere([part.parts[x.name] for part in found], places, size, world)
        for x in rewards
    }
    return total, parts, [line for lines in world.gather(failures) for line in lines]


def chosen_rows(batch: Batch, chosen: Tensor) -> Batch:
    """The rows at ``chosen`` places ([S], bool) of the step; where there are none the first one,
    as all ranks are to have as many forwards."""
    rows = chosen[batch.places].nonzero()[:, 0]
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
    attend = None if batch.attend is None else batch.attend[rows]
    return Batch(
        batch.tokens[rows], batch.eligible[rows], attend, batch.u[rows], batch.places[rows]
    )


def _to_its_end(tokens: Tensor, eos: int) -> Tensor:
    """An answer up to its first EOS, with that."""
    ends = (tokens == eos).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


def _rows(
    prompts: Sequence[Prompt], answers: Sequence[Tensor], places: Tensor, padding: Padding
) -> Batch:
    longest = max(len(x.ids) + len(y) for x, y in zip(prompts, answers, strict=True))
    length = padding.length(longest)
    tokens = torch.full((len(answers), length), padding.pad_id)
    eligible, real = torch.zeros(2, len(answers), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, end = len(prompt.ids), len(prompt.ids) + len(answer)
        tokens[i, :first], tokens[i, first:end] = torch.tensor(prompt.ids), answer
        eligible[i, first:end], real[i, :end] = True, True
    u = torch.full((len(answers), length), math.nan, dtype=torch.float64)  # each draw has its own
    return Batch(tokens, eligible, real[:, None], u, places)
