"""The gradient of a model that may be sharded: its norm, and parts of it as a vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mdm_plugin.distributed.parameters import named_parameters
from mdm_plugin.noise import keyed_generator


def total_norm(model: nn.Module) -> Tensor:
    """The norm of the whole gradient, the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradient(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the gradient to a norm of at most ``max_norm``; the norm before, on every rank."""
    limit = float("inf") if max_norm is None else max_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def folded_gradient(
    model: nn.Module, dimensions: int | None, seed: int = 0, rank: int = 0
) -> Tensor:
    """This rank's part of the gradient as one vector, [D], fp32; whole if ``dimensions`` is None.

    Else folded to that many: coordinate i goes to i mod ``dimensions`` with a random sign, the
    same at each call. E over signs of an inner product is that of the whole vectors, with a
    relative error of about sqrt(2 / dimensions) for a squared norm.
    """
    parts = []
    for name, parameter in named_parameters(model).items():
        if parameter.grad is None:
            continue
        grad = parameter.grad
        flat = (grad.to_local() if isinstance(grad, DTensor) else grad).detach().flatten().float()
        if dimensions is not None:
            generator = keyed_generator(seed, "signs", name, rank)
            signs = torch.randint(2, flat.shape, generator=generator, dtype=torch.int8) * 2 - 1
            flat = flat * signs.to(flat.device)
            flat = F.pad(flat, (0, -len(flat) % dimensions)).view(-1, dimensions).sum(0)
        parts.append(flat)
    return torch.cat(parts) if dimensions is None else torch.stack(parts).sum(0)
