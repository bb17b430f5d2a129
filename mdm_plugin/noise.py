"""Random numbers as a function of what they are for, never of what was drawn before.

Each draw is keyed by (seed, purpose, step, place in the global batch). So a run that resumes
at step s sees the noise that it would have seen, and a row sees the same noise whichever
rank, micro-batch or accumulation step it falls to.
"""

from hashlib import blake2b

import torch
from torch import Tensor

_BLOCK = 64


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose state depends on ``key`` alone, e.g. ``(seed, "t", step)``.

    The key is hashed to 64 bits, so neighbouring seeds, steps and rows give unrelated
    streams. (torch's CPU generator keeps 32 of the bits: two of a run's streams may coincide
    by chance, which is as harmless as any other coincidence of random numbers.)
    """
    return torch.Generator().manual_seed(seed_of(*key))


def seed_torch(*key: int | str) -> None:
    """Set torch's own generators by ``key``, for what draws from them: dropout, and optimizers that
    round at random. What these draw is then no matter of history; but it is of the sharding."""
    torch.manual_seed(seed_of(*key))


def seed_of(*key: int | str) -> int:
    """64 bits that depend on ``key`` alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def keyed_uniform(*key: int | str, places: Tensor, length: int) -> Tensor:
    """U[0, 1) of rows at some places of a global batch. [R, length], fp64.

    places [R], ≥ 0. Number j of place i depends on (key, i, j) alone: not on which other places
    are asked for, and not on ``length``, so that padding decides nothing. Places are drawn in
    blocks of 64, one generator each: a generator of its own for every row would cost many times
    as much, and one for the whole batch would have each rank draw the noise of all.
    """
    u = torch.empty(len(places), length, dtype=torch.float64)
    blocks = places // _BLOCK
    for block in blocks.unique().tolist():
        generator = keyed_generator(*key, block)
        drawn = torch.rand(length, _BLOCK, generator=generator, dtype=torch.float64)
        here = blocks == block
        u[here] = drawn.T[places[here] % _BLOCK]
    return u
