"""The study, from its data to its report: `make study`.

    python -m benchmarks.study                     # all that has not been run yet, then the report
    python -m benchmarks.study --part              # one task, two methods, two seeds
    python -m benchmarks.study --again 3           # stored runs chosen at random: the same numbers?
    python -m benchmarks.study.report              # the report alone, from the stored runs

Stop it at any time: the same command goes on where it was. Results are one JSON for each run in
``results``; data, models and logs are in ``home``.
"""

import argparse
import json
import os
import random
from pathlib import Path

import yaml

from benchmarks.study import report
from benchmarks.study.methods import METHODS, SEEDS
from benchmarks.study.runs import (
    HERE,
    PRETRAINED,
    Run,
    best_rate,
    causes,
    digest,
    execute,
    final,
    in_parallel,
    missing,
    pretrain,
    read,
    tried,
    tuning,
    variance,
)
from benchmarks.study.tasks import SETTINGS, prepare

STORED = HERE / "results"
# What stored configs say, and how it is said now.
RENAMED = {
    "  shift: true\n": "",  # an autoregressive model's was the loss's, and is its own
    "  low: 0.4\n": "  low: 0.4000000059604645\n",  # edges were rounded to fp32
    "timesteps.Clipped\n": "timesteps.Stratified\n"
    "objective:\n  _component_: mdm_plugin.objectives.Window\n  low: 0.3\n  high: 0.8\n",
}


def run_all(home: Path, results: Path, given: argparse.Namespace) -> None:
    """Data, pretrained models, tuning, variances, runs: whatever is missing."""
    tasks, methods = given.tasks, given.methods
    prepare(home)
    names = [
        name
        for name in PRETRAINED
        if not (home / name / "model.safetensors").is_file()
        and (name == "pretrained" or "autoregressive" in methods)
    ]
    in_parallel([(pretrain, (name, home)) for name in names], given.workers, "Pretraining")
    for name in PRETRAINED:
        if (file := home / name / "model.safetensors").is_file():
            print(f"{name}: sha256 {digest(file)}")
    # Each stage needs the one before: the study's learning rates are those that tuning found.
    _run(tuning(tasks, methods), "Tuning", home, results, given.workers)
    _run(tried(results, tasks, methods), "Momenta", home, results, given.workers)
    variances = [
        (variance, (task, best_rate(results, task, "one view"), home, results))
        for task in tasks
        if not (results / "variance" / f"{task}.json").is_file()
    ]
    in_parallel(variances, given.workers, "Variances")
    _run(final(results, tasks, methods, given.seeds), "Study", home, results, given.workers)
    _run(causes(results, tasks, methods, given.seeds), "Causes", home, results, given.workers)


def _run(runs: list[Run], title: str, home: Path, results: Path, workers: int) -> None:
    jobs = [(execute, (run, home, results)) for run in missing(runs, results)]
    in_parallel(jobs, workers, title)


def run_part(home: Path, given: argparse.Namespace) -> None:
    """Standard and P-POTS + MIRROR on one task with two seeds, beside the stored results."""
    results = home / "part"
    prepare(home)
    if not (home / "pretrained" / "model.safetensors").is_file():
        in_parallel([(pretrain, ("pretrained", home))], 1, "Pretraining")
    runs = final(STORED, ["chain"], ["standard", "ppots_mirror"], 2)
    _run(runs, "Study", home, results, given.workers)
    print("task    method         seed   accuracy   stored")
    for run in runs:
        here, stored = read(run.file(results)), read(run.file(STORED))
        then = f"{100 * stored['accuracy']:.1f} %" if stored else "-"
        found = f"{100 * here['accuracy']:.1f} %" if here else "-"
        print(f"{run.task:7} {run.method:14} {run.seed:<6} {found:10} {then}")


def run_again(home: Path, given: argparse.Namespace) -> None:
    """Some stored runs once more, by their stored configs."""
    results = home / "again"
    files = sorted((STORED / "runs").rglob("*.json"))
    chosen = random.sample(files, given.again)
    stored = [json.loads(file.read_text()) for file in chosen]
    for x in stored:
        for then, now in RENAMED.items():
            x["config"] = x["config"].replace(then, now)
    runs = [Run(**{key: x[key] for key in Run._fields}) for x in stored]
    for run in runs:
        run.file(results).unlink(missing_ok=True)
    jobs = [
        (execute, (run, home, results, x["config"])) for run, x in zip(runs, stored, strict=True)
    ]
    in_parallel(jobs, given.workers, "Again")
    different = 0
    for before, run in zip(stored, runs, strict=True):
        after = json.loads(run.file(results).read_text())
        keys = ("accuracy", "correct", "nats_per_token", "curves", "config")
        for x in (before, after):  # options that have come since have their defaults
            x["config"] = yaml.safe_load(x["config"])
        after["config"] = {key: after["config"].get(key) for key in before["config"]}
        other = [key for key in keys if before[key] != after[key]]
        different += bool(other)
        verdict = f"DIFFERS in {', '.join(other)}" if other else "the same"
        print(
            f"{run.task} {run.method} seed {run.seed}: {100 * after['accuracy']:.1f} %, "
            f"{after['nats_per_token']:.6f} nats: {verdict}"
        )
    raise SystemExit(different)


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = os.environ.get("MDM_PLUGIN_HOME", "~/.cache/mdm_plugin")
    parser.add_argument("--home", type=Path, default=Path(place) / "study")
    parser.add_argument("--results", type=Path, default=STORED)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tasks", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--part", action="store_true")
    parser.add_argument("--again", type=int, metavar="N")
    given = parser.parse_args()
    home = given.home.expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.part:
        return run_part(home, given)
    if given.again:
        return run_again(home, given)
    run_all(home, given.results.resolve(), given)
    report.write(given.results)


if __name__ == "__main__":
    main()
