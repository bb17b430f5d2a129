"""What the study compares: each method as overrides of configs/finetune.yaml."""

from typing import NamedTuple

# So that Standard ends between 30 and 70 % on each.
STEPS = {"chain": 1280, "legs": 640, "sudoku": 480}


class Method(NamedTuple):
    """One line of the study's table.

    label: as it is shown.
    family: those that share a tuned learning rate.
    rows, views: a step's rows, and forwards for each of them.
    overrides: of the config.
    budget: steps, as a multiple of the task's.
    """

    label: str
    family: str
    rows: int
    views: int
    overrides: tuple[str, ...]
    budget: float = 1.0


def _of(rows: int, steps: int) -> tuple[str, ...]:
    """Steps of so many rows out of 2,560 in each epoch."""
    epoch = min(steps, 2560 // rows)
    return (f"batch_size={rows}", f"epochs={steps // epoch}", f"max_steps_per_epoch={epoch}")


def _sampler(name: str, *more: str) -> tuple[str, ...]:
    return (f"timesteps._component_=mdm_plugin.timesteps.{name}", *more)


def _mask(name: str) -> tuple[str, ...]:
    return (f"masking._component_=mdm_plugin.masking.{name}",)


_PARETO = _sampler("ParetoOptimal", "timesteps.grid=20")
_COUNTS = _sampler("Stratified") + _mask("FixedCount")


def _objective(name: str, **arguments: float) -> tuple[str, ...]:
    given = (f"objective.{key}={value}" for key, value in arguments.items())
    return (f"objective._component_=mdm_plugin.objectives.{name}", *given)


_CLIPPED = _sampler("Stratified") + _objective("Window", low=0.3, high=0.8)
_WINDOW = _COUNTS + _objective("Window", low=0.4, high=1.0)
_WIDENING = _COUNTS + _objective("Widening", low=0.5, high=1.0)
_MUON = ("optimizer._component_=mdm_plugin.training.Muon", "~optimizer.fused")
# Averages over fewer steps than the usual 0.95 of Muon's momentum and 0.9 of AdamW's first beta.
_BETA_60 = ("optimizer.betas=[0.6,0.98]",)
_MUON_80 = (*_MUON, "optimizer.momentum=0.8", *_BETA_60)
_EMA = ("ema._component_=mdm_plugin.training.EMA", "ema.decay=0.99")
CAUSAL = ("model.causal=True", *_sampler("Uniform"), *_mask("NextToken"))

FIRST = {
    "standard": Method("Standard", "one view", 32, 1, ()),
    "clipped": Method("Clipped: window (.3, .8)", "one view", 32, 1, _CLIPPED),
    "ema": Method("EMA", "one view", 32, 1, _EMA),
    "stratified": Method("Stratified (StraTS)", "one view", 32, 1, _sampler("Stratified")),
    "systematic": Method("Systematic (SyRM)", "one view", 32, 1, _mask("Systematic")),
    "adaptive": Method("Adaptive (ISAD)", "one view", 32, 1, _sampler("Adaptive")),
    "ppots": Method("P-POTS", "one view", 32, 1, _PARETO),
    "count": Method(
        "FixedCount", "one view, counts", 32, 1, _sampler("Stratified") + _mask("FixedCount")
    ),
    "count_pareto": Method(
        "P-POTS FixedCount", "one view, counts", 32, 1, _PARETO + _mask("FixedCount")
    ),
    "independent": Method("two independent masks", "two views", 32, 2, _mask("Independent")),
    "mirror": Method("MIRROR", "two views", 32, 2, _mask("Mirror")),
    "ppots_mirror": Method("P-POTS + MIRROR", "two views", 32, 2, _PARETO + _mask("Mirror")),
    "complement_pareto": Method(
        "P-POTS Complement", "two views, counts", 32, 2, _PARETO + _mask("Complement")
    ),
    "standard_64": Method("Standard, twice the rows", "twice the rows", 64, 1, ()),
    "count_pareto_64": Method(
        "P-POTS FixedCount, twice the rows",
        "two views, counts",
        64,
        1,
        _PARETO + _mask("FixedCount"),
    ),
    "autoregressive": Method(
        "autoregressive", "autoregressive", 32, 1, (*CAUSAL, "run_val_every_n_steps=null")
    ),
}
# What is minimised, and by which optimizer; with Standard and its like once more, from the same
# pretrained model as these (the first part's was pretrained on another machine, and is another).
SECOND = {
    "standard_2": FIRST["standard"],
    "count_2": FIRST["count"],
    "ppots_2": FIRST["ppots"],
    "stream": Method("P-POTS from the stream", "one view", 32, 1, _sampler("ParetoStream")),
    "widening": Method("FixedCount, widening (.5, 1)", "one view, window", 32, 1, _WIDENING),
    "standard_muon": Method("Standard, Muon", "Muon", 32, 1, _MUON),
    "window_muon": Method(
        "FixedCount, window (.4, 1), Muon", "Muon, window", 32, 1, _WINDOW + _MUON
    ),
    "standard_64_2": FIRST["standard_64"],
    "window_muon_64": Method(
        "FixedCount, window (.4, 1), Muon, twice the rows",
        "Muon, window",
        64,
        1,
        _WINDOW + _MUON,
    ),
    "autoregressive_2": FIRST["autoregressive"],
    "widening_60": Method(
        "FixedCount, widening (.5, 1), β₁ 0.6", "window, β₁ 0.6", 32, 1, _WIDENING + _BETA_60
    ),
    "standard_muon_80": Method("Standard, Muon 0.8", "Muon 0.8", 32, 1, _MUON_80),
    "window_muon_80": Method(
        "FixedCount, window (.4, 1), Muon 0.8", "Muon 0.8, window", 32, 1, _WINDOW + _MUON_80
    ),
    "window_muon_64_80": Method(
        "FixedCount, window (.4, 1), Muon 0.8, twice the rows",
        "Muon 0.8, window",
        64,
        1,
        _WINDOW + _MUON_80,
    ),
}
METHODS = {**FIRST, **SECOND}
# A family's learning rate is tuned on one of its methods, with a seed that the study does not use.
TUNED_ON = {
    "one view": "standard",
    "one view, counts": "count",
    "two views": "mirror",
    "twice the rows": "standard_64",
    "two views, counts": "complement_pareto",
    "autoregressive": "autoregressive",
    "one view, window": "widening",
    "Muon": "standard_muon",
    "Muon, window": "window_muon",
    "window, β₁ 0.6": "widening_60",
    "Muon 0.8": "standard_muon_80",
    "Muon 0.8, window": "window_muon_80",
}
RATES = ("2e-3", "4e-3", "8e-3", "16e-3")
HIGHER = (*RATES, "32e-3", "64e-3")
# The families whose best of RATES was its highest, and which were taken further.
TAKEN_FURTHER = ("Muon 0.8", "Muon 0.8, window")
TUNING_SEEDS = (1,)
# How much an optimizer averages over steps was chosen as the rates were: on validation rows, at the
# rate of the family. Momentum and β₁; of AdamW β₁ alone. The usual ones are tried under names of
# their own, so that these runs do not take part in the choice of their own family's rate.
MOMENTA = {
    "widening_60": {"0.9": "widening_90", "0.8": "widening_80", "0.6": "widening_60"},
    "standard_muon_80": {"0.95, 0.9": "standard_muon_95", "0.8, 0.6": "standard_muon_80"},
    "window_muon_80": {
        "0.95, 0.9": "window_muon_95",
        "0.9, 0.6": "window_muon_90",
        "0.8, 0.9": "window_muon_80_90",
        "0.8, 0.6": "window_muon_80",
        "0.7, 0.6": "window_muon_70",
    },
}
SEEDS = (42, 731, 20231, 5, 77)


class Cause(NamedTuple):
    """A method with one thing changed, to see whether that thing is why.

    like: the method of the study that it is compared with.
    change: in words.
    method: with the change.
    rate: the learning rate; None for that of the method's family.
    tasks: on which.
    """

    like: str
    change: str
    method: Method
    rate: str | None = None
    tasks: tuple[str, ...] = ("chain", "sudoku")


def _changed(
    like: str, change: str, *overrides: str, budget: float = 1.0, rate: str | None = None
) -> Cause:
    method = METHODS[like]
    given = (*method.overrides, *overrides)
    return Cause(like, change, method._replace(overrides=given, budget=budget), rate)


def _stopped(share: str, budget: float, *tasks: str) -> Cause:
    change = _changed("autoregressive_2", f"{share} of the steps", budget=budget)
    return change._replace(tasks=tasks)


def _stratified(like: str, mask: str) -> Cause:
    method = METHODS[like]._replace(overrides=_sampler("Stratified") + _mask(mask))
    return Cause(like, "Stratified in place of P-POTS", method)


def _from(edge: str, low: float) -> Cause:
    change = _changed("window_muon_80", f"from {edge}", f"objective.low={low}")
    return change._replace(tasks=tuple(STEPS))


_REFIT = ("a probe every 80 steps", "timesteps.refit_every_n_steps=80")
_ORDERED = ("the same rows in the same order for all seeds (no C)", "shuffle=False")
CAUSES = {
    "autoregressive_short": _changed("autoregressive", "an eighth of the steps", budget=1 / 8),
    "standard_ordered": _changed("standard", *_ORDERED),
    "ppots_refit": _changed("ppots", *_REFIT),
    "ppots_mix": _changed("ppots", "weights below 2, not 5", "timesteps.mix=0.5"),
    "ppots_loss": _changed(
        "ppots", "q for the loss's variance, as in the paper", "timesteps.target=loss"
    ),
    "ppots_slow": _changed("ppots", "lr 2e-3", rate="2e-3"),
    "ppots_mirror_ordered": _changed("ppots_mirror", *_ORDERED),
    "ppots_mirror_refit": _changed("ppots_mirror", *_REFIT),
    "ppots_mirror_slow": _changed("ppots_mirror", "lr 4e-3", rate="4e-3"),
    "ppots_mirror_long": _changed("ppots_mirror", "twice the steps", budget=2),
    "count_pareto_refit": _changed("count_pareto", *_REFIT),
    "count_64": _stratified("count_pareto_64", "FixedCount"),
    "complement": _stratified("complement_pareto", "Complement"),
    "autoregressive_quarter": _stopped("a quarter", 1 / 4, "chain", "legs"),
    "autoregressive_half": _stopped("a half", 1 / 2, "chain", "legs"),
    "elbo_muon_80": _from("0, which is the ELBO", 0.0),
    "window_15_muon_80": _from("0.15", 0.15),
}


def _of_momentum(like: str, *overrides: str) -> Method:
    return METHODS[like]._replace(overrides=METHODS[like].overrides + overrides)


TRIED = {
    "widening_90": METHODS["widening"],
    "standard_muon_95": METHODS["standard_muon"],
    "window_muon_95": METHODS["window_muon"],
    "widening_80": _of_momentum("widening", "optimizer.betas=[0.8,0.98]"),
    "window_muon_90": _of_momentum("window_muon_80", "optimizer.momentum=0.9"),
    "window_muon_80_90": _of_momentum("window_muon_80", "optimizer.betas=[0.9,0.98]"),
    "window_muon_70": _of_momentum("window_muon_80", "optimizer.momentum=0.7"),
}


def rates(family: str) -> tuple[str, ...]:
    """Those that a family is tuned over."""
    return HIGHER if family in TAKEN_FURTHER else RATES


def find(method: str) -> Method:
    """By its name, in METHODS, CAUSES or TRIED."""
    if method in TRIED:
        return TRIED[method]
    return METHODS[method] if method in METHODS else CAUSES[method].method


def overrides(method: str, task: str) -> list[str]:
    """Of configs/finetune.yaml, without seed and learning rate."""
    given = find(method)
    return [*given.overrides, *_of(given.rows, round(STEPS[task] * given.budget))]
