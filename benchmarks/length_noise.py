"""The noise of the gradient at 32, 128 and 512 tokens: masks by count and by rate, P-POTS, pairs.

    OMP_NUM_THREADS=1 python benchmarks/length_noise.py --output benchmarks/length.json

The sums of ``length.py``, in the middle of a run by Bernoulli masks for the likelihood bound.

- moments: E‖∇l‖² of one row by independent draws, relative to Bernoulli masks, for three
  objectives. A gradient given its count l is the same by count and by rate but for its weight: so
  of M(l) = E[‖∇l‖² | l] of masks by count, measured at 24 rates, all follow by sums over l and t
  that are exact. Means of three probes of 16 rows × 3 masks, and their standard error.
- variance (at the lengths of ``--variance``): of a batch's gradient from four draws, as
  ``mdm_variance`` has it, with A, B and C. Of the bound at 128 tokens it is too noisy to be of use:
  most of it is in the lightest masks, which are rare.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy
import torch
from length import LENGTHS, RUNS, Bench
from quickstart_model import WORLD
from scipy.stats import binom
from torch import Tensor

from mdm_plugin.contract import Estimator, Masking, ProbePlan, TimestepSampler
from mdm_plugin.density import Density
from mdm_plugin.distributed.gradients import folded_gradient
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, Complement, FixedCount, masking_rate
from mdm_plugin.models import MDMTransformer
from mdm_plugin.noise import keyed_generator
from mdm_plugin.objectives import ELBO, Window
from mdm_plugin.pareto import probe_grid
from mdm_plugin.timesteps import ParetoOptimal, Stratified, Uniform
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.probe import fit, probe, probe_due
from mdm_plugin.training.step import backward, global_normalizer
from mdm_plugin.variance import Draws, contributions, decompose, ratio

OBJECTIVES = {"ELBO": ELBO(), "window (.15, 1)": Window(0.15), "window (.4, 1)": Window(0.4)}
Parts = tuple[Callable[[], TimestepSampler], Masking]
ESTIMATORS: dict[str, Parts] = {
    "Standard": (Uniform, Bernoulli()),
    "Stratified": (Stratified, Bernoulli()),
    "FixedCount": (Stratified, FixedCount()),
    "P-POTS FixedCount": (lambda: ParetoOptimal(grid=16, masks=4), FixedCount()),
    "Complement": (Stratified, Complement()),
}
ROWS = 8  # of a batch whose gradient's variance is measured
BATCHES = {32: 64, 128: 48, 512: 12}
RATES, PROBED_ROWS, MASKS, PROBES = 24, 16, 3, 3
POINTS = 8000  # of an integral over t


def second_moments(bench: Bench, model: MDMTransformer, n: int, number: int) -> "numpy.ndarray":
    """M(l) for l = 1..n, linear in logarithms between the rates that are probed. [n]."""
    t = probe_grid("piecewise", RATES)
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), bench.tokenizer.mask_id)
    plan = ProbePlan(t, PROBED_ROWS, MASKS, "gradient", None)
    found = probe(model, estimator, plan, bench.batches(ROWS, 0), WORLD, step=1000 + number)
    count = numpy.arange(1, n + 1)
    return numpy.exp(numpy.interp((count - 0.5) / n, t.numpy(), 2 * found.root.log().numpy()))


def relative(moments: "numpy.ndarray", w: Density) -> dict[str, float]:
    """Second moments of an objective, relative to Bernoulli masks with t ~ w."""
    n, u = len(moments), (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    # Closer together near 0, where light masks have large weights.
    s = u.square() if w.is_uniform else u
    mass = (2 * u if w.is_uniform else torch.ones_like(u)).numpy() / POINTS
    p, count = masking_rate(w.quantile(s)).numpy()[:, None], numpy.arange(1, n + 1)
    by_rate = numpy.concatenate(
        [
            (binom.pmf(count, n, x) * (count / (n * x)) ** 2 * moments).sum(1)
            for x in numpy.array_split(p, POINTS // 500)
        ]
    )
    share, unit = w.count_cdf(n).diff().numpy(), float(mass @ by_rate)
    return {
        "counts": float(share @ moments) / unit,
        "P-POTS, rates": float(mass @ by_rate**0.5) ** 2 / unit,
        "P-POTS, counts": float(share @ moments**0.5) ** 2 / unit,
    }


def all_moments(bench: Bench, model: MDMTransformer) -> dict[str, Any]:
    """Of each objective and way the mean over probes, and its standard error."""
    (batch,) = bench.batches(ROWS, 0).micro_batches(0)
    n = round(float(batch.eligible.sum(1).float().mean()))
    probed = [second_moments(bench, model, n, number) for number in range(PROBES)]
    found: dict[str, Any] = {"n": n}
    for name, objective in OBJECTIVES.items():
        values = [relative(x, objective(0.0)) for x in probed]
        found[name] = {
            way: (mean(x[way] for x in values), stdev(x[way] for x in values) / PROBES**0.5)
            for way in values[0]
        }
    return found


def gradient(
    bench: Bench, model: MDMTransformer, estimator: Estimator, rows: Any, t: Any, masks: Any
) -> Tensor:
    """The gradient of one batch, [D]; rows, t and masks by their keys."""
    batches = bench.batches(ROWS, 0)
    own = keyed_generator("rows", *rows)
    chosen = torch.randint(len(bench.rows), (ROWS,), generator=own)
    longest = int(bench.rows.lengths_of(chosen).max())
    places = torch.arange(ROWS)
    batch = batches.collate(chosen, places, ("variance", *masks), longest)
    times = estimator.timesteps(ROWS, keyed_generator("t", *t), estimator.w)
    noisy = corrupt(batch, times, estimator)
    backward(model, estimator.loss, noisy, global_normalizer([noisy], WORLD), WORLD)
    found = folded_gradient(model, None)
    model.zero_grad(set_to_none=True)
    return found


def contributed(
    bench: Bench, model: MDMTransformer, parts: Parts, w: Density, count: int
) -> Tensor:
    """What each of ``count`` batches says of A, B, C and the total of an estimator, [count, 4]."""
    sampler = parts[0]()
    estimator = Estimator(sampler, parts[1], MDMLoss(), bench.tokenizer.mask_id, w)
    if plan := probe_due(estimator, 0):
        batches = bench.batches(ROWS, 0)
        fit(estimator, plan, probe(model, estimator, plan, batches, WORLD, step=0), WORLD)
    drawn: dict[str, list[Tensor]] = {name: [] for name in Draws._fields}
    for i in range(count):
        keys = ((i, 0), (i, 0), (i, 0)), ((i, 0), (i, 0), (i, 1))
        keys += ((i, 0), (i, 1), (i, 2)), ((i, 1), (i, 2), (i, 3))
        for name, key in zip(Draws._fields, keys, strict=True):
            drawn[name].append(gradient(bench, model, estimator, *key))
    whole = Draws(**{name: torch.stack(values) for name, values in drawn.items()})
    return contributions(whole, ROWS)


def variances(bench: Bench, model: MDMTransformer, tokens: int) -> dict[str, Any]:
    """Of all estimators of two objectives, relative to the first's."""
    found: dict[str, Any] = {}
    for objective in ("ELBO", "window (.4, 1)"):
        w, count = OBJECTIVES[objective](0.0), BATCHES[tokens]
        parts = {x: contributed(bench, model, y, w, count) for x, y in ESTIMATORS.items()}
        standard, found[objective] = parts["Standard"], {}
        unit = decompose(standard).variance.value
        for name, x in parts.items():
            split = decompose(x)
            found[objective][name] = {
                "equal_forwards": list(ratio(x, standard, ESTIMATORS[name][1].views)),
                **{y: getattr(split, y).value / unit for y in "ABC"},
            }
    return found


def tables(found: dict[str, Any]) -> str:
    """Both, in Markdown."""
    ways = ("counts", "P-POTS, rates", "P-POTS, counts")
    out = [f"| N | objective | {' | '.join(ways)} |", "|---" * 5 + "|"]
    for place in (x["moments"] for x in found.values() if "moments" in x):
        for name in OBJECTIVES:
            cells = ["{:.2f} ± {:.2f}".format(*place[name][way]) for way in ways]
            out.append(f"| {place['n']} | {name} | {' | '.join(cells)} |")
    out += [
        "",
        f"| objective, N | {' | '.join(ESTIMATORS)} |",
        "|---" * (len(ESTIMATORS) + 1) + "|",
    ]
    for name, place in found.items():
        for objective, lines in place.get("variance", {}).items():
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*x["equal_forwards"]) for x in lines.values()]
            cells[0] = "1 ({A:.2f} + {B:.2f} + {C:.2f})".format(**lines["Standard"])
            out.append(f"| {objective}, {name.split()[1]} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; what is there is kept")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--variance", nargs="*", type=int, default=[32, 128], choices=LENGTHS)
    given = parser.parse_args()
    found = json.loads(given.output.read_text()) if given.output.is_file() else {}
    for tokens in given.tokens:
        place = found.setdefault(f"sums {tokens}", {"runs": []})
        wanted = {"moments"} | ({"variance"} if tokens in given.variance else set())
        if wanted <= place.keys():
            continue
        bench = Bench("sums", tokens)
        model = bench.train(*RUNS["ELBO, rates"], seed=0, share=0.5)
        if "moments" not in place:
            place["moments"] = all_moments(bench, model)
        if "variance" in wanted - place.keys():
            place["variance"] = variances(bench, model, tokens)
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
