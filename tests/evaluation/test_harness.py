"""lm-eval's requests in batches: each answer is the one that the request has by itself."""

import math

import pytest
import torch

from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.generation import Decoding, Remasking, TokenIds, generate
from tests.evaluation.test_nelbo import exact_nelbo

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def model(tiny_model):
    with torch.no_grad():
        tiny_model.output.weight.mul_(6)  # far from uniform predictions: masks differ
    return tiny_model


@pytest.fixture
def forwards(model):
    """Rows of each forward."""
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    return seen


@pytest.fixture
def harness(model, tokenizer):
    pytest.importorskip("lm_eval")
    from mdm_plugin.evaluation.harness import Harness

    def make(decoding=None, **given):
        options = {"batch_size": 8, "draws": 4, "seed": 5, "max_new_tokens": 8, **given}
        return Harness(model, tokenizer, decoding or Decoding(), ALONE, **options)

    return make


def instances(kind, arguments, documents=None):
    from lm_eval.api.instance import Instance

    documents = documents or range(len(arguments))
    return [
        Instance(kind, {}, pair, i, metadata=("task", document, 1))
        for i, (pair, document) in enumerate(zip(arguments, documents, strict=True))
    ]


WORDS = ("3 + 4 - 5 =", "what", "a longer context of some words", "7 7 7", "Answer", "x")


def asked(count):
    """Contexts of many lengths, with three settings."""
    settings = [{"max_gen_toks": 6, "until": ["a"]}, {"until": "e"}, {"max_gen_toks": 6}]
    return [(f"{WORDS[i % 6]} {i}", settings[i % 3]) for i in range(count)]


def test_generation_goes_in_batches_and_each_text_is_as_alone(harness, model, tokenizer, forwards):
    lm = harness(Decoding(sampler=Remasking("random"), temperature=0.1))
    requests = asked(24)
    found = lm.generate_until(instances("generate_until", requests))
    batched = len(forwards)
    expected = []
    for context, settings in requests:  # one at a time
        ids = generate(
            model,
            [tokenizer.encode(context)],
            lm.decoding,
            special=tokenizer,
            max_new_tokens=settings.get("max_gen_toks", 8),
            seeds=[5],
        ).tokens[0]
        text = tokenizer.decode(ids.tolist())
        for stop in settings.get("until", []):
            text = text.split(stop)[0]
        expected.append(text)
    assert found == expected and len(set(found)) > 4
    assert batched <= (len(forwards) - batched) / 6  # 16 requests of 6 tokens, 8 of 8; 8 a batch
    assert lm.generate_until(instances("generate_until", requests[::-1])) == found[::-1]


def plainly_greedy(model, tokenizer, context, continuation):
    """The definition: the surest position at each step, one forward for each token."""
    x = torch.tensor([*(context or [tokenizer.eos_id]), *[tokenizer.mask_id] * len(continuation)])
    start = len(x) - len(continuation)
    for _ in continuation:
        with torch.no_grad():
            logits = model(x[None])[0]
        if model.shift:
            logits = logits.roll(1, 0)
        logits[:, tokenizer.mask_id] = -math.inf
        p, best = logits.softmax(-1).max(-1)
        i = max((i for i in range(start, len(x)) if x[i] == tokenizer.mask_id), key=lambda i: p[i])
        x[i] = best[i]
    return x[start:].tolist() == continuation


@pytest.mark.parametrize("shift", [False, True])
def test_greedy_is_what_decoding_whole_says_in_far_fewer_forwards(
    harness, model, tokenizer, forwards, shift
):
    """Texts that the model writes, the same but for a token, and others; EOS within them."""
    model.shift = shift
    special = TokenIds(tokenizer.mask_id, tokenizer.pad_id)
    pairs = []
    for i, words in enumerate(WORDS):
        context = tokenizer.encode(words)
        for n in (1, 4, 9):
            own = generate(model, [context], special=special, max_new_tokens=n).tokens[0].tolist()
            almost = [*own[: n // 2], own[n // 2] + 1, *own[n // 2 + 1 :]]
            pairs += [(context, own), (context, almost), (context, almost[::-1])]
            pairs += [(context, [tokenizer.eos_id, *own[1:]]), ([], own), ([], [30 + i] * n)]
    expected = [plainly_greedy(model, tokenizer, *pair) for pair in pairs]
    assert 18 <= sum(expected) < len(pairs) / 2
    from mdm_plugin.evaluation.harness import Pair

    lm = harness()
    forwards.clear()
    assert lm.greedy([Pair(*pair, 0) for pair in pairs]) == expected
    assert sum(forwards) < sum(len(b) for _, b in pairs) / 3  # rows, of one for each token
    # No room for the EOS that an empty context begins with.
    assert lm.greedy([Pair([], [30] * 96, 0)]) == [False]


def likelihoods(lm, pairs, documents):
    requests = instances("loglikelihood", pairs, documents)
    return torch.tensor([nats for nats, _ in lm.loglikelihood(requests)], dtype=torch.float64)


def test_each_likelihood_is_the_bound_without_bias(harness, model, tokenizer):
    """Choices that share their draws, over seeds, against all masks of each."""
    pairs = [("3 + 4 - 5", text) for text in (" so", " 4 so", " 4 no")]
    found = torch.stack(
        [likelihoods(harness(seed=seed, draws=3), pairs, [0, 0, 0]) for seed in range(150)]
    )
    for i, (context, continuation) in enumerate(pairs):
        before, after = (tokenizer.encode(x) for x in (context, continuation))
        row = torch.tensor(before + after)
        eligible = torch.arange(len(row)) >= len(before)
        truth = -exact_nelbo(model, row, eligible, tokenizer.mask_id)
        error = float(found[:, i].std()) / 150**0.5
        assert 0 < error < 0.03 * abs(truth)
        assert abs(float(found[:, i].mean()) - truth) < 4 * error


def test_choices_of_a_question_share_their_draws_and_differ_by_less_noise(harness):
    choices = (" is 412 or so", " is 4129 or so", " is 412 or no")
    pairs = [("The sum of them", text) for text in choices]
    differences = {}
    for name, documents in (("shared", [7, 7, 7]), ("apart", [7, 8, 9])):
        found = torch.stack(
            [likelihoods(harness(seed=seed), pairs, documents) for seed in range(100)]
        )
        differences[name] = torch.stack((found[:, 0] - found[:, 1], found[:, 0] - found[:, 2])).var(
            1
        )
    ratio = differences["shared"] / differences["apart"]
    assert ratio[0] < 0.7  # of other lengths
    assert ratio[1] < 0.5  # of one length: the same masks


def test_likelihoods_depend_on_no_batch_and_no_order_and_other_documents_on_other_noise(harness):
    pairs = [(f"{WORDS[i % 6]} {i}", f" is {'many' * (i % 3)} {i}") for i in range(12)]
    documents = [i // 2 for i in range(12)]
    whole = likelihoods(harness(), pairs, documents)
    for other in (harness(batch_size=3), harness(batch_size=100)):
        torch.testing.assert_close(likelihoods(other, pairs, documents), whole)
    turned = likelihoods(harness(), pairs[::-1], documents[::-1])
    torch.testing.assert_close(turned.flip(0), whole)
    torch.testing.assert_close(likelihoods(harness(), pairs[3:4], documents[3:4]), whole[3:4])
    same = likelihoods(harness(), pairs[:1] * 2, [0, 1])
    assert abs(float(same[0] - same[1])) > 1e-3


def test_a_choice_of_one_token_is_one_row_of_one_forward_and_exact(
    harness, model, tokenizer, forwards
):
    pairs = [("3 + 4 =", f" {x}") for x in "6789"]
    found = likelihoods(harness(draws=16), pairs, [0] * 4)
    assert forwards == [4, 1]  # the four choices; what is greedy, for all of them
    for value, pair in zip(found, pairs, strict=True):
        row = torch.tensor(tokenizer.encode("".join(pair)))
        eligible = torch.arange(len(row)) == len(row) - 1
        truth = -exact_nelbo(model, row, eligible, tokenizer.mask_id)
        assert float(value) == pytest.approx(truth, rel=1e-5)


def test_long_texts_are_the_sum_of_their_windows_in_any_order(harness, tokenizer):
    texts = ["a short one", "word " * 60, "and another, " * 20]
    assert len(tokenizer.encode(texts[1])) > 96
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    lm = harness(batch_size=4)
    found = lm.loglikelihood_rolling(requests)
    for i, x in enumerate(requests):
        assert lm.loglikelihood_rolling([x])[0] == pytest.approx(found[i], rel=1e-6)
    assert found[1] < found[0] < 0


def test_what_a_task_cannot_have_is_one_line(harness, tokenizer):
    lm = harness(Decoding(steps=8))
    with pytest.raises(UserError, match="a task asks for 4 tokens: steps is 8"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 4})]))
    mask = tokenizer.tokenizer.id_to_token(tokenizer.mask_id)
    with pytest.raises(UserError, match="holds the mask token itself"):
        lm.loglikelihood(instances("loglikelihood", [(f"a {mask}", " b")]))
