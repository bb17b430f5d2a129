"""The masked-diffusion loss, computed on masked positions alone.

With rows x0 of N eligible positions, masking rate p and importance weight w of the row's t,

    row loss   l = (1/N) · Σ_{i masked} CE_i / p        objective   J = E_{x0} E_t E_m [l]

(LLaDA, arXiv 2502.09992, Algorithm 2). Only the masked positions' hidden states go through
the LM head, in chunks: the logits of a whole batch never exist.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Targets(NamedTuple):
    """What the model has to predict: M masked positions of a batch of B = V·R sequences.

    positions: [M], long. Index into the flattened [B · L] hidden states to predict from.
    labels: [M], long. The clean tokens.
    rows: [M], long. The sequence, in 0..B−1, that each belongs to.
    weights: [M], fp32. Each one's weight in the loss, before the global normaliser.
    """

    positions: Tensor
    labels: Tensor
    rows: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(x.to(device, non_blocking=True) for x in self))


class MDMLoss(nn.Module):
    """The losses of the field, by options.

    Args:
        normalize: what the sum over the global batch is divided by.
            ``"response"``: each row by its own N, then by the number of rows (LLaDA SFT). The
            objective J itself.
            ``"tokens"``: the number of eligible tokens (MDLM, dLLM): J with rows weighted by
            their length. Unbiased for that objective given the batch.
            ``"masked"``: the number of masked tokens (Dream-like mean). A ratio of two random
            sums: biased by O(1 / global batch), and with ``weight="ones"`` a different
            objective, one that weights a mask by how many positions it covers.
        weight: ``"inverse_p"`` for 1/p, ``"ones"`` for none (not an estimator of J).
        shift: predict the token at i from position i − 1 (Dream). Position 0 predicts itself,
            as in Dream's released code.
        chunk_size: masked positions per pass of the LM head; ``chunk_size`` × vocabulary
            logits exist at a time, and are computed again in the backward pass.

    Raises:
        ValueError: on an unknown ``normalize`` or ``weight``, or a ``chunk_size`` below 1.
    """

    def __init__(
        self,
        normalize: Literal["response", "tokens", "masked"] = "response",
        weight: Literal["inverse_p", "ones"] = "inverse_p",
        shift: bool = False,
        chunk_size: int = 1024,
    ) -> None:
        super().__init__()
        if normalize not in ("response", "tokens", "masked"):
            raise ValueError(f"normalize is {normalize!r}: use response, tokens or masked")
        if weight not in ("inverse_p", "ones"):
            raise ValueError(f"weight is {weight!r}: use inverse_p or ones")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: use 1 or more")
        self.normalize = normalize
        self.weight = weight
        self.shift = shift
        self.chunk_size = chunk_size

    def targets(
        self, tokens: Tensor, mask: Tensor, inverse_p: Tensor, importance: Tensor, n: Tensor
    ) -> Targets:
        """The masked positions of V views of R rows, with their weights.

        Args:
            tokens: [R, L], the clean tokens.
            mask: [V, R, L], bool.
            inverse_p: [V, R], 1 / masking rate.
            importance: [R], weight of the row's t.
            n: [R], number of eligible positions.
        """
        views, rows, length = mask.shape
        row_weight = importance.expand(views, rows)
        if self.weight == "inverse_p":
            row_weight = row_weight * inverse_p
        if self.normalize == "response":
            row_weight = row_weight / n
        if self.normalize != "masked":  # that normaliser counts every view's tokens itself
            row_weight = row_weight / views
        sequence, position = mask.reshape(views * rows, length).nonzero(as_tuple=True)
        source = (position - 1).clamp(min=0) if self.shift else position
        return Targets(
            positions=sequence * length + source,
            labels=tokens[sequence % rows, position],
            rows=sequence,
            weights=row_weight.reshape(-1)[sequence].float(),
        )

    def normalizer(self, mask: Tensor, n: Tensor) -> Tensor:
        """This batch's share of what the loss is divided by; sum it over ranks and micro-batches.

        ``mask`` [V, R, L] and ``n`` [R] as in ``targets``. A scalar, fp64.
        """
        if self.normalize == "response":
            return torch.tensor(len(n), dtype=torch.float64)
        return (n if self.normalize == "tokens" else mask).sum().double()

    def forward(
        self, output: Callable[[Tensor], Tensor], hidden: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies, and each one of them.

        Args:
            output: the LM head, [*, D] → [*, V].
            hidden: [B, L, D], the final hidden states.
            targets: what ``targets`` gave, on hidden's device.

        Returns:
            The sum of ``weights · CE``, a scalar in fp32, to be divided by the normaliser; and
            CE in nats, [M], detached.
        """

        def chunk_loss(h: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            ce = F.cross_entropy(output(h).float(), labels, reduction="none")
            return (ce * weights).sum(), ce.detach()

        chunks = zip(
            hidden.flatten(0, 1).index_select(0, targets.positions).split(self.chunk_size),
            targets.labels.split(self.chunk_size),
            targets.weights.split(self.chunk_size),
            strict=True,
        )
        # With a single chunk there is nothing to save by computing the logits twice.
        recompute = torch.is_grad_enabled() and len(targets.labels) > self.chunk_size
        losses = [
            checkpoint(chunk_loss, *chunk, use_reentrant=False) if recompute else chunk_loss(*chunk)
            for chunk in chunks
        ]
        return torch.stack([loss for loss, _ in losses]).sum(), torch.cat([ce for _, ce in losses])
