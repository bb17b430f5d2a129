"""Each published sampler against a plain loop of its own: one prompt, no padding, no cache."""

import math

import pytest
import torch

from mdm_plugin.generation import (
    Decoding,
    Remasking,
    Stable,
    Threshold,
    TokenIds,
    generate,
    infill,
)
from mdm_plugin.models import dream, llada

MASK, PAD, EOS = 95, 94, 93
IDS = TokenIds(MASK, PAD)
SHAPE = {"vocab_size": 96, "num_layers": 2, "embed_dim": 32, "intermediate_dim": 64}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return llada(**SHAPE, num_heads=2, max_seq_len=64).eval()


@pytest.fixture(scope="module")
def shifted():
    torch.manual_seed(4)
    return dream(**SHAPE, num_heads=4, num_kv_heads=2, max_seq_len=64).eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (50,), generator=generator).tolist()
    return [torch.randint(90, (n,), generator=generator) for n in lengths]


def predict(model, x, shift=False, cfg=0.0, prompt=0):
    """Logits [L, V] of one row, whole."""
    with torch.no_grad():
        logits = model(x[None])[0]
        if cfg:
            blank = x.clone()
            blank[:prompt] = MASK
            unconditional = model(blank[None])[0]
            logits = unconditional + (cfg + 1) * (logits - unconditional)
    if shift:
        logits = torch.cat((logits[:1], logits[:-1]))
    logits[:, MASK] = -math.inf
    return logits


def scores(order, p, best):
    if order in ("low_confidence", "maskgit_plus"):
        return p[torch.arange(len(p)), best]
    if order == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)
    top = p.sort(-1, descending=True).values
    return top[:, 0] - top[:, 1]


def llada_loop(
    model, prompt, n, steps, block=None, cfg=0.0, order="low_confidence", eos_last=False
):
    """LLaDA's: the same number of positions per step, the first steps one more."""
    block = block or n
    x = torch.cat((prompt, torch.full((n,), MASK)))
    per_block = steps // (n // block)
    for b in range(n // block):
        end = len(prompt) + (b + 1) * block
        for step in range(per_block):
            logits = predict(model, x, cfg=cfg, prompt=len(prompt))
            best = logits.argmax(-1)
            confidence = scores("low_confidence", logits.softmax(-1), best)
            if eos_last:
                confidence[best == EOS] -= 100
            candidates = [i for i in range(end) if x[i] == MASK]
            count = block // per_block + (step < block % per_block)
            for i in sorted(candidates, key=lambda i: -confidence[i])[:count]:
                x[i] = best[i]
    return x[len(prompt) :].tolist()


def dream_loop(model, prompt, n, steps, order):
    """Dream's: a share 1 − s/t of what is masked, and all at the end; shifted logits."""
    x = torch.cat((prompt, torch.full((n,), MASK)))
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        logits = predict(model, x, shift=True)
        best = logits.argmax(-1)
        confidence = scores(order, logits.softmax(-1), best)
        masked = [i for i in range(len(x)) if x[i] == MASK]
        share = 1 - times[step + 1] / times[step]
        count = int(len(masked) * share) if step < steps - 1 else len(masked)
        for i in sorted(masked, key=lambda i: -confidence[i])[:count]:
            x[i] = best[i]
    return x[len(prompt) :].tolist()


def threshold_loop(model, prompt, n, threshold, block):
    """Fast-dLLM's: all of the block that reach the threshold, or the best."""
    x = torch.cat((prompt, torch.full((n,), MASK)))
    for b in range(n // block):
        end = len(prompt) + (b + 1) * block
        while (x[:end] == MASK).any():
            logits = predict(model, x)
            best = logits.argmax(-1)
            confidence = scores("low_confidence", logits.softmax(-1), best)
            masked = [i for i in range(end) if x[i] == MASK]
            top = max(masked, key=lambda i: confidence[i])
            for i in masked:
                if confidence[i] >= threshold or i == top:
                    x[i] = best[i]
    return x[len(prompt) :].tolist()


def klass_loop(model, prompt, n, threshold, kl_threshold, history):
    """KLASS: sure, and unchanged for ``history`` steps; else the surest."""
    x = torch.cat((prompt, torch.full((n,), MASK)))
    divergences = []
    before = None
    while (x == MASK).any():
        logits = predict(model, x)
        best, p = logits.argmax(-1), logits.softmax(-1).clamp(min=1e-12)
        if before is not None:
            divergences.append((logits.softmax(-1) * (p.log() - before.log())).sum(-1))
        before = p
        confidence = scores("low_confidence", logits.softmax(-1), best)
        masked = [i for i in range(len(x)) if x[i] == MASK]
        chosen = [
            i
            for i in masked
            if confidence[i] > threshold
            and len(divergences) >= history
            and all(d[i] < kl_threshold for d in divergences[-history:])
        ]
        for i in chosen or [max(masked, key=lambda i: confidence[i])]:
            x[i] = best[i]
    return x[len(prompt) :].tolist()


def written(model, prompts, n, decoding, special=IDS, **arguments):
    found = generate(model, prompts, decoding, max_new_tokens=n, special=special, **arguments)
    return found.tokens.tolist()


@pytest.mark.parametrize(
    ("n", "steps", "block", "cfg"),
    [
        (8, 8, None, 0),
        (7, 3, None, 0),
        (5, 1, None, 0),
        (12, 6, 4, 0),
        (12, 6, 6, 1.5),
        (6, 6, 3, 2),
    ],
)
def test_low_confidence_remasking_is_llada_s_loop(model, prompts, n, steps, block, cfg):
    decoding = Decoding(steps=steps, block_length=block, cfg_scale=cfg)
    expected = [llada_loop(model, p, n, steps, block, cfg) for p in prompts]
    assert written(model, prompts, n, decoding) == expected
    assert [written(model, [p], n, decoding)[0] for p in prompts[:5]] == expected[:5]


@pytest.mark.parametrize("order", ["entropy", "margin", "maskgit_plus"])
@pytest.mark.parametrize(("n", "steps"), [(10, 10), (10, 4)])
def test_the_other_orders_are_dream_s_loop(shifted, prompts, order, n, steps):
    decoding = Decoding(steps=steps, sampler=Remasking(order, "linear"))
    expected = [dream_loop(shifted, p, n, steps, order) for p in prompts]
    assert written(shifted, prompts, n, decoding) == expected


@pytest.mark.parametrize(("threshold", "block"), [(0.03, 12), (0.045, 4), (2.0, 6), (0.0, 12)])
def test_a_threshold_is_fast_dllm_s_loop(model, prompts, threshold, block):
    decoding = Decoding(block_length=block, sampler=Threshold(threshold))
    expected = [threshold_loop(model, p, 12, threshold, block) for p in prompts]
    assert written(model, prompts, 12, decoding) == expected


@pytest.mark.parametrize(("threshold", "kl", "history"), [(0.02, 0.02, 1), (0.025, 0.05, 2)])
def test_stability_is_klass_s_loop(model, prompts, threshold, kl, history):
    decoding = Decoding(sampler=Stable(threshold, kl, history))
    expected = [klass_loop(model, p, 10, threshold, kl, history) for p in prompts]
    assert written(model, prompts, 10, decoding) == expected
    forwards = generate(model, prompts[:1], decoding, max_new_tokens=10, special=IDS).forwards
    assert forwards < 10  # more than one at a time did qualify


def test_a_row_that_is_done_goes_through_the_model_no_more(model, prompts):
    decoding, rows = Decoding(sampler=Threshold(0.034)), []
    alone = [
        generate(model, [p], decoding, max_new_tokens=12, special=IDS).forwards for p in prompts
    ]
    assert min(alone) < max(alone)
    hook = model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    with hook:
        forwards = generate(model, prompts, decoding, max_new_tokens=12, special=IDS).forwards
    assert forwards == len(rows) == max(alone) and sum(rows) == sum(alone)


@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_with_a_cache_a_row_that_is_done_leaves_at_the_next_block_with_the_same_text(
    model, prompts, cfg
):
    options = {"block_length": 4, "cache": "dual", "cfg_scale": cfg}
    decoding, sizes = Decoding(**options, temperature=1.5), []
    texts = torch.tensor(written(model, prompts, 12, decoding))
    eos = int(texts.flatten().mode().values)
    special, views = IDS._replace(eos_id=eos), 2 if cfg else 1
    hook = model.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape))
    with hook:
        whole = written(model, prompts, 12, decoding, special)
    fresh = [rows for rows, length in sizes if length > 4]
    first = [x.index(eos) if eos in x else 12 for x in texts.tolist()]
    assert fresh == [views * sum(end >= start for end in first) for start in (0, 4, 8)]
    assert fresh[2] < fresh[0]
    for i, prompt in enumerate(prompts[:10]):
        assert written(model, [prompt], 12, decoding, special, seeds=[i]) == [whole[i]]


def test_random_order_and_temperature_are_each_row_s_own(model, prompts):
    """A row's noise depends on its seed alone: not on the batch that it is in."""
    decoding = Decoding(steps=6, sampler=Remasking("random"), temperature=0.8, top_k=20, top_p=0.9)
    seeds = list(range(100, 150))
    whole = written(model, prompts, 6, decoding, seeds=seeds)
    alone = [
        written(model, [p], 6, decoding, seeds=[s])[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert whole == alone
    assert written(model, prompts, 6, decoding, seeds=[s + 1 for s in seeds]) != whole


def test_temperature_draws_from_the_filtered_softmax(model):
    """One position, 4,000 seeds: frequencies against the probabilities, by chi square."""
    prompt, t = torch.tensor([5, 17, 60]), 0.7
    p = (predict(model, torch.cat((prompt, torch.tensor([MASK]))))[-1] / t).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) - p[order] < 0.6).sum())][:8]
    expected = p[kept] / p[kept].sum()
    decoding = Decoding(temperature=t, top_p=0.6, top_k=8)
    drawn = torch.tensor(written(model, [prompt] * 4000, 1, decoding))[:, 0]
    assert set(drawn.tolist()) <= set(kept.tolist()) and len(kept) == 8
    counts = torch.stack([(drawn == k).sum() for k in kept])
    chi_square = ((counts - 4000 * expected) ** 2 / (4000 * expected)).sum()
    assert chi_square < 24.3  # 99.9 % of 7 degrees of freedom


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_cache_that_is_renewed_at_each_step_is_exact(model, shifted, prompts, cache, cfg):
    for m in (model, shifted):
        plain = {"block_length": 4, "cfg_scale": cfg}
        expected = written(m, prompts, 12, Decoding(**plain))
        assert written(m, prompts, 12, Decoding(**plain, cache=cache, refresh_every=1)) == expected
    assert all(layer.attn.kv_cache is None for layer in model.layers)


class Third:
    """A sampler that fills the third position of a block, twice, and keeps what it saw."""

    needs_steps = True

    def __init__(self):
        self.seen = []

    def __call__(self, step, late):
        self.seen.append(step.model[0])
        return torch.zeros_like(step.masked).index_fill(1, torch.tensor([2]), True)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_cached_step_is_one_of_a_row_whose_other_positions_stood_still(
    model, shifted, cache, shift
):
    """The block's second step; truth: keys and values outside the window as they were."""
    m = shifted if shift else model
    sampler, prompt = Third(), torch.arange(7)
    decoding = Decoding(block_length=4, cache=cache, sampler=sampler)

    def stop_after_two(response):
        if len(sampler.seen) == 2:
            raise StopIteration

    with pytest.raises(StopIteration):
        generate(m, [prompt], decoding, max_new_tokens=8, on_step=stop_after_two, special=IDS)
    before = torch.cat((prompt, torch.full((8,), MASK)))
    after = before.clone()
    after[9] = sampler.seen[0][2].argmax()
    window = list(range(7 - shift, 11 if cache == "dual" else 15))
    logits = frozen_outside(m, before, after, window)[:4]
    logits[:, MASK] = -math.inf
    left = [0, 1, 3]  # masked still
    seen, expected = sampler.seen[1][left], logits.softmax(-1)[left]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-6)


def frozen_outside(model, before, after, window):
    """Logits [window, V] of ``after``, layers outside the window as they were for ``before``."""
    with torch.no_grad():
        h, old = model.tok_embeddings(after[None]), model.tok_embeddings(before[None])
        for layer in model.layers:
            mixed = old.clone()
            mixed[:, window] = h[:, window]
            h, old = layer(mixed), layer(old)
        return model.output(model.norm(h))[0, window]


def test_eos_ends_a_row_early_with_the_same_text(model, prompts):
    decoding = Decoding(block_length=4)
    plain = generate(model, prompts, decoding, max_new_tokens=16, special=IDS)
    common = plain.tokens.flatten().mode().values.item()  # a token that is written often
    ended = generate(
        model, prompts, decoding, max_new_tokens=16, special=IDS._replace(eos_id=common)
    )
    assert ended.forwards <= plain.forwards
    some = 0
    for a, b in zip(plain.tokens.tolist(), ended.tokens.tolist(), strict=True):
        if common in a:
            some += 1
            end = a.index(common)
            assert b[: end + 1] == a[: end + 1] and set(b[end:]) == {common}
        else:
            assert a == b
    assert some > 5


def test_eos_last_is_llada_s_option(model, prompts):
    decoding = Decoding(steps=6, eos_last=True)
    mine = written(model, prompts, 12, decoding, IDS._replace(eos_id=EOS))
    for row, prompt in zip(mine, prompts, strict=True):
        expected = llada_loop(model, prompt, 12, 6, eos_last=True)
        if EOS in expected:
            end = expected.index(EOS)
            expected[end:] = [EOS] * (12 - end)
        assert row == expected


def test_infilling_fills_the_masks_of_each_row_and_nothing_else(model):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n in (6, 11, 17):
        row = torch.randint(90, (n,), generator=generator)
        row[torch.randperm(n, generator=generator)[: n // 2]] = MASK
        rows.append(row)
    filled = infill(model, rows, Decoding(), special=IDS)
    for row, result in zip(rows, filled, strict=True):
        x = row.clone()
        while (x == MASK).any():
            logits = predict(model, x)
            best, confidence = logits.argmax(-1), logits.softmax(-1).max(-1).values
            i = max((i for i in range(len(x)) if x[i] == MASK), key=lambda i: confidence[i])
            x[i] = best[i]
        assert result.tolist() == x.tolist()
        assert torch.equal(result[row != MASK], row[row != MASK])


WRONG = {
    "steps 0": (lambda: Decoding(steps=0), "steps is 0"),
    "more steps than tokens": (lambda: Decoding(steps=9), "steps is 9"),
    "steps and a threshold": (
        lambda: Decoding(steps=4, sampler=Threshold()),
        "as many as it needs",
    ),
    "a block that does not divide": (lambda: Decoding(block_length=3), "block_length 3"),
    "fewer steps than blocks": (lambda: Decoding(block_length=2, steps=3), "multiple of the 4"),
    "negative temperature": (lambda: Decoding(temperature=-1), "temperature is -1"),
    "top_p": (lambda: Decoding(top_p=1.5), "top_p is 1.5"),
    "top_k": (lambda: Decoding(top_k=0), "top_k is 0"),
    "cache": (lambda: Decoding(cache="triple"), "cache is 'triple'"),
    "nothing to refresh": (lambda: Decoding(refresh_every=2), "refresh_every"),
    "order": (lambda: Decoding(sampler=Remasking("best")), "order is 'best'"),
    "schedule": (lambda: Decoding(sampler=Remasking(schedule="fast")), "schedule is 'fast'"),
    "history": (lambda: Decoding(sampler=Stable(history=0)), "history is 0"),
    "eos_last": (lambda: Decoding(eos_last=True), "eos_last: give eos_id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(model, case):
    make, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected):
        generate(model, [torch.arange(4)], make(), max_new_tokens=8, special=IDS)


def test_prompts_that_cannot_be_are_refused(model):
    def refused(prompt, expected, n=8, **arguments):
        with pytest.raises(ValueError, match=expected):
            generate(model, [torch.arange(3), prompt], max_new_tokens=n, special=IDS, **arguments)

    refused(torch.tensor([]).long(), "prompt 1 is empty")
    refused(torch.tensor([MASK, 4]), "prompt 1 holds the mask token")
    refused(torch.arange(60), "68 tokens, the model takes 64")
    refused(torch.arange(3), "max_new_tokens is 0", n=0)
    refused(torch.arange(3), "1 seeds for 2 prompts", seeds=[0])
    with pytest.raises(ValueError, match="row 0 has no mask token"):
        infill(model, [torch.arange(3)], special=IDS)
    with pytest.raises(ValueError, match="block_length: not for infilling"):
        infill(model, [torch.tensor([MASK])], Decoding(block_length=4), special=IDS)
