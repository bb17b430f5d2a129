"""Forwards of a sharded model by ranks that do not need the same number of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mdm_plugin.distributed.world import World


@contextmanager
def uneven_forwards(model: nn.Module, world: World) -> Iterator[None]:
    """Within it, each rank runs as many forwards of ``model`` as it needs. Called on every rank.

    FSDP2 gathers a layer's weights when all ranks ask for them. So a rank that needs no more
    forwards goes on with small ones, unused, until no rank needs any: each forward begins with a
    sum over the ranks that says so, as in torch's ``Join`` for uneven inputs. A model that is whole
    on every rank needs none of this, and has none of it.

    Args:
        model: an ``MDMTransformer``. Nothing but its forwards may be done together within.
        world: the ranks that hold its shards and copies.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        yield
        return

    def announce(*_: object) -> None:
        world.sum(torch.ones(1))

    with model.register_forward_pre_hook(announce, prepend=True):
        yield
    tokens = torch.zeros(2, 2, dtype=torch.long, device=world.device)
    mask = torch.ones(2, 1, 2, dtype=torch.bool, device=world.device)
    with torch.no_grad():
        while world.sum(torch.zeros(1)).item():
            model(tokens, mask=mask)
