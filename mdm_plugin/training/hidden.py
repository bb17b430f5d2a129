"""How large each row's gradient is, from training's own backward pass: for samplers of t that learn
from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from mdm_plugin.training.corruption import Corrupted


@contextmanager
def token_norms(model: nn.Module) -> Iterator[list[Tensor]]:
    """Measure gradients at the hidden states that enter the first layer, while it is open.

    All that a row's loss changes below comes through them, so their norm goes with that of the
    gradient of the parameters; at the last hidden states, before the head, it does so much less
    (docs/variance.md).

    model: its ``tok_embeddings``, frozen or not, give those states, [B, L, D]. The list gets, for
    each backward pass, [B, L] in fp32: the norm of each token's gradient.
    """
    found: list[Tensor] = []

    def measure(gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
        found.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def watch(_: nn.Module, given: Any, hidden: Tensor) -> None:
        if torch.is_grad_enabled():
            hidden.requires_grad_().register_hook(measure)

    handle = model.get_submodule("tok_embeddings").register_forward_hook(watch)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def row_norms(batch: "Corrupted", norms: Tensor, normalizer: Tensor) -> Tensor:
    """G of each row: the norm of the gradient, at the first hidden states of all its views, of its
    part of the loss, without importance weight and normaliser. [R], on the device of norms.

    norms: of ``token_norms``, for this batch. normalizer: what its loss was divided by. A row of
    weight 0 has G = 0.
    """
    squares = norms.square()
    if batch.sequence is None:
        total = squares.sum(1)
    else:  # packed: of each token the sequence that it belongs to; the filling's is one more
        total = squares.new_zeros(len(batch.row_scale) + 1)
        total = total.index_add_(0, batch.sequence.to(norms.device), squares[0])[:-1]
    weight = batch.importance.to(norms.device, torch.float32).abs()
    size = total.reshape(batch.views, -1).sum(0).sqrt() * normalizer
    return torch.where(weight == 0, 0, size / weight)
