"""Two or more evaluations compared, row by row: ``python -m mdm_plugin.evaluation.compare A B …``.

Differences are paired: the same rows, the first evaluation against each of the others, so that what
makes rows hard or easy cancels. Intervals are 95 %, over the rows as a sample of their kind.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.results import Parts


class Difference(NamedTuple):
    """An evaluation's figure less the first one's, its 95 % interval, and the rows in common."""

    task: str
    name: str
    value: float
    low: float
    high: float
    rows: int


def difference(task: str, name: str, first: dict[int, Any], other: dict[int, Any]) -> Difference:
    """``other`` − ``first``, over the rows that both have: nats per token, or accuracy.

    Raises:
        UserError: if they have no two rows in common.
    """
    common = sorted(first.keys() & other.keys())
    if len(common) < 2:
        raise UserError(f"{name}: {task}: fewer than two rows in common")
    if "nats" in first[common[0]]:
        sums = [
            torch.tensor([x[i]["nats"] for i in common], dtype=torch.float64)
            for x in (first, other)
        ]
        weight = torch.tensor([float(first[i]["tokens"]) for i in common])
    else:
        sums = [torch.tensor([float(x[i]["correct"]) for i in common]) for x in (first, other)]
        weight = torch.ones(len(common))
    paired = (sums[1] - sums[0]).double()
    value = float(paired.sum() / weight.sum())
    residual, n = paired - value * weight, len(common)
    error = float((n / (n - 1) * residual.square().sum()).sqrt() / weight.sum())
    return Difference(task, name, value, value - 1.96 * error, value + 1.96 * error, n)


def compare(directories: list[Path]) -> list[Difference]:
    """Each evaluation against the first, for each task that both have.

    Raises:
        UserError: if a directory holds no results, or no task is common to all.
    """
    tasks = {}
    for directory in directories:
        file = directory / "results.json"
        if not file.is_file():
            raise UserError(f"{file} does not exist: has the evaluation ended?")
        tasks[directory] = list(json.loads(file.read_text())["tasks"])
    found = []
    for other in directories[1:]:
        for task in tasks[directories[0]]:
            if task in tasks[other]:
                first, second = (Parts(x, task).read() for x in (directories[0], other))
                found.append(difference(task, str(other), first, second))
    if not found:
        raise UserError("the evaluations have no task in common")
    return found


def plot(differences: list[Difference], first: str, file: Path) -> None:
    """Differences with their intervals, a panel per task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(x.task for x in differences))
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(differences)), layout="constrained")
    for axis, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        shown = [x for x in differences if x.task == task]
        axis.errorbar(
            [x.value for x in shown],
            [x.name for x in shown],
            xerr=[[x.value - x.low for x in shown], [x.high - x.value for x in shown]],
            fmt="o",
        )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.margins(y=0.4)
        unit = "nats per token" if task == "nelbo" else "accuracy"
        axis.set(title=task, xlabel=f"difference from {first}, {unit}")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Print and draw the differences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+", type=Path, help="output_dir of each evaluation")
    parser.add_argument("--figure", type=Path, default=Path("compare.png"))
    given = parser.parse_args()
    if len(given.directories) < 2:
        parser.error("name two directories or more")
    try:
        found = compare(given.directories)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Less {given.directories[0]}, 95 % intervals over the rows")
    for x in found:
        print(
            f"{x.task:24} {x.name:32} {x.value:+.4f} [{x.low:+.4f}, {x.high:+.4f}]  {x.rows} rows"
        )
    plot(found, str(given.directories[0]), given.figure)
    print(f"Written to {given.figure}")


if __name__ == "__main__":
    main()
