"""What the parts of an estimator offer: the one contract, for ours and for a user's own.

What is minimised is J_w = ∫₀¹ w(t)·L(t) dt, with L(t) the mean row loss at t and w a density that
an **objective** declares: an ``Objective``. With w = 1 it is the bound on the negative
log-likelihood. An estimator of J_w is three parts more, each named in a config by dotted path:

- a **sampler of t** says at which masking rates the rows of a step are trained, and with which
  importance weights: a ``TimestepSampler``;
- a **mask** says which positions are hidden at a rate: a ``Masking``;
- a **loss** says what a prediction costs, and what the sum is divided by: an ``MDMLoss``
  (``mdm_plugin.loss``) or a class derived from it.

The recipes, ``mdm_variance`` and torchtitan's trainer use what is declared here and nothing else.
``__call__`` is to be written; ``fit`` is with a ``probe_plan``, ``tally`` and ``update`` are with
``learns``. What else a class does not write does nothing.
"""

from typing import Any, Literal, NamedTuple

from torch import Generator, Tensor

from mdm_plugin.density import Density, count_weight, uniform_density
from mdm_plugin.loss import MDMLoss


class Objective:
    """What is minimised: w, and how it moves during training (``mdm_plugin.objectives``)."""

    def __call__(self, progress: float) -> Density:
        """w at a moment of training: 0 at the first step, 1 at the last.

        Where w does not move, the same ``Density`` each time: it keeps what it has computed.
        """
        raise NotImplementedError


class Times(NamedTuple):
    """The t of the n rows of a global batch, drawn for an objective's w.

    t: [n], fp64, in [0, 1].
    weight: [n], fp64, the importance weight of each row's t.
    density: the density h on [0, 1] of s = W(t) = ∫₀ᵗ w, that t and weight come from (weight is
        1 / h(s)); None for the uniform one, which is t ~ w.
    """

    t: Tensor
    weight: Tensor
    density: Density | None = None

    def row_weights(self, places: Tensor, n: Tensor, masking: "Masking", w: Density) -> Tensor:
        """The weight that the rows at some places of the global batch are given. [R], fp64.

        places [R]; n [R], eligible positions of each; w: the objective's.
        """
        if masking.by_count and self.density is not None:
            return count_weight(self.density, self.t[places], n, w, masking.antithetic)
        return self.weight[places]


class ProbePlan(NamedTuple):
    """Where a sampler wants the model to be probed.

    t: [T], fp64, increasing, in (0, 1).
    rows, masks: so many rows, and masks of each, at every t.
    target: whose second moment ``Probe.root`` is the root of: the row loss's, or its gradient's.
    every_n_steps: again after so many steps; None for once, before the first.
    """

    t: Tensor
    rows: int
    masks: int
    target: Literal["loss", "gradient"]
    every_n_steps: int | None = None


class Probe(NamedTuple):
    """What the model showed at T values of t, the same on every rank.

    t, g, v: [T], the plan's t, E[l | t] and E_{x0} Var_m(l | x0, t).
    root: [T], the root of the second moment of the target.
    forwards: rows that went through the model, each of a row's views counted.
    shown: [T], the root of the second moment of what ``tally`` gets, of the same draws; None where
        the sampler does not learn from gradients.
    """

    t: Tensor
    g: Tensor
    v: Tensor
    root: Tensor
    forwards: int
    shown: Tensor | None = None


class Fitted(NamedTuple):
    """What a sampler has made of a probe.

    density: the h of s = W(t) that it draws from now.
    figures: what else is to be kept of the fit, as plain numbers and texts.
    """

    density: Density
    figures: dict[str, Any]


class TimestepSampler:
    """A sampler of t, called once per optimizer step for the whole global batch.

    E over the sampler of ``weight · f(t)`` equals ∫₀¹ w(t)·f(t) dt for every f: that makes it an
    estimator of J_w. n = rows × ranks × accumulation steps, and every rank keeps its own rows'
    part.

    Attributes, to be declared by a class or an instance that differs:
        weighted: False where all weights are 1. Losses that would undo weights are refused.
        learns: True where ``tally`` and ``update`` are to be called.
        learns_from: what ``tally`` gets of each row: its loss, or the norm of its gradient.
    """

    weighted: bool = True
    learns: bool = False
    learns_from: Literal["loss", "gradient"] = "loss"

    def __call__(self, n: int, generator: Generator, w: Density) -> Times:
        """t, weights and density of n rows; random numbers come from ``generator`` alone.

        w: the objective's density of t. ``w.quantile`` maps a uniform number to t ~ w.
        """
        raise NotImplementedError

    def probe_plan(self, w: Density) -> ProbePlan | None:
        """Where the model is to be probed before ``fit``; None for not at all."""
        return None

    def fit(self, measured: Probe, w: Density) -> Fitted:
        """Take in a probe at ``probe_plan``'s t; the same call on every rank.

        Raises:
            ValueError: if nothing can be made of it.
        """
        raise NotImplementedError

    def tally(self, t: Tensor, losses: Tensor) -> Tensor:
        """What some rows add to what is learnt: a tensor to be summed over micro-batches and ranks.

        t [R] and losses [R]: row losses l in nats, without importance weights, on the CPU; with
        ``learns_from`` ``"gradient"`` the norms G of the rows' gradients at the hidden states that
        enter the first layer, likewise (``mdm_plugin.training.hidden``).
        """
        raise NotImplementedError

    def update(self, tally: Tensor) -> None:
        """Take in the sum of the tallies of a whole optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What ``fit`` and ``update`` have taught, as numbers, texts, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class Views(NamedTuple):
    """V masked views of each of R rows.

    mask: [V, R, L], bool, true where the token is to be predicted.
    inverse_p: [V, R], fp64, 1 / (the share of positions masked in expectation). The row loss
        of view v is ``inverse_p[v] / N · Σ CE`` over its masked positions, and the estimator
        is the mean over views.
    hidden: [V, R, L], bool, true where the model sees the mask token; None for ``mask`` itself.
    """

    mask: Tensor
    inverse_p: Tensor
    hidden: Tensor | None = None


class Masking:
    """A sampler of masks, given each row's t and its noise.

    Noise comes in as an argument, so that it can be a function of (seed, step, place).

    Attributes, to be declared by a class or an instance that differs:
        views: V, forwards per row.
        by_count: True where the views depend on t through the count that it gives alone
            (``density.masked_count``): then rows get the weight of their count in place of that of
            their t (``density.count_weight``).
        antithetic: True where they depend on the count at the objective's other end too
            (``density.opposite_count``).
        causal: True where every token is predicted from those before it: for a causal model.
        uses_t: False where t changes nothing; then no sampler may weigh it.
    """

    views: int = 1
    by_count: bool = False
    antithetic: bool = False
    causal: bool = False
    uses_t: bool = True

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        """The views of R rows of L positions.

        t: [R], fp64. u: [R, L], fp64, U(0, 1). eligible: [R, L], bool, what may be masked. w: the
        objective's density of t, which masks by count draw their counts by.
        """
        raise NotImplementedError


_ELBO = uniform_density()


class Blocks(NamedTuple):
    """How a model writes its rows: block by block (``mdm_plugin.models.blocks``).

    length: S, tokens of a block. one_t: all blocks of a row have its t; else each has its own, and
    the sampler of t is asked for as many as the global batch has blocks with something to predict.
    """

    length: int
    one_t: bool = False


class Estimator(NamedTuple):
    """The three parts, the id of the token that hides a position, and the objective's w now.

    blocks: of a model that writes block by block. A row's objective is then that of its blocks,
    each given the clean ones before it, weighted by their eligible positions; to the sampler and
    the mask a block is what a row is without blocks.
    """

    timesteps: TimestepSampler
    masking: Masking
    loss: MDMLoss
    mask_id: int
    w: Density = _ELBO
    blocks: Blocks | None = None
