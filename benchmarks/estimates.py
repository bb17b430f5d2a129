"""Estimates of a policy's bounds in training: right answers against forwards, each at its own rate.

    python benchmarks/estimates.py --output /tmp/estimates

Every run is quickstart_grpo's with another estimate, half of its prompts and one update of each
step's answers. An estimate's learning rate is the one whose run of the seed for tuning has most
right answers to the validation questions, in the mean over its validations. Three more seeds follow
at that rate. To results.json and estimates.png; a run that is finished already is not run again.
``--part 1 2`` runs every second estimate alone, ``--part 2 2`` the others, so that two processes
share them. About an hour of one core.

A forward is one of one answer. A draw takes three: for its bound, for the gradient, and backwards.
What sampling takes is the same for all, and not counted.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from quickstart_model import right_answers

from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import GRPOOptions
from mdm_plugin.quickstart import prepare_two_ways

SEEDS, TUNED = (0, 1, 2), 9
RATES = ("5e-5", "1e-4", "2e-4", "4e-4", "8e-4")
PROMPTS, EVERY, STEPS, GOAL = 16, 3, 24, 0.85


class Method(NamedTuple):
    """An estimate, as quickstart_grpo's options say it."""

    timesteps: str
    masking: str
    draws: int
    ratio: str = "sequence"


METHODS = {
    "even counts, Complement: 2": Method("timesteps.Stratified", "masking.Complement", 2),
    "one count: 1": Method("timesteps.Stratified", "masking.FixedCount", 1),
    "even counts, Complement: 4 (ESPO)": Method("timesteps.Stratified", "masking.Complement", 4),
    "GDPO: 3": Method("alignment.estimates.GaussQuadrature", "alignment.estimates.RoundedCount", 3),
    "coupled-GRPO: 3": Method("timesteps.Uniform", "alignment.estimates.Coupled", 3, "token"),
    "diffu-GRPO (d1): 1": Method(
        "timesteps.Uniform", "alignment.estimates.FullyMasked", 1, "token"
    ),
}


def forwards(method: Method, cfg: Any) -> int:
    """Of a step."""
    return 3 * method.draws * PROMPTS * int(cfg.group_size)


def run(name: str, rate: str, seed: int, output: Path) -> list[float]:
    """The share of right validation answers, at the start and after every EVERY steps."""
    method = METHODS[name]
    place = output / f"{list(METHODS).index(name)}_{rate}_{seed}"
    result = place / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    command = [
        *("mdm_grpo", "--config", "quickstart_grpo", f"output_dir={place}", f"seed={seed}"),
        *(f"optimizer.lr={rate}", f"batch_size={PROMPTS}", f"max_steps_per_epoch={STEPS}"),
        *("updates=1", f"run_val_every_n_steps={EVERY}"),
        *("save_every_n_steps=null", f"draws={method.draws}", f"loss.ratio={method.ratio}"),
        f"timesteps=mdm_plugin.{method.timesteps}",
        f"masking=mdm_plugin.{method.masking}",
    ]
    tune = Path(sys.executable).with_name("tune")
    print(f"{name}, {rate}, seed {seed}", flush=True)
    with (output / f"{place.name}.log").open("w") as log:
        subprocess.run([str(tune), "run", *command], check=True, stdout=log, stderr=log)
    result.write_text(json.dumps(right_answers(place)))
    return json.loads(result.read_text())


def chosen(name: str, output: Path) -> str:
    """The rate with most right answers over the tuning's run."""
    return max(RATES, key=lambda rate: mean(run(name, rate, TUNED, output)))


def reached(curve: list[float], each: int) -> int | None:
    """Forwards to GOAL, on straight lines between the validations."""
    for i, (before, after) in enumerate(pairwise(curve)):
        if before < GOAL <= after:
            return round((i + (GOAL - before) / (after - before)) * EVERY * each)
    return None


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("I", "N"), help="the Ith of N parts, and no report"
    )
    args = parser.parse_args()
    output: Path = args.output
    cfg = load_config("quickstart_grpo", [], GRPOOptions)
    prepare_two_ways(cfg.tokenizer.path)
    output.mkdir(parents=True, exist_ok=True)
    part, parts = args.part or (1, 1)
    if not 1 <= part <= parts:
        parser.error(f"--part {part} {parts}: there is no such part")
    for name in list(METHODS)[part - 1 :: parts]:
        rate = chosen(name, output)
        for seed in SEEDS:
            run(name, rate, seed, output)
    if not args.part:
        report(output, cfg)


def report(output: Path, cfg: Any) -> None:
    """The table, on standard output and in results.json, and the curves."""
    results: dict[str, Any] = {}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, method in METHODS.items():
        rate, each = chosen(name, output), forwards(method, cfg)
        curves = [run(name, rate, seed, output) for seed in SEEDS]
        middle = [mean(x) for x in zip(*curves, strict=True)]
        results[name] = {
            "rate": rate,
            "forwards of a step": each,
            "curves": curves,
            "forwards to the goal": [reached(x, each) for x in curves],
            "in the mean": reached(middle, each),
        }
        print(
            f"{name} at {rate}: {GOAL:.0%} after {results[name]['in the mean']} forwards, seeds "
            f"{results[name]['forwards to the goal']}; end {[round(x[-1], 3) for x in curves]}"
        )
        places = [i * EVERY * each for i in range(len(middle))]
        (line,) = axes.plot(places, [100 * x for x in middle], label=f"{name}, rate {rate}")
        for curve in curves:
            shares = [100 * x for x in curve]
            axes.plot(places, shares, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.axhline(100 * GOAL, color="grey", linestyle=":")
    axes.set(xlabel="forwards of answers, for bounds and gradients", ylabel="right answers, %")
    axes.legend(fontsize=8)
    figure.savefig(output / "estimates.png", dpi=120)
    (output / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
