"""How far a cache takes the sampler from the model, against a plain loop over a text's steps."""

import pytest
import torch

from mdm_plugin.generation import Decoding, Moments, Threshold, TokenIds, cache_gap, generate
from mdm_plugin.models import dream, llada

SPECIAL = TokenIds(mask_id=1, pad_id=0, eos_id=2)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
N = 12


def model(build):
    torch.manual_seed(0)
    made = build(
        **{"vocab_size": 48, "num_layers": 2, "num_heads": 2, "embed_dim": 32, "max_seq_len": 32},
        **({"num_kv_heads": 1} if build is dream else {}),
        intermediate_dim=64,
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return made.eval()


def written(net, decoding):
    """Responses, their moments, and every step's (response before, put, confidence)."""
    moments, steps = Moments(), []
    before = torch.full((3, N), 1)

    def on_step(step):
        nonlocal before
        moments.add(step)
        steps.append((before, step.put, step.confidence))
        before = step.response.clone()

    found = generate(
        net, PROMPTS, decoding, special=SPECIAL, max_new_tokens=N, on_step=on_step
    ).tokens
    return found, moments, steps


def plain(net, decoding, texts, steps):
    """|difference| of each token before its row's end, one row and one step at a time. [3, N]."""
    found = torch.full((3, N), torch.nan, dtype=torch.float64)
    w = decoding.cfg_scale
    for before, put, confidence in steps:
        for b, place in put.nonzero().tolist():
            row = torch.cat((torch.tensor(PROMPTS[b]), before[b]))
            blank = row.clone()
            blank[: len(PROMPTS[b])] = 1
            at = len(PROMPTS[b]) + place - int(net.shift)
            with torch.no_grad():
                logits, without = (net(x[None])[0, at] for x in (row, blank))
            logits = (w + 1) * logits - w * without
            logits[1] = -torch.inf
            exact = logits.double().log_softmax(-1)[texts[b, place]]
            found[b, place] = (confidence[b, place].double().log() - exact).abs()
    return found


@pytest.mark.parametrize("build", [llada, dream])
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "dual", "block_length": 4},
        {"cache": "prefix", "block_length": 6, "cfg_scale": 0.5},
        {"cache": "dual", "sampler": Threshold(0.05), "refresh_every": 3, "top_p": 0.9},
    ],
    ids=["dual", "prefix and guided", "several tokens a step"],
)
def test_the_gap_of_every_token_is_a_plain_loop_s(build, options):
    net, decoding = model(build), Decoding(temperature=1.2, **options)
    texts, moments, steps = written(net, decoding)
    truth = plain(net, decoding, texts, steps)
    ends = [(x == 2).nonzero()[0, 0].item() if (x == 2).any() else N - 1 for x in texts]
    for place in range(N):
        places = torch.tensor([min(place, end) for end in ends])
        gap = cache_gap(net, PROMPTS, moments, places, decoding, SPECIAL)
        assert gap.tolist() == pytest.approx(truth[range(3), places].tolist(), abs=3e-6)
    assert truth.nanmean() > 1e-3 and truth.nan_to_num(1).min() < 1e-5  # a block's first step


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_the_gap_is_nothing_where_the_cache_is_exact(cache):
    net = model(llada)
    for refresh, exact in ((1, True), (None, False)):
        options = {"cache": cache, "block_length": 4, "refresh_every": refresh}
        decoding = Decoding(temperature=1.2, **options)
        texts, moments, _ = written(net, decoding)
        shown = min((texts != 2).sum(1).tolist())
        assert shown > 3
        gaps = torch.stack(
            [
                cache_gap(net, PROMPTS, moments, torch.full((3,), i), decoding, SPECIAL)
                for i in range(shown)
            ]
        )
        assert (gaps.max() < 1e-6) == exact and (exact or gaps.mean() > 1e-3)
