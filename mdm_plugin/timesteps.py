"""Samplers of t, the time that sets a row's masking rate p(t) = (1 − eps)·t + eps.

A sampler is called once per optimizer step for the whole global batch:

    t, weight, density = sampler(n, generator)        # t and weight [n], fp64

with n = rows × ranks × accumulation steps, and every rank keeps the rows that are its own.
E over the sampler of ``weight · f(t)`` equals ∫₀¹ f(t) dt for every f: that is what makes
each of them an estimator of the same objective.

To add one, write a ``TimestepSampler`` (``mdm_plugin.contract`` says all that it may offer) and
name it in the config by dotted path.
"""

from typing import Any, Literal

import torch
from torch import Generator, Tensor

from mdm_plugin import pareto
from mdm_plugin.contract import Fitted, Probe, ProbePlan, Times, TimestepSampler
from mdm_plugin.density import Density, uniform_density


def stratified_uniform(n: int, generator: Generator) -> Tensor:
    """n draws of U(0, 1), one in each of n equal strata, in random order. [n], fp64.

    Each draw alone is U(0, 1), because the order is a uniform permutation. Any density's
    quantile function maps these to a stratified sample of that density.
    """
    strata = torch.randperm(n, generator=generator)
    return (strata + torch.rand(n, generator=generator, dtype=torch.float64)) / n


class Uniform(TimestepSampler):
    """t ~ U(0, 1), independently for each row; weight 1 (the paper's *Standard*)."""

    weighted = False

    def __call__(self, n: int, generator: Generator) -> Times:
        t = torch.rand(n, generator=generator, dtype=torch.float64)
        return Times(t, torch.ones_like(t))


class Stratified(TimestepSampler):
    """t ~ U(0, 1) with exactly one draw in each of n equal strata of (0, 1); weight 1.

    Our reading of the paper's *StraTS*; low-discrepancy t as in Kingma et al. 2021. n is
    the global batch, so the whole of (0, 1) is covered in every optimizer step. It removes from
    B what the mean over the data varies with t.
    """

    weighted = False

    def __call__(self, n: int, generator: Generator) -> Times:
        t = stratified_uniform(n, generator)
        return Times(t, torch.ones_like(t))


class Clipped(TimestepSampler):
    """t ~ U(low, high), stratified; weight 1 (the paper's *Clipped*; BD3-LM, Arriola et al. 2025).

    **Biased**: its mean is J restricted to (low, high), 1/(high − low) · ∫ over (low, high) of
    E[l | t] dt, not J. It trades that bias for B, by leaving out the rates whose losses are
    heavy-tailed (small t) or say little (large t).

    Args:
        low, high: 0 ≤ low < high ≤ 1. BD3-LM searches for them; (0.3, 0.8) is among its choices.

    Raises:
        ValueError: if they are not so.
    """

    unbiased = False
    weighted = False

    def __init__(self, low: float = 0.3, high: float = 0.8) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"low {low} and high {high}: use 0 <= low < high <= 1")
        self.low, self.high = low, high

    def __call__(self, n: int, generator: Generator) -> Times:
        u = stratified_uniform(n, generator)
        return Times(self.low + (self.high - self.low) * u, torch.ones_like(u))


class ParetoOptimal(TimestepSampler):
    """t ~ q, weight 1/q(t), with q near q* ∝ sqrt(g(t)² + v(t)) (the paper's *P-POTS*).

    g(t) = E[l | t] and v(t) = E_{x0} Var_m(l | x0, t). For an estimator l/q(t), t ~ q, the
    second moment is ∫ (g² + v)/q dt, least at q*: harder t come more often and count less each.
    The model is probed with the masking in use, and q is fitted to that (``mdm_plugin.pareto``).
    Here, unlike in the paper, q covers all of (0, 1), is mixed with the uniform density so that
    weights stay below 1/mix, and is drawn stratified over the global batch by inverse cdf; all of
    this is unbiased.

    Args:
        family: ``"epr"``, the paper's parametric family; ``"piecewise"``, linear between the
            points of the probe, smoothed.
        target: what q is best for: ``"loss"``, as in the paper, or ``"gradient"``, with the second
            moment of the gradient in place of g² + v: its variance is the one that
            training feels.
        mix: least λ of q = (1 − λ)·p + λ, in (0, 1]. A small probe can miss the rare large losses
            of some t; λ bounds what that costs, and costs little itself (docs/variance.md). It is
            more, up to 1, where the probe shows less gain than noise.
        grid, rows, masks: the probe has grid values of t × rows × masks; forwards for the loss,
            forwards and backwards for the gradient.
        refit_every_n_steps: probe and fit again; None for once, at the start.

    Raises:
        ValueError: on a value out of range.
    """

    def __init__(
        self,
        family: Literal["epr", "piecewise"] = "epr",
        target: Literal["loss", "gradient"] = "gradient",
        mix: float = 0.2,
        grid: int = 30,
        rows: int = 10,
        masks: int = 10,
        refit_every_n_steps: int | None = None,
    ) -> None:
        if family not in ("epr", "piecewise"):
            raise ValueError(f"family is {family!r}: use epr or piecewise")
        if target not in ("loss", "gradient"):
            raise ValueError(f"target is {target!r}: use loss or gradient")
        if not 0 < mix <= 1:
            raise ValueError(f"mix is {mix}: use more than 0, up to 1")
        for name, value, least in (("grid", grid, 3), ("rows", rows, 1), ("masks", masks, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}: use {least} or more")
        if refit_every_n_steps is not None and refit_every_n_steps < 1:
            raise ValueError(f"refit_every_n_steps is {refit_every_n_steps}: use 1 or more")
        self.family, self.target, self.mix = family, target, mix
        self.grid, self.rows, self.masks = grid, rows, masks
        self.refit_every_n_steps = refit_every_n_steps
        self.density: Density | None = None  # until the probe

    def __call__(self, n: int, generator: Generator) -> Times:
        if self.density is None:
            raise RuntimeError("ParetoOptimal draws after its density is fitted: probe first")
        t = self.density.quantile(stratified_uniform(n, generator))
        return Times(t, 1 / self.density(t), self.density)

    def probe_plan(self) -> ProbePlan:
        t = pareto.probe_grid(self.family, self.grid)
        return ProbePlan(t, self.rows, self.masks, self.target, self.refit_every_n_steps)

    def fit(self, measured: Probe) -> Fitted:
        """Fit q to the probe's w; errors as of ``pareto.fit``."""
        fitted = pareto.fit(measured.t, measured.w, family=self.family, mix=self.mix)
        self.density = fitted.density
        epr = fitted.epr._asdict() if fitted.epr else None
        return Fitted(fitted.density, {"family": self.family, "mix": fitted.mix, "epr": epr})

    def state_dict(self) -> dict[str, Any]:
        return {"density": self.density.state_dict() if self.density else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.density = Density.from_state_dict(state["density"]) if state["density"] else None


class Adaptive(TimestepSampler):
    """t ~ q, weight 1/q(t), with q ∝ sqrt(E[l² | t]) as the training losses show it.

    Our reading of the paper's *ISAD*, of which only the name and that it acts on A and B are
    known to us; close to the loss-second-moment resampling of Nichol and Dhariwal 2021. Each
    step's row losses go into ``bins`` equal bins of t, as sums that decay, and q is linear
    between the bins' middles. A step's q depends on earlier steps alone, so it is unbiased;
    stratified over the global batch. Needs no probe, and follows the model.

    Args:
        bins: of t.
        decay: of the sums, per step, in [0, 1).
        mix: λ of q = (1 − λ)·p + λ, in (0, 1]: weights stay below 1/λ.
        warmup_rows: rows that every bin must have seen, until when q is uniform.

    Raises:
        ValueError: on a value out of range.
    """

    learns = True

    def __init__(
        self, bins: int = 20, decay: float = 0.98, mix: float = 0.1, warmup_rows: int = 20
    ) -> None:
        if bins < 2 or not 0 <= decay < 1 or not 0 < mix <= 1 or warmup_rows < 1:
            raise ValueError(
                f"bins {bins} (2 or more), decay {decay} (0 up to below 1), mix {mix} (above 0, up "
                f"to 1), warmup_rows {warmup_rows} (1 or more): one is out of its range"
            )
        self.bins, self.decay, self.mix, self.warmup_rows = bins, decay, mix, warmup_rows
        self.seen = torch.zeros(bins, dtype=torch.long)
        self.sums = torch.zeros(2, bins, dtype=torch.float64)  # of l², of rows; both decay
        self.density = uniform_density()

    def __call__(self, n: int, generator: Generator) -> Times:
        t = self.density.quantile(stratified_uniform(n, generator))
        return Times(t, 1 / self.density(t), self.density)

    def tally(self, t: Tensor, losses: Tensor) -> Tensor:
        """What some rows add to the sums of each bin: [2, bins]; arguments as in the contract."""
        index = (t * self.bins).long().clamp(0, self.bins - 1)
        added = torch.zeros(2, self.bins, dtype=torch.float64)
        values = torch.stack((losses.double().square(), torch.ones_like(losses).double()))
        return added.index_add_(1, index, values)

    def update(self, tally: Tensor) -> None:
        """Add the tally of a whole optimizer step, and renew q."""
        self.sums = self.decay * self.sums + tally
        self.seen += tally[1].round().long()
        self._renew()

    def _renew(self) -> None:
        if int(self.seen.min()) < self.warmup_rows:
            return
        root = (self.sums[0] / self.sums[1].clamp(min=1e-12)).sqrt()
        root = root.clamp(min=float(root.max()) * 1e-6 + 1e-12)
        middle = (torch.arange(self.bins, dtype=torch.float64) + 0.5) / self.bins
        knots = torch.cat((middle.new_zeros(1), middle, middle.new_ones(1)))
        self.density = Density(knots, torch.cat((root[:1], root, root[-1:]))).mixed(self.mix)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.tolist(), "sums": self.sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["seen"]) != self.bins:
            raise ValueError(f"bins is {self.bins}, and was {len(state['seen'])}")
        self.seen = torch.tensor(state["seen"])
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._renew()
