"""Random numbers as a function of what they are for, never of what was drawn before.

Each draw is keyed by (seed, purpose, step, place in the global batch). So a run that resumes
at step s sees the noise that it would have seen, and a row sees the same noise whichever
rank, micro-batch or accumulation step it falls to.
"""

from hashlib import blake2b

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose state depends on ``key`` alone, e.g. ``(seed, "t", step)``.

    The key is hashed to 64 bits, so neighbouring seeds, steps and rows give unrelated
    streams. (torch's CPU generator keeps 32 of the bits: two of a run's streams may coincide
    by chance, which is as harmless as any other coincidence of random numbers.)
    """
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def keyed_uniform(*key: int | str, size: int) -> Tensor:
    """``size`` numbers of U[0, 1) in fp64 that depend on ``key`` alone."""
    return torch.rand(size, generator=keyed_generator(*key), dtype=torch.float64)
