"""Losses of preferences: from bounds of chosen and rejected answers to slopes and figures."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdm_plugin.config.components import first_line
from mdm_plugin.errors import UserError


class Compared(NamedTuple):
    """A loss of P preferences, from the bounds of their 2P answers.

    loss: its value. slopes: [2P], fp64, ∂loss/∂B of each answer, by place: chosen at 2k, rejected
    at 2k + 1. figures: what is shown of it, by name.
    """

    loss: float
    slopes: Tensor
    figures: dict[str, float]


def check_loss(loss: object) -> nn.Module:
    """A loss of preferences with torchtune's interface: four log-probabilities [P] in, and out
    come losses [P] and the rewards of chosen and rejected, [P] each.

    Raises:
        UserError: if it is none.
    """
    name = type(loss).__name__
    if not isinstance(loss, nn.Module):
        raise UserError(f"loss: {name} is no torch module: use torchtune.rlhf.loss.DPOLoss")
    numbers = [torch.full((3,), -float(x), dtype=torch.float64) for x in (3, 5, 4, 4)]
    try:
        found = loss(*numbers)
    except Exception as error:  # whatever a user's own, or another interface, may raise
        raise UserError(
            f"loss: {name} takes no log-probabilities of chosen and rejected by policy and "
            f"reference: {first_line(error)}: use one such as torchtune.rlhf.loss.DPOLoss"
        ) from error
    shapes = [list(x.shape) for x in found if isinstance(x, Tensor)]
    if not isinstance(found, tuple) or shapes != [[3]] * 3:
        raise UserError(
            f"loss: {name} is to give three tensors [P]: losses, rewards of chosen, of rejected"
        )
    return loss


def compare(
    loss: nn.Module,
    policy: Tensor,
    reference: Tensor,
    n: Tensor,
    *,
    sft_weight: float = 0.0,
    per_token: bool = False,
) -> Compared:
    """The loss of P preferences, and its slope at each bound.

    VRPO (arXiv 2505.19223): loss(B_θ(y_w), B_θ(y_l), B_ref(y_w), B_ref(y_l)), the mean over
    preferences, plus ``sft_weight`` times the fine-tuning loss −B_θ(y_w)/N of the chosen answers.

    The score is (B_θ − B_ref)(y_w) − (B_θ − B_ref)(y_l). The loss is not linear in it, so noise in
    the bounds is bias too: about half of the loss's second derivative times the score's variance.
    That is shown (``score/variance``), from the draws, as if these were independent; draws that are
    spread evenly have less.

    Args:
        loss: as ``check_loss`` has it.
        policy, reference: [2P, D], fp64, the draws of each answer's bound.
        n: [2P], tokens of each answer.
        sft_weight: 0 for none.
        per_token: divide each bound by its answer's tokens; the loss's beta is then per token.
    """
    answers, draws = policy.shape
    scale = 1 / n.double() if per_token else torch.ones(answers, dtype=torch.float64)
    ours = policy.mean(1).requires_grad_()
    theirs = reference.mean(1)
    with torch.enable_grad():
        own, base = ours * scale, theirs * scale
        losses, chosen, rejected = loss(own[0::2], own[1::2], base[0::2], base[1::2])
        compared = losses.mean()
        likelihood = -(ours / n)[0::2].mean()
        total = compared + sft_weight * likelihood
    (slopes,) = torch.autograd.grad(total, ours)
    change = (policy - reference) * scale[:, None]
    margin = chosen - rejected
    figures = {
        "train/loss_preferences": compared.item(),
        "train/loss_sft": likelihood.item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margin": margin.mean().item(),
        "rewards/accuracy": (margin > 0).double().mean().item(),
        # E over the answers of log p_ref − log p_θ: the KL divergence where they are the
        # reference's own samples.
        "score/kl_of_answers": -(ours - theirs).mean().item(),
    }
    if draws > 1:
        score = change[0::2] - change[1::2]
        figures["score/variance"] = (score.var(1) / draws).mean().item()
    return Compared(total.item(), slopes.detach(), figures)
