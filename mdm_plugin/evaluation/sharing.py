"""Work that the ranks share: batches of like length, and responses to be written."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World
from mdm_plugin.generation import Decoding, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer

T = TypeVar("T")


class Request(NamedTuple):
    """Text to be written. prompt: token ids. length: of the response. seed: of its noise."""

    prompt: Sequence[int]
    length: int
    seed: int


def share(lengths: Sequence[int], batch_size: int, world: World) -> list[list[int]]:
    """This rank's batches of items, by their numbers.

    Items of like length are together, so that little is padding; the longest come first, so that
    memory runs out at once or not at all. Batches have ``batch_size`` items or fewer: as many for
    each rank, and of one size, as the items allow.

    Args:
        lengths: of each item, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rounds = max(1, math.ceil(len(order) / (batch_size * world.size)))
    size = max(1, math.ceil(len(order) / (rounds * world.size)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches[world.rank :: world.size]


def in_shares(
    work: Callable[[list[int]], Sequence[T]],
    batches: Sequence[list[int]],
    model: MDMTransformer,
    world: World,
    progress: str | None = None,
) -> list[T]:
    """``work`` on each rank's own batches; the results of all, in the items' order, on every rank.

    Args:
        work: a batch's items, by number → their results.
        batches: this rank's, of ``share``.
        model: what ``work`` runs; it may be sharded.
        progress: label of a progress bar; None for none.
    """
    found: dict[int, T] = {}
    quiet = progress is None or world.rank != 0
    with uneven_forwards(model, world):
        for batch in tqdm(batches, desc=progress, unit="batch", disable=quiet, leave=False):
            found.update(zip(batch, work(batch), strict=True))
    for others in world.gather(found):
        found |= others
    return [found[i] for i in sorted(found)]


def complete(
    model: MDMTransformer,
    tokenizer: ChatTokenizer,
    requests: Sequence[Request],
    decoding: Decoding,
    world: World,
    batch_size: int,
    progress: str | None = None,
) -> list[list[int]]:
    """Token ids of the response to each request, on every rank; each rank writes its share.

    Args:
        model: in eval mode; it may be sharded.
        decoding: for responses of each of the lengths asked for.
        batch_size, progress: as in ``share`` and ``in_shares``.
    """
    batches = []
    for length in sorted({x.length for x in requests}, reverse=True):
        like = [i for i, x in enumerate(requests) if x.length == length]
        own = share([len(requests[i].prompt) for i in like], batch_size, world)
        batches += [[like[i] for i in batch] for batch in own]

    def write(batch: list[int]) -> list[list[int]]:
        written = generate(
            model,
            [requests[i].prompt for i in batch],
            decoding,
            special=tokenizer,
            max_new_tokens=requests[batch[0]].length,
            seeds=[requests[i].seed for i in batch],
        )
        return written.tokens.tolist()

    return in_shares(write, batches, model, world, progress)
