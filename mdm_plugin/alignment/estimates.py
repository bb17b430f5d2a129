"""Estimates of a response's log-probability that others published, as samplers and masks.

They are here to be compared with, and to be used by who wants them. Each says whether it is the
bound's estimate, or by what it is not.
"""

import torch
from torch import Generator, Tensor

from mdm_plugin.contract import Masking, Times, TimestepSampler, Views
from mdm_plugin.density import Density
from mdm_plugin.errors import UserError
from mdm_plugin.generation import Decoding
from mdm_plugin.masking import random_order
from mdm_plugin.models import MDMTransformer


class GaussQuadrature(TimestepSampler):
    """t at the three nodes of Gauss's rule on (0, 1), with its weights (GDPO, arXiv 2510.08554).

    Of three draws. It is exact for L(t) that is a polynomial up to the fifth degree, and biased for
    others: the nodes are always the same.

    Raises:
        ValueError: for another number of draws than 3.
    """

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        if n != 3:
            raise ValueError(f"GaussQuadrature has 3 nodes, and there are {n} draws: set draws: 3")
        half = 0.5 * 0.6**0.5
        nodes = torch.tensor([0.5 - half, 0.5, 0.5 + half], dtype=torch.float64)
        weights = torch.tensor([5 / 6, 8 / 6, 5 / 6], dtype=torch.float64)
        return Times(w.quantile(nodes), weights)


class RoundedCount(Masking):
    """max(1, ⌊t·N⌋ of N) positions are masked, weight N over that number (GDPO).

    ``FixedCount`` with another rounding: it is biased, as a count of N has no share.
    """

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        n = eligible.sum(1)
        count = (t * n).long().clamp(min=1)
        mask = (random_order(u, eligible) < count[:, None]) & eligible
        return Views(mask[None], (n / count).to(t.dtype)[None])


class FullyMasked(Masking):
    """The response is masked as a whole, and each token of the prompt with a probability (d1,
    github.com/dllm-reasoning/d1).

    Each token's estimate is log p(token | what is left of the prompt). It is no bound of the
    likelihood: tokens are predicted as if they were independent.

    Args:
        prompt_rate: probability that a token which is not the response's is hidden.

    Raises:
        ValueError: if it is no probability.
    """

    uses_t = False

    def __init__(self, prompt_rate: float = 0.15) -> None:
        if not 0 <= prompt_rate <= 1:
            raise ValueError(f"prompt_rate is {prompt_rate}: use 0 up to 1")
        self.prompt_rate = prompt_rate

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        hidden = eligible | (u < self.prompt_rate)
        one = torch.ones(1, len(t), dtype=t.dtype)
        return Views(eligible[None], one, hidden[None])


class Coupled(Masking):
    """The whole response masked, a part of it, and the rest (coupled-GRPO, apple/ml-diffucoder).

    The part has the rate r = low + (high − low)·t. A token's estimate is half of its
    log-probability in the first view, and half of that in the other view where it is masked, over
    that one's rate. It is no bound of the likelihood: in the mean it is half of the fully masked
    one and the whole of a window's bound, as each token is in one of the two with certainty.

    Args:
        low, high: of the rate.

    Raises:
        ValueError: unless 0 < low <= high < 1.
    """

    views = 3

    def __init__(self, low: float = 0.2, high: float = 0.8) -> None:
        if not 0 < low <= high < 1:
            raise ValueError(f"low and high are {low} and {high}: use 0 < low <= high < 1")
        self.low, self.high = low, high

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        rate = self.low + (self.high - self.low) * t
        part = (u < rate[:, None]) & eligible
        mask = torch.stack((eligible, part, eligible & ~part))
        # Views are averaged over: three times a half of each.
        weights = torch.stack((torch.ones_like(rate), 1 / rate, 1 / (1 - rate)))
        return Views(mask, weights * 1.5)


class LeftToRight(Masking):
    """Each token after those before it, with the rest hidden: text written from left to right.

    View j hides the j-th eligible position and all after it, and has the j-th predicted. So all
    views together are the log-probability of writing in that order, without noise and without a
    bound: exact for ``decoding.block_length: 1``, and a policy gradient of that policy. Ours, for
    models that write block by block: a block has as many views as tokens, and they share one clean
    copy. Of a model without blocks it takes a forward for each token.

    Args:
        views: as many as a block has tokens, ``model.block_length``; more positions are refused.

    Raises:
        ValueError: if it is below 1; in use, for more positions than views.
    """

    uses_t = False

    def __init__(self, views: int) -> None:
        if views < 1:
            raise ValueError(f"views is {views}: use 1 or more")
        self.views = views

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        number = eligible.cumsum(1) - 1
        if int(number.max()) >= self.views:
            raise ValueError(
                f"LeftToRight: {int(number.max()) + 1} positions are more than its {self.views} "
                "views: set views to model.block_length"
            )
        view = torch.arange(self.views)[:, None, None]
        mask, hidden = (number == view) & eligible, (number >= view) & eligible
        # A mean over views: times their number, and each position counts once.
        return Views(
            mask, torch.full((self.views, len(t)), float(self.views), dtype=t.dtype), hidden
        )


def check_order(masking: Masking, model: MDMTransformer, decoding: Decoding) -> None:
    """Refuse to score answers in another order than they are written in.

    Raises:
        UserError: if ``masking`` is ``LeftToRight``, and the answers are not written so.
    """
    if not isinstance(masking, LeftToRight):
        return
    if model.block_length != masking.views:
        raise UserError(
            f"masking.views: {masking.views}: LeftToRight has a view for each token of a block: "
            f"use model.block_length, {model.block_length}"
        )
    if decoding.block_length != 1:
        raise UserError(
            f"decoding.block_length: {decoding.block_length}: LeftToRight scores answers that are "
            "written one token after another: set it to 1"
        )
