"""Samplers of t, the time that sets a row's masking rate p(t) = (1 − eps)·t + eps.

A sampler is called once per optimizer step for the whole global batch:

    t, weight, density = sampler(n, generator, w)        # t and weight [n], fp64

with n = rows × ranks × accumulation steps, and every rank keeps the rows that are its own.
w is the objective's density of t (``mdm_plugin.objectives``; 1 for the likelihood bound). E over
the sampler of ``weight · f(t)`` equals ∫₀¹ w(t)·f(t) dt for every f: that is what makes each of
them an estimator of the same objective. They draw s = W(t) = ∫₀ᵗ w, on whose scale w is uniform: by
the density h(s), with the weight 1/h(s).

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
    """t ~ w, independently for each row; weight 1 (the paper's *Standard*, where w = 1)."""

    weighted = False

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        s = torch.rand(n, generator=generator, dtype=torch.float64)
        return Times(w.quantile(s), torch.ones_like(s))


class Stratified(TimestepSampler):
    """t ~ w with exactly one draw in each of n strata of equal share in w; weight 1.

    Our reading of the paper's *StraTS*; low-discrepancy t as in Kingma et al. 2021. n is
    the global batch, so all of w is covered in every optimizer step. B has a part that all rows
    share: their mean loss differs between one t and another. This part is removed.
    """

    weighted = False

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        s = stratified_uniform(n, generator)
        return Times(w.quantile(s), torch.ones_like(s))


def _drawn(h: Density, n: int, generator: Generator, w: Density) -> Times:
    """n stratified draws of s ~ h, as t."""
    s = h.quantile(stratified_uniform(n, generator))
    return Times(w.quantile(s), 1 / h(s), h)


def _moved(knots: Tensor, values: Tensor, mix: float) -> Density:
    """A density through values at knots that need not differ, nor reach 0 and 1; ``mixed``."""
    knots, order = knots.clamp(0, 1).sort(stable=True)
    values = values[order]
    keep = torch.cat((knots.new_ones(1), knots.diff())) > 1e-9
    keep &= (knots > 0) & (knots < 1)
    whole = torch.cat((knots.new_zeros(1), knots[keep], knots.new_ones(1)))
    # Of several at an end, where w has no share, the nearest counts.
    first, last = values[knots <= 0][-1:], values[knots >= 1][:1]
    ends = first if len(first) else values[:1], last if len(last) else values[-1:]
    values = torch.cat((ends[0], values[keep], ends[1]))
    values = values / torch.trapezoid(values, whole)
    return Density(whole, (1 - mix) * values + mix)


class ParetoOptimal(TimestepSampler):
    """t ~ w·h, weight 1/h, with w·h near q* ∝ w(t)·sqrt(g(t)² + v(t)) (the paper's *P-POTS*).

    g(t) = E[l | t] and v(t) = E_{x0} Var_m(l | x0, t). For an estimator w·l/q(t), t ~ q, the
    second moment is ∫ w²·(g² + v)/q dt, least at q*: harder t come more often and count less each.
    With s = W(t), on whose scale w is uniform, that is h(s) ∝ sqrt(g² + v). The model is probed
    with the masking in use, at s of a grid, and h is fitted to that (``mdm_plugin.pareto``). Here,
    unlike in the paper, h covers all of (0, 1), is mixed with the uniform density so that weights
    stay below 1/mix, and is drawn stratified over the global batch by inverse cdf; all of this is
    unbiased. Where w moves after the probe, h moves with it as a function of t.

    Args:
        family: ``"epr"``, the paper's parametric family; ``"piecewise"``, linear between the
            points of the probe, smoothed.
        target: what h is best for: ``"loss"``, as in the paper, or ``"gradient"``, with the second
            moment of the gradient in place of g² + v: its variance is the one that
            training feels.
        mix: least λ of h = (1 − λ)·p + λ, in (0, 1]. A small probe can miss the rare large losses
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
        self.density: Density | None = None  # h, from the probe on
        self.probed_at = uniform_density()  # w, when h was fitted

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        if self.density is None:
            raise RuntimeError("ParetoOptimal draws after its density is fitted: probe first")
        h, then = self.density, self.probed_at
        if not (torch.equal(w.knots, then.knots) and torch.equal(w.values, then.values)):
            # As a function of t it is what it was; t that had no share in w then get its nearest.
            t = then.quantile(h.knots.clamp(max=1 - 1e-9))
            h = _moved(w.cdf(t), h.values, self.mix)
        return _drawn(h, n, generator, w)

    def probe_plan(self, w: Density) -> ProbePlan:
        t = w.quantile(pareto.probe_grid(self.family, self.grid))
        return ProbePlan(t, self.rows, self.masks, self.target, self.refit_every_n_steps)

    def fit(self, measured: Probe, w: Density) -> Fitted:
        """Fit h to the probe's root; errors as of ``pareto.fit``."""
        s = w.cdf(measured.t)
        fitted = pareto.fit(s, measured.root, family=self.family, mix=self.mix)
        self.density, self.probed_at = fitted.density, w
        epr = fitted.epr._asdict() if fitted.epr else None
        return Fitted(fitted.density, {"family": self.family, "mix": fitted.mix, "epr": epr})

    def state_dict(self) -> dict[str, Any]:
        return {
            "density": self.density.state_dict() if self.density else None,
            "probed_at": self.probed_at.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.density = Density.from_state_dict(state["density"]) if state["density"] else None
        self.probed_at = Density.from_state_dict(state["probed_at"])


class Adaptive(TimestepSampler):
    """t ~ w·h, weight 1/h, with h ∝ sqrt(E[l² | t]) as the training losses show it.

    Our reading of the paper's *ISAD*, of which only the name and that it acts on A and B are
    known to us; close to the loss-second-moment resampling of Nichol and Dhariwal 2021. Each
    step's row losses go into ``bins`` equal bins of t, as sums that decay, and h is linear
    between the bins' middles. A step's h depends on earlier steps alone, so it is unbiased;
    stratified over the global batch. Needs no probe, and follows the model.

    Args:
        bins: of t.
        decay: of the sums, per step, in [0, 1).
        mix: λ of h = (1 − λ)·p + λ, in (0, 1]: weights stay below 1/λ.
        warmup_rows: rows that a bin must have seen to count. h is uniform until all bins have that
            w has a share in of half of 1/bins or more; others are as their nearest.

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

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        return _drawn(self.density(w), n, generator, w)

    def density(self, w: Density) -> Density:
        """h of s = W(t), from what has been seen."""
        edges = torch.arange(self.bins + 1, dtype=torch.float64) / self.bins
        share, known = w.cdf(edges).diff(), self.seen >= self.warmup_rows
        if not known[share > 0.5 / self.bins].all():
            return uniform_density()
        known &= share > 0
        root = (self.sums[0] / self.sums[1].clamp(min=1e-12)).sqrt()[known]
        root = root.clamp(min=float(root.max()) * 1e-6 + 1e-12)
        middle = ((torch.arange(self.bins, dtype=torch.float64) + 0.5) / self.bins)[known]
        return _moved(w.cdf(middle), root, self.mix)

    def tally(self, t: Tensor, losses: Tensor) -> Tensor:
        """What some rows add to the sums of each bin: [2, bins]; arguments as in the contract."""
        index = (t * self.bins).long().clamp(0, self.bins - 1)
        added = torch.zeros(2, self.bins, dtype=torch.float64)
        values = torch.stack((losses.double().square(), torch.ones_like(losses).double()))
        return added.index_add_(1, index, values)

    def update(self, tally: Tensor) -> None:
        """Add the tally of a whole optimizer step."""
        self.sums = self.decay * self.sums + tally
        self.seen += tally[1].round().long()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.tolist(), "sums": self.sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["seen"]) != self.bins:
            raise ValueError(f"bins is {self.bins}, and was {len(state['seen'])}")
        self.seen = torch.tensor(state["seen"])
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)


class ParetoStream(TimestepSampler):
    """P-POTS that stays fresh: ``ParetoOptimal``'s h, started by one probe and kept by training.

    A step's backward pass shows how large each row's gradient is at the hidden states that enter
    the first layer: its norm G. Its decayed mean square in equal bins of t follows the model, and
    the probe says how that of the parameters' gradient goes with it:

        h(s) ∝ c(t)·sqrt(E[G² | t]),   c(t) = sqrt(E‖∇l‖² / E G²) of the probe's draws

    The probe's rows are the first of the means, and forgotten at the pace of all others. With
    ``target: loss`` G is the row loss itself, and c is 1: ``Adaptive``, with a probe to start it.
    A step's h depends on earlier steps alone, so it is unbiased; it is smoothed over neighbouring
    bins, linear between their middles, and drawn as ``ParetoOptimal`` draws.

    Args:
        target, mix, rows, masks, refit_every_n_steps: as of ``ParetoOptimal``.
        grid: points of the probe.
        bins: of t.
        decay: of the rows that the means are of, per step, in [0, 1).

    Raises:
        ValueError: on a value out of range.
    """

    learns = True

    def __init__(
        self,
        target: Literal["loss", "gradient"] = "gradient",
        mix: float = 0.2,
        grid: int = 20,
        rows: int = 10,
        masks: int = 10,
        bins: int = 20,
        decay: float = 0.98,
        refit_every_n_steps: int | None = None,
    ) -> None:
        self.probing = ParetoOptimal("epr", target, mix, grid, rows, masks, refit_every_n_steps)
        if bins < 2 or not 0 <= decay < 1:
            raise ValueError(
                f"bins {bins} (2 or more), decay {decay} (0 up to below 1): one is out of its range"
            )
        self.learns_from, self.mix = target, mix
        self.seen = pareto.Bins(bins, decay)
        self.factors: Tensor | None = None  # c at the bins' middles, from the probe on

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        return _drawn(self.density(w), n, generator, w)

    def density(self, w: Density) -> Density:
        """h of s = W(t). Bins of which less than a row is left are as their nearest."""
        if self.factors is None:
            raise RuntimeError("ParetoStream draws after a probe has started it: probe first")
        used = self.seen.used(w)
        known = used & (self.seen.counts >= 1)
        known = known if known.any() else used
        root = (self.factors * self.seen.means.sqrt())[known]
        root = pareto.smoothed(root.clamp(min=float(root.max()) * 1e-6 + 1e-12))
        t = self.seen.middles[known]
        return _moved(t if w.is_uniform else w.cdf(t), root, self.mix)

    def probe_plan(self, w: Density) -> ProbePlan:
        return self.probing.probe_plan(w)

    def fit(self, measured: Probe, w: Density) -> Fitted:
        """Take in a probe: for c, and as the first rows that were seen.

        Raises:
            ValueError: if its second moments are zero or not finite.
        """
        root, plan = measured.root, self.probing
        shown = root if measured.shown is None else measured.shown
        if not (root.isfinite() & shown.isfinite() & (root > 0) & (shown > 0)).all():
            raise ValueError("the probe's second moments are zero or not finite: broken model")
        ratio = pareto.smoothed(root / shown)
        self.factors = pareto.curve(measured.t, ratio, self.seen.middles)
        rows = plan.grid * plan.rows * plan.masks / len(self.seen.middles)
        self.seen.begin(measured.t, shown.square(), rows * self.seen.used(w))
        return Fitted(self.density(w), {"c": self.factors.tolist()})

    def tally(self, t: Tensor, losses: Tensor) -> Tensor:
        """What some rows add to the bins: [2, bins]; arguments as in the contract."""
        return self.seen.tally(t, losses)

    def update(self, tally: Tensor) -> None:
        """Take in the tally of a whole optimizer step."""
        self.seen.update(tally)

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": self.seen.means.tolist(),
            "counts": self.seen.counts.tolist(),
            "factors": None if self.factors is None else self.factors.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["means"]) != len(self.seen.means):
            raise ValueError(f"bins is {len(self.seen.means)}, and was {len(state['means'])}")
        self.seen.means, self.seen.counts = (
            torch.tensor(state[key], dtype=torch.float64) for key in ("means", "counts")
        )
        factors = state["factors"]
        self.factors = None if factors is None else torch.tensor(factors, dtype=torch.float64)
