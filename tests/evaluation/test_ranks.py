"""Evaluation and generation by several ranks, of a model that is whole on each, or sharded."""

import os
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from mdm_plugin.data import Rows
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.parameters import initialize_parameters, local_part
from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World, distributed
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation import BoundEstimator, Questions
from mdm_plugin.evaluation.sharing import Request, complete, share
from mdm_plugin.evaluation.validation import validate
from mdm_plugin.generation import Decoding, Threshold, TokenIds, generate, is_greedy
from mdm_plugin.models import ChatTokenizer, llada
from tests.forks import context, free_port, torchruns

MASK, PAD = 319, 0
SHAPE = {"vocab_size": 320, "num_layers": 2, "num_heads": 2, "embed_dim": 32, "max_seq_len": 96}


def on_ranks(task, ranks, shard, *given) -> list[Any]:
    """What ``task(model, world, *given)`` gives on each of some processes, with models that
    ``shard`` ranks hold together (1: each the whole; −1: all of them)."""
    queue, port = context.SimpleQueue(), free_port()
    children = [
        context.Process(target=_rank, args=(task, rank, ranks, port, shard, queue, given))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():  # a collective that the other ranks do not come to
            child.kill()
    assert [child.exitcode for child in children] == [0] * ranks
    return [x for _, x in sorted(queue.get() for _ in children)]


def on_one(task, *given) -> Any:
    world = World(0, 1, torch.device("cpu"), None)
    return task(made(world), world, *given)


def _rank(task, rank, ranks, port, shard, queue, given):
    os.environ.update(torchruns(rank, ranks, port))
    torch.set_num_threads(1)
    with distributed("cpu", shard, replicate_dim=-1) as world:
        model = made(world.alone() if shard == 1 else world)
        queue.put((rank, task(model, world, *given)))


def made(world):
    model = build_model(lambda: llada(**SHAPE, intermediate_dim=64), world, torch.float32).eval()
    initialize_parameters(model, seed=3)
    with torch.no_grad():
        local_part(model.output.weight)[1].mul_(4)  # surer of some tokens than of others
    return model


class Counter:
    """Rows that have gone through a model's forwards, and how often, shadows of others apart."""

    def __init__(self, model):
        self.rows = self.forwards = self.shadows = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, model, given):
        if given[0].shape == (2, 2) and not given[0].any():
            self.shadows += 1
        else:
            self.forwards += 1
            self.rows += given[0].shape[0]


def some_rows(count, prompts=(2, 9)):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(*prompts, (count,), generator=generator).tolist()
    return [(torch.randint(20, 300, (n + 5,), generator=generator).tolist(), n) for n in sizes]


def written(model, world, directory):
    """Text, by steps that depend on it and from caches, bounds, and whether text is greedy.

    Also each rank's elements of the model, its forwards, and those that it ran for the other.
    """
    tokenizer, counter = ChatTokenizer(directory), Counter(model)
    requests = [Request(ids[:n], 6 if i % 4 else 8, i) for i, (ids, n) in enumerate(some_rows(7))]
    sure = Decoding(sampler=Threshold(0.08), temperature=0.5)
    text = complete(model, tokenizer, requests, sure, world, 2)
    cached = Decoding(block_length=2, cache="dual", cfg_scale=0.5)
    text += complete(model, tokenizer, requests[:3], cached, world, 2)
    rows = Rows((ids, [False] * n + [True] * (len(ids) - n)) for ids, n in some_rows(5))
    special = TokenIds(MASK, PAD)
    shared = BoundEstimator(special, world, 4, draws=3).bounds(model, rows, torch.arange(5))
    own = torch.arange(5)[world.rank :: world.size]
    with uneven_forwards(model, world):  # some have a row more than others
        alone = BoundEstimator(special, world.alone(), 4, draws=3).bounds(model, rows, own)
        wanted = generate(model, [[50, 60]], max_new_tokens=4, special=special).tokens
        greedy = is_greedy(model, [[50, 60]], [[wanted[0].tolist(), [99] * 4]], special)
    found = {"text": text, "bound": shared.nats.tolist(), "own": alone.nats.tolist()}
    size = sum(local_part(p)[1].numel() for p in model.parameters())
    return found, greedy[0], size, counter.forwards, counter.shadows


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard"), [(2, -1), (4, 2)])  # the latter: two copies
def test_a_sharded_model_s_texts_and_bounds_are_the_whole_one_s_on_one_rank(data_dir, ranks, shard):
    whole, greedy, size, _, _ = on_one(written, str(data_dir))
    found = on_ranks(written, ranks, shard, str(data_dir))
    for rank, (own, same, part, _, _) in enumerate(found):
        assert part < 0.6 * size  # it is sharded
        assert own["text"] == whole["text"] and same == greedy == [True, False]
        assert own["bound"] == pytest.approx(whole["bound"], rel=1e-6)
        assert own["own"] == pytest.approx(whole["bound"][rank::ranks], rel=1e-6)
    assert len({forwards for *_, forwards, _ in found}) > 1  # uneven, and made up for
    assert len({forwards + shadows for *_, forwards, shadows in found}) == 1


@pytest.mark.slow
def test_ranks_that_hold_the_whole_model_do_not_wait_for_each_other(data_dir):
    whole, _, size, _, _ = on_one(written, str(data_dir))
    for own, _, part, _, shadows in on_ranks(written, 2, 1, str(data_dir)):
        assert own["text"] == whole["text"] and part == size and shadows == 0


def validated(model, world, directory):
    tokenizer, counter, asked = ChatTokenizer(directory), Counter(model), []

    def verify(text, row):
        asked.append(row["id"])
        return len(text) % 2 == 0

    rows = some_rows(9)
    questions = Questions(
        [Prompt(str(i), {"id": i}, ids[:n]) for i, (ids, n) in enumerate(rows)], verify
    )
    cfg = {"batch_size": 16, "val_draws": 2, "sample_rows": 4, "sample_new_tokens": 6}
    data = Rows((ids, [False] * n + [True] * (len(ids) - n)) for ids, n in rows)
    found = validate(
        model, data, questions, tokenizer, world, OmegaConf.create({**cfg, "sample_steps": 3})
    )
    return found, asked, counter.rows


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, -1])
def test_ranks_share_validation_s_questions_and_samples(data_dir, shard):
    (figures, samples), asked, rows = on_one(validated, str(data_dir))
    assert asked == list(range(9)) and samples.count("**reference**") == 4
    ranks = on_ranks(validated, 2, shard, str(data_dir))
    for (own, text), _, some in ranks:
        assert own == pytest.approx(figures, rel=1e-6) and text == samples
        assert some <= 0.65 * rows  # of the rows that have gone through the model
    assert sorted(ranks[0][1] + ranks[1][1]) == asked
    assert abs(len(ranks[0][1]) - len(ranks[1][1])) <= 1


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 300])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_shares_are_of_one_size_whole_and_in_order_of_length(count, ranks):
    lengths = torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = [
        share(lengths, 32, World(rank, ranks, torch.device("cpu"), None)) for rank in range(ranks)
    ]
    assert sorted(i for own in shares for batch in own for i in batch) == list(range(count))
    sizes = [len(batch) for own in shares for batch in own]
    assert max(sizes, default=0) <= 32
    each = [sum(len(batch) for batch in own) for own in shares]
    assert max(each) <= -(-count // ranks) + len(shares[0])  # the last batch may be short
    assert len(shares[0]) == -(-count // (32 * ranks))  # no more forwards than there must be
    for own in shares:
        longest = [lengths[i] for batch in own for i in batch]
        assert longest == sorted(longest, reverse=True)


def test_ranks_divide_into_groups_that_hold_a_model_together(monkeypatch):
    for name, value in torchruns(0, 6, free_port()).items():
        monkeypatch.setenv(name, value)
    for shard, expected in ((4, "6 ranks do not divide into groups of 4"), (0, "groups of 0")):
        with (
            pytest.raises(UserError, match=f"data_parallel_shard_dim: .*{expected}"),
            distributed("cpu", shard, replicate_dim=-1),
        ):
            pass
