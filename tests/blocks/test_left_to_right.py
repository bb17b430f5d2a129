"""The log-probability of writing from left to right, exactly: of all answers it adds up to one."""

from itertools import product

import pytest
import torch

from mdm_plugin.alignment import DrawPlan, bounds, drawn
from mdm_plugin.alignment.estimates import LeftToRight, check_order
from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.generation import Decoding, TokenIds, generate
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement
from mdm_plugin.models import llada
from mdm_plugin.timesteps import Stratified, Uniform

WORLD, MASK, WORDS, PROMPT = World(0, 1, torch.device("cpu"), None), 4, 4, [1, 3, 0]


def a_model(shift):
    torch.manual_seed(1)
    model = llada(5, 2, 2, 16, 16, 32, shift=shift, block_length=4).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def answers(n):
    """All of n tokens, after the prompt."""
    tokens = torch.tensor([[*PROMPT, *x] for x in product(range(WORDS), repeat=n)])
    eligible = (torch.arange(tokens.shape[1]) >= len(PROMPT)).expand(len(tokens), -1)
    return Batch(
        tokens, eligible, None, torch.zeros(tokens.shape).double(), torch.arange(len(tokens))
    )


def without_the_mask_token(model):
    """As text is written: the mask token is never drawn."""
    head = torch.nn.Linear(16, 5).double()
    with torch.no_grad():
        head.bias.zero_()[MASK] = -1e4
    model.output = head
    return model


@pytest.mark.parametrize("shift", [False, True])
def test_probabilities_of_all_answers_add_up_to_one_and_bounds_do_not(shift):
    model, batch = without_the_mask_token(a_model(shift)), answers(5)  # a block's end, and a block
    head = MDMLoss()
    exact = Estimator(Uniform(), LeftToRight(4), MDMLoss(), MASK, blocks=Blocks(4))
    one = bounds(model, head, drawn(batch, exact, DrawPlan(1, 0), ("x",)), WORLD, ("k",))[:, 0]
    assert one.exp().sum() == pytest.approx(1, abs=1e-5)
    again = bounds(model, head, drawn(batch, exact, DrawPlan(2, 9), ("y",)), WORLD, ("k",))
    assert torch.allclose(again, one[:, None].expand(-1, 2))  # nothing is random
    bound = Estimator(Stratified(), Complement(), MDMLoss(), MASK, blocks=Blocks(4))
    many = bounds(model, head, drawn(batch, bound, DrawPlan(32, 0), ("x",)), WORLD, ("k",)).mean(1)
    assert many.exp().sum() < 0.995


@pytest.mark.parametrize("shift", [False, True])
def test_answers_are_drawn_by_these_probabilities(shift):
    model, n = without_the_mask_token(a_model(shift)), 2
    batch = answers(n)
    exact = Estimator(Uniform(), LeftToRight(4), MDMLoss(), MASK, blocks=Blocks(4))
    draws = drawn(batch, exact, DrawPlan(1, 0), ("x",))
    p = bounds(model, MDMLoss(), draws, WORLD, ("k",))[:, 0].exp()
    how = Decoding(temperature=1.0, block_length=1, cache="prefix")
    rows = 4000
    written = generate(
        model, [PROMPT] * rows, how, special=TokenIds(MASK, 0), max_new_tokens=n, seeds=range(rows)
    ).tokens
    found = torch.bincount(written[:, 0] * WORDS + written[:, 1], minlength=WORDS**n) / rows
    error = (p * (1 - p) / rows).sqrt()
    assert ((found - p).abs() < 4 * error + 1e-4).all()


def test_answers_that_are_written_in_another_order_are_refused():
    model, how = a_model(shift=False), Decoding(temperature=1.0, block_length=1)
    check_order(LeftToRight(4), model, how)
    check_order(Complement(), model, Decoding(temperature=1.0))
    with pytest.raises(UserError, match=r"decoding\.block_length: None.*set it to 1"):
        check_order(LeftToRight(4), model, Decoding(temperature=1.0))
    with pytest.raises(UserError, match=r"masking\.views: 2.*model\.block_length, 4"):
        check_order(LeftToRight(2), model, how)


def test_more_positions_than_views_are_refused():
    with pytest.raises(ValueError, match="views"):
        LeftToRight(0)
    exact = Estimator(Uniform(), LeftToRight(2), MDMLoss(), MASK, blocks=Blocks(4))
    with pytest.raises(ValueError, match=r"views to model\.block_length"):
        drawn(answers(5), exact, DrawPlan(1, 0), ("x",))
