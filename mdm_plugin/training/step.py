"""The part of a training step that is masked diffusion: noise in, loss out."""

from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from mdm_plugin.data.batches import Batch
from mdm_plugin.loss import MDMLoss, Targets
from mdm_plugin.masking import Views


class TimestepSampler(Protocol):
    def __call__(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]: ...


class Masking(Protocol):
    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor) -> Views: ...


class Corrupted(NamedTuple):
    """A micro-batch with its masks drawn: V views of R rows of L tokens.

    noisy: [V·R, L], long, what the model sees.
    attend: [V·R, 1, L], bool, or None.
    targets: what it is to predict.
    normalizer: scalar, fp64, this micro-batch's share of the loss's normaliser.
    t: [R], fp64.
    row_weight: [V·R], fp32: times the sum of a sequence's CE, its row loss l.
    eligible: number of eligible positions in the R rows.
    """

    noisy: Tensor
    attend: Tensor | None
    targets: Targets
    normalizer: Tensor
    t: Tensor
    row_weight: Tensor
    eligible: int

    def to(self, device: torch.device) -> "Corrupted":
        return self._replace(
            noisy=self.noisy.to(device, non_blocking=True),
            attend=None if self.attend is None else self.attend.to(device, non_blocking=True),
            targets=self.targets.to(device),
        )


def corrupt(
    batch: Batch, t: Tensor, importance: Tensor, masking: Masking, loss: MDMLoss, mask_id: int
) -> Corrupted:
    """Draw the masks of a micro-batch.

    Args:
        batch: R rows and their noise.
        t, importance: [global batch], from the sampler of t; the batch takes its places.
        masking: the sampler of masks.
        loss: gives the masked positions their weights.
        mask_id: the mask token.
    """
    t, importance = t[batch.places], importance[batch.places]
    mask, inverse_p = masking(t, batch.u, batch.eligible)
    views, rows, length = mask.shape
    n = batch.eligible.sum(1)
    return Corrupted(
        noisy=torch.where(mask, mask_id, batch.tokens).reshape(views * rows, length),
        attend=None if batch.attend is None else batch.attend.repeat(views, 1, 1),
        targets=loss.targets(batch.tokens, mask, inverse_p, importance, n),
        normalizer=loss.normalizer(mask, n),
        t=t,
        row_weight=(inverse_p / n).reshape(-1).float(),
        eligible=int(n.sum()),
    )


def forward_loss(model: nn.Module, loss: MDMLoss, batch: Corrupted) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies, before the global normaliser, and CE [M], detached."""
    return model(
        batch.noisy,
        mask=batch.attend,
        head=lambda head, hidden: loss(head, hidden, batch.targets),
    )
