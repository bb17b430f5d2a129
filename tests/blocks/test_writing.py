"""Writing block by block: kept keys and values change nothing, and a plain loop writes the same."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

from mdm_plugin.generation import (
    Decoding,
    Remasking,
    Stable,
    Step,
    Threshold,
    TokenIds,
    generate,
    infill,
)
from mdm_plugin.models import dream, qwen3

MASK, PAD, EOS = 95, 94, 93
IDS = TokenIds(MASK, PAD)
SHAPE = {"vocab_size": 96, "num_layers": 2, "embed_dim": 32, "intermediate_dim": 64}
SHAPE |= {"max_seq_len": 48, "block_length": 4}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
MODELS = {
    "SDAR": lambda: qwen3(**SHAPE, **GROUPED, head_dim=8),
    "Fast-dLLM, shifted": lambda: dream(**SHAPE, **GROUPED),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(3)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (50,), generator=generator).tolist()
    return [torch.randint(90, (n,), generator=generator) for n in lengths]


def written(model, prompts, decoding, special=IDS, n=10, **arguments):
    found = generate(model, prompts, decoding, max_new_tokens=n, special=special, **arguments)
    return found.tokens.tolist()


def scores(order, p, best):
    if order in ("low_confidence", "maskgit_plus"):
        return p[torch.arange(len(p)), best]
    if order == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)
    top = p.sort(-1, descending=True).values
    return top[:, 0] - top[:, 1]


def plain_loop(model, prompt, n, part, choose):
    """A block at a time, all of the row in each forward, under the [L, L] mask of blocks.

    choose: (confidence [L], places still masked of the part, its first number of them, step) →
    places to be written.
    """
    size, shift = model.block_length, model.shift
    length = -(-(len(prompt) + n) // size) * size
    x = torch.cat((prompt, torch.full((length - len(prompt),), MASK)))
    block = torch.arange(length) // size
    allowed = (block[:, None] >= block)[None]
    for start in range(0, length, part):
        inside = range(start, start + part)
        first, step = sum(int(x[i] == MASK) for i in inside), 0
        while masked := [i for i in inside if x[i] == MASK]:
            with torch.no_grad():
                logits = model(x[None], mask=allowed)[0]
            if shift:
                logits = torch.cat((logits[:1], logits[:-1]))
            logits[:, MASK] = -math.inf
            best = logits.argmax(-1)
            for i in choose(logits.softmax(-1), best, masked, first, step):
                x[i] = best[i]
            step += 1
    return x[len(prompt) : len(prompt) + n].tolist()


def surest(order, steps):
    def choose(p, best, masked, first, step):
        confidence = scores(order, p, best)
        count = first // steps + (step < first % steps)
        return sorted(masked, key=lambda i: -confidence[i])[:count]

    return choose


def reaching(threshold):
    def choose(p, best, masked, first, step):
        confidence = scores("low_confidence", p, best)
        top = max(masked, key=lambda i: confidence[i])
        return [i for i in masked if confidence[i] >= threshold or i == top]

    return choose


@pytest.mark.parametrize("part", [4, 2, 1])
def test_what_is_written_is_a_plain_loop_s(model, prompts, part):
    given = {"block_length": None if part == 4 else part, "cache": "prefix"}
    ways = [(Remasking(order), surest(order, part)) for order in ("entropy", "margin")]
    ways += [(Threshold(0.025), reaching(0.025)), (Remasking(), surest("low_confidence", part))]
    for sampler, choose in ways:
        few = prompts if part == 4 and choose is ways[-1][1] else prompts[:10]
        expected = [plain_loop(model, p, 10, part, choose) for p in few]
        assert written(model, few, Decoding(**given, sampler=sampler)) == expected


def test_fewer_steps_than_tokens_are_spread_over_the_blocks(model, prompts):
    for n, steps, each in ((8, 4, 2), (8, 2, 1), (10, 5, 2), (10, 7, 3)):
        expected = [
            plain_loop(model, p, n, 4, surest("low_confidence", each)) for p in prompts[:15]
        ]
        for cache in (None, "prefix"):
            decoding = Decoding(steps=steps, cache=cache)
            assert written(model, prompts[:15], decoding, n=n) == expected


SAMPLERS = {
    **{x: lambda x=x: Remasking(x) for x in ("low_confidence", "random", "maskgit_plus")},
    **{x: lambda x=x: Remasking(x, "linear") for x in ("entropy", "margin")},
    "threshold": lambda: Threshold(0.025),
    "threshold of entropy": lambda: Threshold(-4.4, "entropy"),
    "stable": lambda: Stable(0.02, 0.05, 1),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_the_cache_a_text_is_the_same_and_is_as_it_would_be_alone(model, prompts, sampler):
    """50 prompts of 1 to 19 tokens; temperatures, parts of blocks, ends of texts."""
    common = None
    for temperature, part, last in ((0.0, None, False), (1.0, 2, True)):
        given = {"temperature": temperature, "block_length": part}
        plain = Decoding(**given, sampler=SAMPLERS[sampler]())
        kept = Decoding(**given, sampler=SAMPLERS[sampler](), cache="prefix")
        seeds = list(range(100, 150))
        whole = written(model, prompts, plain, seeds=seeds)
        assert written(model, prompts, kept, seeds=seeds) == whole
        for i in (0, 17):
            assert written(model, [prompts[i]], kept, seeds=seeds[i : i + 1]) == [whole[i]]
        common = common or int(torch.tensor(whole).mode(-1).values.mode().values)
        special, options = IDS._replace(eos_id=common), {**given, "eos_last": last}
        plain = Decoding(**options, sampler=SAMPLERS[sampler]())
        kept = Decoding(**options, sampler=SAMPLERS[sampler](), cache="prefix")
        ended = written(model, prompts, plain, special, seeds=seeds)
        assert written(model, prompts, kept, special, seeds=seeds) == ended
        for i in (0, 17):
            assert written(model, [prompts[i]], kept, special, seeds=seeds[i : i + 1]) == [ended[i]]
        for before, after in zip(whole, ended, strict=True):
            end = after.index(common) if common in after else len(after)
            assert set(after[end:]) <= {common}
            assert last or after[: end + 1] == before[: end + 1]


def test_another_seed_writes_another_text(model, prompts):
    given = Decoding(temperature=1.0, cache="prefix")
    first, other = (written(model, prompts, given, seeds=range(s, s + 50)) for s in (0, 50))
    assert sum(a != b for a, b in zip(first, other, strict=True)) == 50


def test_with_the_cache_a_step_forwards_its_block_and_a_first_step_the_one_before(model, prompts):
    seen, n = [], 12
    hook = model.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    one = prompts[next(i for i, p in enumerate(prompts) if len(p) == 6)]
    with hook:
        found = generate(model, [one], Decoding(cache="prefix"), special=IDS, max_new_tokens=n)
    # 6 tokens of a prompt: the first forward has it, and the rest of its block.
    widths = [8, 4, *([8, 4, 4, 4] * 2), 8, 4, 4, 4]
    assert [width for _, width in seen] == widths and found.forwards == len(widths)
    assert all(layer.attn.kv_cache is None for layer in model.layers)


def test_rows_that_are_done_go_through_the_model_no_more(model, prompts):
    texts = torch.tensor(written(model, prompts, Decoding()))
    eos, sizes = int(texts.flatten().mode().values), []
    hook = model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    with hook:
        written(model, prompts, Decoding(cache="prefix"), IDS._replace(eos_id=eos), n=24)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 50 == sizes[0]


def test_compiled_layers_write_the_same_and_longer_texts_make_no_more_graphs(prompts):
    torch.manual_seed(0)
    model, few = MODELS["Fast-dLLM, shifted"]().eval(), prompts[:3]
    plain = written(model, few, Decoding(), n=28)
    for layer in model.layers:
        layer.compile(dynamic=True, backend="eager")
    graphs = []
    for n in (16, 16, 28):
        texts = written(model, few, Decoding(cache="prefix"), n=n)
        assert texts == [x[:n] for x in plain]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[2] == graphs[1], graphs


def test_a_model_that_has_failed_has_no_caches_left(model, prompts):
    class Broken:
        needs_steps = False

        def __call__(self, step, late):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        written(model, prompts, Decoding(sampler=Broken(), cache="prefix"))
    assert all(
        layer.attn.kv_cache is None and not layer.attn.cache_enabled for layer in model.layers
    )


@pytest.mark.parametrize("cache", [None, "prefix"])
def test_steps_say_what_was_put_where_and_by_what_probability(model, prompts, cache):
    """All tokens but those that an EOS has written, each once, beside the text as it then was."""
    steps: list[Step] = []
    texts = torch.tensor(written(model, prompts, Decoding()))
    eos = int(texts.flatten().mode().values)
    decoding = Decoding(temperature=1.0, cache=cache)
    found = generate(
        model,
        prompts,
        decoding,
        special=IDS._replace(eos_id=eos),
        max_new_tokens=10,
        on_step=steps.append,
    )
    put = torch.stack([x.put for x in steps]).sum(0)
    assert put.max() == 1 and torch.equal(steps[-1].response, found.tokens)
    for row, text in enumerate(found.tokens.tolist()):
        end = text.index(eos) + 1 if eos in text else 10
        assert put[row, :end].sum() >= end - 1  # an EOS may have been written over by another
    for before, step in zip([None, *steps], steps, strict=False):
        assert (step.confidence[~step.put] == 0).all() and (step.confidence[step.put] > 0).all()
        if before is not None:
            assert (before.response[step.put] == MASK).all()
    assert steps[0].response.shape == (50, 10)


WRONG = {
    "guidance": ({"cfg_scale": 1.0}, "cfg_scale: not for a model that writes block by block"),
    "a cache of what is to come": ({"cache": "dual"}, "cache dual: not for a model that writes"),
    "renewal": ({"cache": "prefix", "refresh_every": 2}, "refresh_every: not for a model"),
    "parts": ({"block_length": 3}, "block_length 3 does not divide the model's blocks of 4"),
    "larger parts": ({"block_length": 8}, "block_length 8 does not divide the model's blocks of 4"),
    "steps": ({"steps": 11}, "steps is 11: use 1 to the response's 10 tokens"),
    "no EOS": ({"eos_last": True}, "eos_last: give eos_id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case, prompts):
    torch.manual_seed(0)
    options, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected):
        written(MODELS["SDAR"](), prompts, Decoding(**options))


def test_rows_that_are_too_long_and_places_in_the_middle_are_refused(prompts):
    model = MODELS["SDAR"]()
    long = torch.arange(40)
    assert len(written(model, [long], Decoding(), n=8)[0]) == 8
    with pytest.raises(ValueError, match="52 tokens, in whole blocks of 4, the model takes 48"):
        written(model, [long], Decoding(), n=9)
    with pytest.raises(ValueError, match="fills in no places before the last one"):
        infill(model, [torch.tensor([3, MASK, 5])], special=IDS)
