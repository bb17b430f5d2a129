"""Samplers of t, the time that sets a row's masking rate p(t) = (1 − eps)·t + eps.

A sampler is called once per optimizer step for the whole global batch:

    t, weight = sampler(n, generator)        # both [n], fp64

with n = rows × ranks × accumulation steps, and every rank keeps the rows that are its own.
E over the sampler of ``weight · f(t)`` equals ∫₀¹ f(t) dt for every f: that is what makes
each of them an estimator of the same objective.

To add one, write a class with this ``__call__`` and name it in the config by dotted path.
"""

import torch
from torch import Generator, Tensor


def stratified_uniform(n: int, generator: Generator) -> Tensor:
    """n draws of U(0, 1), one in each of n equal strata, in random order. [n], fp64.

    Each draw alone is U(0, 1), because the order is a uniform permutation. Any density's
    quantile function maps these to a stratified sample of that density.
    """
    strata = torch.randperm(n, generator=generator)
    return (strata + torch.rand(n, generator=generator, dtype=torch.float64)) / n


class Uniform:
    """t ~ U(0, 1), independently for each row; weight 1 (the paper's *Standard*)."""

    def __call__(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        t = torch.rand(n, generator=generator, dtype=torch.float64)
        return t, torch.ones_like(t)


class Stratified:
    """t ~ U(0, 1) with exactly one draw in each of n equal strata of (0, 1); weight 1.

    Our reading of the paper's *StraTS*; low-discrepancy t as in Kingma et al. 2021. n is
    the global batch, so the whole of (0, 1) is covered in every optimizer step. It removes
    nearly all of B's share within a batch that comes from t alone.
    """

    def __call__(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        t = stratified_uniform(n, generator)
        return t, torch.ones_like(t)
