"""The losses of a policy: from bounds of its answers, old and new, and advantages to slopes."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mdm_plugin.contract import Masking
from mdm_plugin.errors import UserError


class PolicyTerms(NamedTuple):
    """Of R sequences, each a sum that is to be divided by the number of all sequences.

    loss: scalar, with a graph. clipped: share of a sequence that was clipped. ratio, kl: of each.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor
    kl: Tensor


class PolicyLoss:
    """Clipped policy gradients of bounds, with the choices of the field as options.

    With Δ = (log-probability now) − (log-probability when the answer was sampled), each a bound of
    a response of N tokens divided by N, or an estimate for one token,

        −min(exp(Δ)·A, clip(exp(Δ), 1 − clip_low, 1 + clip_high)·A) + kl_weight · KL,

    averaged over a sequence's tokens and then over sequences.

    Args:
        ratio: ``sequence``: exp(ΔB/N) (GDPO, ESPO, GSPO). ``token``: one for each token (d1,
            coupled-GRPO). ``none``: −A·B/N, a plain policy gradient (SPG's lower bound).
        clip_low, clip_high: how far the ratio may go down and up.
        kl: to the reference: ``k2``, Δ²/2; ``k3``, exp(−Δ) + Δ − 1; None for none.
        kl_weight: of it.

    Raises:
        ValueError: on an unknown choice, or a value out of range.
    """

    def __init__(
        self,
        ratio: Literal["sequence", "token", "none"] = "sequence",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl: Literal["k2", "k3"] | None = None,
        kl_weight: float = 0.0,
    ) -> None:
        if ratio not in ("sequence", "token", "none"):
            raise ValueError(f"ratio is {ratio!r}: use sequence, token or none")
        if kl not in ("k2", "k3", None):
            raise ValueError(f"kl is {kl!r}: use k2, k3 or null")
        if not (0 < clip_low <= 1 and clip_high > 0):
            raise ValueError(f"clip_low {clip_low} (up to 1), clip_high {clip_high}: use above 0")
        if (kl is None) != (kl_weight == 0) or kl_weight < 0:
            raise ValueError(f"kl {kl} with kl_weight {kl_weight}: give both, or neither")
        self.ratio, self.kl, self.kl_weight = ratio, kl, kl_weight
        self.clip_low, self.clip_high = clip_low, clip_high

    @property
    def by_token(self) -> bool:
        """Whether it takes an estimate for each token, in place of one for the response."""
        return self.ratio == "token"

    def __call__(
        self,
        new: Tensor,
        old: Tensor,
        reference: Tensor | None,
        advantage: Tensor,
        eligible: Tensor,
    ) -> PolicyTerms:
        """The terms of R sequences.

        Args:
            new, old, reference: [R, L], fp64: what each token's place adds to the bound, of which
                ``sequence`` and ``none`` take the sum.
            advantage: [R].
            eligible: [R, L], bool, the response.
        """
        n = eligible.sum(1, keepdim=True).clamp(min=1).double()
        if not self.by_token:
            new, old = new.sum(1, keepdim=True) / n, old.sum(1, keepdim=True) / n
            reference = None if reference is None else reference.sum(1, keepdim=True) / n
        weight = eligible / n if self.by_token else torch.ones_like(new)
        gain = advantage[:, None]
        ratio = (new - old).exp()
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
        if self.ratio == "none":
            surrogate = gain * new
        else:
            within = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
            surrogate = torch.minimum(ratio * gain, within * gain)
            clipped = surrogate < ratio * gain
        divergence = torch.zeros_like(new)
        if reference is not None:
            change = new - reference
            divergence = change.square() / 2 if self.kl == "k2" else (-change).exp() + change - 1
        terms = -surrogate + self.kl_weight * divergence
        return PolicyTerms(
            (terms * weight).sum(),
            (clipped * weight).sum(1).detach(),
            (ratio * weight).sum(1).detach(),
            (divergence * weight).sum(1).detach(),
        )


def check_ratio(loss: PolicyLoss, masking: Masking, key: str) -> None:
    """Refuse ratios of tokens whose estimates have no bounded weight.

    Raises:
        UserError: naming the ``key`` of the loss.
    """
    if loss.by_token and masking.by_count:
        raise UserError(
            f"{key}.ratio: token with {type(masking).__name__}, whose tokens have the "
            "weight N over the count: their ratios explode: use sequence, or the masking Coupled"
        )
