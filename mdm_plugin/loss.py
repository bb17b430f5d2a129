"""The masked-diffusion loss, computed on masked positions alone.

With rows x0 of N eligible positions, masking rate p and importance weight w of the row's t,

    row loss   l = (1/N) · Σ_{i masked} CE_i / p        objective   J_w = E_{x0} E_{t~w} E_m [l]

(LLaDA, arXiv 2502.09992, Algorithm 2). Only the masked positions' hidden states go through
the LM head, in chunks: the logits of a whole batch never exist. A chunk's part of the gradient is
computed in the forward pass, while its logits are there: each position's weight is known by then
(Apple's and torch's linear cross-entropies take weights too, and compute the logits twice for it:
docs/performance.md).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Targets(NamedTuple):
    """What the model has to predict: M masked positions of a batch of B = V·R sequences.

    positions: [M], long. Index into the flattened [B · L] tokens. From which hidden state a model
        predicts a position is its own affair (``MDMTransformer.shift``).
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


class LinearHead(NamedTuple):
    """A head h·Wᵀ by its matrix: one tied to the embeddings, or one whose W is split over ranks.

    weight: [V, D], or this rank's part of it.
    chunk: (h [c, D], weight, labels [c], weights [c]) → CE [c], and weights · ∂CE/∂logits [c, V];
        None for the plain way.
    """

    weight: Tensor
    chunk: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """Logits [*, V] of h [*, D], for a weight that is whole."""
        return F.linear(h, self.weight)


class MDMLoss(nn.Module):
    """The losses of the field, by options.

    Args:
        normalize: what the sum over the global batch is divided by.
            ``"response"``: each row by its own N, then by the number of rows (LLaDA SFT). The
            objective J_w itself.
            ``"tokens"``: the number of eligible tokens (MDLM, dLLM): J_w with rows weighted by
            their length. Unbiased for that objective given the batch.
            ``"masked"``: the number of masked tokens (Dream-like mean). A ratio of two random
            sums: biased by O(1 / global batch).
        chunk_size: masked positions per pass of the LM head; ``chunk_size`` × vocabulary
            logits exist at a time.

    Raises:
        ValueError: on an unknown ``normalize``, or a ``chunk_size`` below 1.
    """

    def __init__(
        self,
        normalize: Literal["response", "tokens", "masked"] = "response",
        chunk_size: int = 1024,
    ) -> None:
        super().__init__()
        if normalize not in ("response", "tokens", "masked"):
            raise ValueError(f"normalize is {normalize!r}: use response, tokens or masked")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}: use 1 or more")
        self.normalize = normalize
        self.chunk_size = chunk_size
        self._chunk: Callable[..., tuple[Tensor, Tensor]] = _chunk

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
        row_weight = importance.expand(views, rows) * inverse_p
        if self.normalize == "response":
            row_weight = row_weight / n
        if self.normalize != "masked":  # that normaliser counts every view's tokens itself
            row_weight = row_weight / views
        sequence, position = mask.reshape(views * rows, length).nonzero(as_tuple=True)
        return Targets(
            positions=sequence * length + position,
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
        self, output: nn.Module | LinearHead, hidden: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies, and each one of them.

        Args:
            output: the LM head, [*, D] → [*, V]; or a ``LinearHead``.
            hidden: [M, D], the final hidden states that ``targets.positions`` are predicted
                from; or [B, L, D], where each position predicts itself.
            targets: what ``targets`` gave, on hidden's device.

        Returns:
            The sum of ``weights · CE``, a scalar in fp32, to be divided by the normaliser; and
            CE in nats, [M], detached.
        """

        picked = hidden
        if hidden.ndim == 3:
            picked = hidden.flatten(0, 1).index_select(0, targets.positions)
        labels, weights, wanted = targets.labels, targets.weights, torch.is_grad_enabled()
        if isinstance(output, LinearHead):
            head = output
        elif _is_plain(output):
            head = LinearHead(output.weight)
        else:
            trained = [p for p in output.parameters() if p.requires_grad]
            return _HeadCrossEntropy.apply(
                picked, output, labels, weights, self.chunk_size, wanted, *trained
            )
        return _LinearCrossEntropy.apply(
            picked, head.weight, labels, weights, self.chunk_size, head.chunk or self._chunk, wanted
        )

    def compile_chunks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """torch.compile of the work on a chunk: one graph, whatever the number of masked positions.

        No chunk is filled up: its number of rows is a symbol of the graph. Heads other than a plain
        matrix are not compiled. ``backend`` is torch.compile's.
        """
        compiled = torch.compile(_chunk, backend=backend)

        def chunk(
            h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor
        ) -> tuple[Tensor, Tensor]:
            # What would be another graph: whether h requires a gradient, which evaluation's does
            # not; and a size of 1, which torch takes for a constant.
            h, rows = h.detach(), len(h)
            if rows == 1:
                h, labels, weights = (torch.cat((x, x)) for x in (h, labels, weights))
            for x in (h, labels, weights):
                torch._dynamo.mark_dynamic(x, 0)
            ce, gradient = compiled(h, weight, labels, weights)
            return ce[:rows], gradient[:rows]

        self._chunk = chunk


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a head is h·Wᵀ and nothing else."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and head.bias is None
    )


def _chunk(h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """CE [c] of some positions, h [c, D], and weights · ∂CE/∂logits [c, V], in one buffer."""
    logits = torch.mm(h, weight.t()).float()
    highest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, labels[:, None]) - highest
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(1, keepdim=True)
    ce = (total.log() - chosen).squeeze(1)
    gradient = exponentials.mul_(weights[:, None] / total)
    gradient.scatter_add_(1, labels[:, None], -weights[:, None])
    return ce, gradient.to(h.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ weights · CE(h·Wᵀ, labels), and each CE; gradients are computed with it, chunk by chunk.

    No chunk's fp32 logits outlive it, and none are computed twice. W's gradient is summed in fp32:
    in a narrower dtype, what the chunks give is collected for one product, which sums so by itself,
    as long as that takes less memory than W in fp32; then it is added to that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        chunk_size: int,
        chunk: Callable[..., tuple[Tensor, Tensor]],
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        for_hidden, for_weight = (training and x for x in ctx.needs_input_grad[:2])
        positions, width = hidden.shape
        ce = weights.new_empty(positions)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = None
        room = chunk_size if weight.dtype == torch.float32 else max(chunk_size, 2 * width)
        for first in range(0, positions, room):
            group = slice(first, min(first + room, positions))
            collected = None
            for start in range(first, group.stop, chunk_size):
                place = slice(start, min(start + chunk_size, group.stop))
                values, gradient = chunk(hidden[place], weight, labels[place], weights[place])
                ce[place] = values
                if grad_hidden is not None:
                    torch.mm(gradient, weight, out=grad_hidden[place])
                if place == group:
                    collected = gradient
                elif for_weight:
                    if collected is None:
                        collected = gradient.new_empty(group.stop - first, len(weight))
                    collected[start - first : place.stop - first] = gradient
                del values, gradient  # before the next chunk's are made
            if for_weight:
                grad_weight = _added(grad_weight, collected, hidden[group], positions > room)
        if for_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = grad_hidden, grad_weight
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(ce)
        return (ce * weights).sum(), ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = _scaled(ctx, grad)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.dtype)
        return grad_hidden, grad_weight, *[None] * 5


def _added(total: Tensor | None, gradient: Any, h: Tensor, several: bool) -> Tensor:
    """``total`` and one more product gradientᵀ·h; summed in fp32 if there are ``several``."""
    if total is None:
        product = torch.mm(gradient.t(), h)
        return product.float() if several else product
    if h.dtype == total.dtype:
        return total.addmm_(gradient.t(), h)
    return total.add_(torch.mm(gradient.t(), h))


class _HeadCrossEntropy(torch.autograd.Function):
    """The same for any head: adapters, a bias, another kind of matrix. By autograd, per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Module,
        labels: Tensor,
        weights: Tensor,
        chunk_size: int,
        training: bool,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = training and any(ctx.needs_input_grad)
        losses, grad_hidden = [], torch.empty_like(hidden)
        grads = [torch.zeros_like(p, dtype=torch.float32) for p in trained] if wanted else []
        for start in range(0, len(labels), chunk_size):
            place = slice(start, start + chunk_size)
            with torch.set_grad_enabled(wanted):
                h = hidden[place].detach().requires_grad_(wanted)
                ce = F.cross_entropy(head(h).float(), labels[place], reduction="none")
                losses.append(ce.detach())
                if wanted:
                    found = torch.autograd.grad((ce * weights[place]).sum(), [h, *trained])
                    grad_hidden[place] = found[0]
                    for total, part in zip(grads, found[1:], strict=True):
                        total += part
        values = torch.cat(losses) if losses else weights.new_empty(0)
        ctx.gradients = (grad_hidden, *grads)
        ctx.dtypes = [p.dtype for p in trained]
        ctx.mark_non_differentiable(values)
        return (values * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = _scaled(ctx, grad)
        cast = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        return grad_hidden, *[None] * 5, *cast


def _scaled(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradients kept in ``ctx``, times the scalar ``grad``; they are given out once."""
    kept, ctx.gradients = ctx.gradients, None
    if type(grad) is Tensor and not grad.is_cuda and grad == 1:  # on a GPU, to look is to wait
        return list(kept)
    return [None if g is None else g.mul_(grad) for g in kept]
