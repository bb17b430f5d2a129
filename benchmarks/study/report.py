"""The study's report, from the stored runs alone: `python -m benchmarks.study.report`.

Writes docs/study.md and docs/objectives.md between their markers, and docs/study_*.png; the same
runs give the same bytes.
"""

import argparse
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.study.methods import (
    CAUSES,
    FIRST,
    HIGHER,
    METHODS,
    MOMENTA,
    SECOND,
    TUNED_ON,
    Method,
    rates,
)
from benchmarks.study.runs import best_rate, folder, read, validated
from benchmarks.study.tasks import SETTINGS

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
MARKERS = ("<!-- from the stored runs: begin -->", "<!-- from the stored runs: end -->")
OURS = ("count", "count_pareto", "complement_pareto", "count_pareto_64")
FIGURES = {
    "study_accuracy": "Right answers of each run",
    "study_variance": "Right answers against the variance of the gradient",
    "study_curves": "Validation curves",
}


class Runs(NamedTuple):
    """The runs of a method on a task, by seed."""

    task: str
    method: str
    by_seed: dict[int, dict[str, Any]]

    @property
    def accuracy(self) -> list[float]:
        """In percent, by seed."""
        return [100 * self.by_seed[seed]["accuracy"] for seed in sorted(self.by_seed)]


def load(results: Path) -> dict[tuple[str, str], Runs]:
    """All stored runs by (task, method), those of causes too."""
    found = {}
    for task in SETTINGS:
        for method in (*METHODS, *CAUSES):
            files = sorted(folder(results, task, method).glob("*.json"))
            by_seed = {int(file.stem): json.loads(file.read_text()) for file in files}
            if by_seed:
                found[task, method] = Runs(task, method, by_seed)
    return found


def common_seeds(a: Runs, b: Runs) -> list[int]:
    """Those that both have runs of."""
    return sorted(a.by_seed.keys() & b.by_seed.keys())


def paired(a: Runs, b: Runs, draws: int = 2000) -> tuple[float, float, float]:
    """Mean of b − a in points over common seeds, and its 95 % interval: a bootstrap over seeds and
    test rows."""
    seeds = common_seeds(a, b)
    before, after = (
        torch.tensor([[int(x) for x in runs.by_seed[s]["correct"]] for s in seeds]).double()
        for runs in (a, b)
    )
    difference = 100 * (after - before)
    dice = torch.Generator().manual_seed(0)
    by_seed, by_row = (
        torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
            1, torch.randint(n, (draws, n), generator=dice), torch.full((draws, n), 1 / n).double()
        )
        for n in difference.shape
    )
    found = ((by_seed @ difference) * by_row).sum(1)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(difference.mean()), low, high


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact sign-flip test that the mean is 0."""
    n = len(differences)
    signs = 2 * (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double() - 1
    sums = (signs @ torch.tensor(differences, dtype=torch.float64)).abs()
    return int((sums >= abs(sum(differences)) - 1e-9).sum()) / 2**n


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda x: x[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = largest
    return corrected


def table_of_accuracy(
    runs: dict[tuple[str, str], Runs], methods: Mapping[str, Method]
) -> list[str]:
    """Mean ± standard deviation, worst to best, by task, and the mean over tasks."""
    tasks = list(SETTINGS)
    lines = [
        "| method | forwards | " + " | ".join(tasks) + " | mean | nats per token |",
        "|---|---|" + "---|" * (len(tasks) + 2),
    ]
    for name, method in methods.items():
        cells, means, nats = [], [], []
        for task in tasks:
            found = runs.get((task, name))
            if not found:
                cells.append("–")
                continue
            values = found.accuracy
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread} ({min(values):.1f}–{max(values):.1f})")
            means.append(mean(values))
            nats.append(mean(x["nats_per_token"] for x in found.by_seed.values()))
        if means:
            whole = f"{mean(means):.1f}" if len(means) == len(tasks) else "–"
            bound = " / ".join(f"{x:.3f}" for x in nats)
            forwards = method.rows * method.views
            lines.append(
                f"| {method.label} | {forwards} | " + " | ".join(cells) + f" | {whole} | {bound} |"
            )
    return lines


def table_of_differences(
    runs: dict[tuple[str, str], Runs], baseline: str, methods: Mapping[str, Method]
) -> list[str]:
    """Each method against a baseline of the same number of forwards or rows, over all tasks."""
    rows, p_values = [], {}
    for name in methods:
        if name == baseline:
            continue
        both = [
            (runs[task, baseline], runs[task, name])
            for task in SETTINGS
            if (task, baseline) in runs and (task, name) in runs
        ]
        if len(both) < len(SETTINGS):
            continue
        parts = [paired(a, b) for a, b in both]
        pairs = [
            100 * (b.by_seed[seed]["accuracy"] - a.by_seed[seed]["accuracy"])
            for a, b in both
            for seed in common_seeds(a, b)
        ]
        p_values[name] = sign_flip(pairs)
        half = math.sqrt(sum(((high - low) / 2) ** 2 for _, low, high in parts)) / len(parts)
        rows.append((name, mean(x[0] for x in parts), half, len(pairs)))
    corrected = holm(p_values)
    lines = [
        f"| against {METHODS[baseline].label} | difference, points | pairs | p | corrected |",
        "|---|---|---|---|---|",
    ]
    for name, difference, half, pairs in rows:
        lines.append(
            f"| {METHODS[name].label} | {difference:+.1f} ± {half:.1f} | {pairs} | "
            f"{p_values[name]:.2g} | {corrected[name]:.2g} |"
        )
    return lines


def goals(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """The paper's claims in our terms, with what was found."""
    tasks = [t for t in SETTINGS if all((t, m) in runs for m in ("standard", "ppots_mirror"))]
    if not tasks:
        return []

    def gain(method: str, base: str) -> float:
        return mean(mean(runs[t, method].accuracy) - mean(runs[t, base].accuracy) for t in tasks)

    lines = ["| claim | found |", "|---|---|"]
    for base in ("standard", "standard_64"):
        if all((t, base) in runs for t in tasks):
            what = "equal rows" if base == "standard" else "equal forwards"
            lines.append(
                f"| P-POTS + MIRROR gains ≥ 5 points on Standard, {what} | "
                f"{gain('ppots_mirror', base):+.1f} |"
            )
    above = [
        t
        for t in tasks
        if min(runs[t, "ppots_mirror"].accuracy) > max(runs[t, "standard"].accuracy)
    ]
    lines.append(
        f"| its worst run is above Standard's best on ≥ 2 tasks | {len(above)} of {len(tasks)}"
        f"{': ' + ', '.join(above) if above else ''} |"
    )
    if all((t, "autoregressive") in runs for t in tasks):
        spread = {
            m: mean(stdev(runs[t, m].accuracy) for t in tasks if len(runs[t, m].by_seed) > 1)
            for m in ("standard", "ppots_mirror", "autoregressive")
        }
        lines.append(
            "| its standard deviation is ≤ 1.5 × the autoregressive model's | "
            f"{spread['ppots_mirror']:.1f} against {spread['autoregressive']:.1f} points "
            f"(Standard: {spread['standard']:.1f}) |"
        )
    ours = [m for m in OURS if all((t, m) in runs for t in tasks)]
    if ours:
        best = max(ours, key=lambda m: gain(m, "ppots_mirror"))
        lines.append(
            f"| the best of ours is not below it | {METHODS[best].label}: "
            f"{gain(best, 'ppots_mirror'):+.1f} |"
        )
    return lines


def table_of_tuning(results: Path, methods: Mapping[str, Method]) -> list[str]:
    """Mean validation accuracy by learning rate, of the methods that families were tuned on."""
    families = {family: name for family, name in TUNED_ON.items() if name in methods}
    found = {
        (family, task, rate): values
        for family, name in families.items()
        for task in SETTINGS
        for rate in rates(family)
        if (values := validated(results, task, name, rate))
    }
    shown = [rate for rate in HIGHER if any(x[2] == rate for x in found)]
    lines = [
        "| family (tuned on) | task | " + " | ".join(shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for family, name in families.items():
        for task in SETTINGS:
            best = best_rate(results, task, family)
            cells = ["–"] * len(shown)
            for i, rate in enumerate(shown):
                if values := found.get((family, task, rate)):
                    cells[i] = f"**{mean(values):.1f}**" if rate == best else f"{mean(values):.1f}"
            if any(x != "–" for x in cells):
                lines.append(f"| {family} ({METHODS[name].label}) | {task} | {' | '.join(cells)} |")
    return lines


def table_of_momenta(results: Path) -> list[str]:
    """Mean validation accuracy by momentum, at the rate of the family."""
    lines = ["| method | momentum | " + " | ".join(SETTINGS) + " |", "|---|---|---|---|---|"]
    for chosen, momenta in MOMENTA.items():
        for momentum, name in momenta.items():
            cells = []
            for task in SETTINGS:
                rate = best_rate(results, task, METHODS[chosen].family)
                values = validated(results, task, name, rate)
                shown = f"{mean(values):.1f}" if values else "–"
                cells.append(f"**{shown}**" if name == chosen else shown)
            if any(x.strip("*") != "–" for x in cells):
                lines.append(f"| {METHODS[chosen].label} | {momentum} | {' | '.join(cells)} |")
    return lines


def label(name: str) -> str:
    """Of a method, or of one with something changed."""
    if cause := CAUSES.get(name):
        return f"{METHODS[cause.like].label}: {cause.change}"
    return METHODS[name].label


def table_of_parallel(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Right answers by ways to write more than a token in a forward, beside one a step."""
    ways = {
        "two": "two a step",
        "threshold": "`Threshold` (0.9)",
        "stable": "`Stable` (KLASS)",
    }
    lines = [
        f"| method | task | one token a step | {' | '.join(ways.values())} |",
        "|---|---|---|" + "---|" * len(ways),
    ]
    order = [*METHODS, *CAUSES]
    for (task, name), found in sorted(runs.items(), key=lambda x: order.index(x[0][1])):
        values = [x["parallel"] for x in found.by_seed.values() if "parallel" in x]
        if values:
            cells = [mean(found.accuracy), *(100 * mean(x[way] for x in values) for way in ways)]
            lines.append(f"| {label(name)} | {task} | {' | '.join(f'{x:.1f}' for x in cells)} |")
    return lines


def variances(results: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By task and method, the variance of a step's gradient at equal rows, with its interval."""
    files = {task: results / "variance" / f"{task}.json" for task in SETTINGS}
    return {task: found["equal_rows"] for task, file in files.items() if (found := read(file))}


def table_of_variance(results: Path) -> list[str]:
    """The gradient's variance by method and task, equal rows and equal forwards."""
    found = variances(results)
    if not found:
        return []
    lines = ["| method | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, method in FIRST.items():
        if all(name in x for x in found.values()):
            cells = [
                f"{x[name]['value']:.2f} ({x[name]['low']:.2f}–{x[name]['high']:.2f}); "
                f"{x[name]['value'] * method.views:.2f}"
                for x in found.values()
            ]
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return lines


def table_of_causes(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Each method with one thing changed, beside the method it is like, over common seeds."""
    lines = [
        "| method, and what was changed | task | as in the study | changed | difference, points | "
        "nats per token |",
        "|---|---|---|---|---|---|",
    ]
    for name, cause in CAUSES.items():
        for task in SETTINGS:
            if (task, name) not in runs or (task, cause.like) not in runs:
                continue
            before, after = runs[task, cause.like], runs[task, name]
            difference, low, high = paired(before, after)
            cells = [
                f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
                for values in (before.accuracy, after.accuracy)
            ]
            seeds = common_seeds(before, after)
            nats = [
                mean(x.by_seed[seed]["nats_per_token"] for seed in seeds) for x in (before, after)
            ]
            lines.append(
                f"| {label(name)} | {task} | {' | '.join(cells)} | "
                f"{difference:+.1f} ({low:+.1f} to {high:+.1f}) | {nats[0]:.3f} to {nats[1]:.3f} |"
            )
    return lines


def draw(runs: dict[tuple[str, str], Runs], results: Path) -> dict[str, Figure]:
    """Accuracies by method; accuracy against variance; validation curves."""
    tasks = [t for t in SETTINGS if any(task == t for task, _ in runs)]
    names = [m for m in FIRST if any(method == m for _, method in runs)]
    accuracy = Figure(figsize=(4.2 * len(tasks), 5.2), layout="constrained")
    for axis, task in zip(_axes(accuracy, len(tasks)), tasks, strict=True):
        for i, name in enumerate(names):
            if (task, name) in runs:
                values = runs[task, name].accuracy
                colour = "C1" if name in OURS else "C0"
                axis.plot(values, [i] * len(values), "o", color=colour, alpha=0.6, markersize=4)
                axis.plot(mean(values), i, "|", color="black", markersize=14)
        axis.set_yticks(range(len(names)), [METHODS[n].label for n in names], fontsize=7)
        axis.invert_yaxis()
        axis.set(title=task, xlabel="right answers, % of 500")
        axis.label_outer()

    measured = variances(results)
    against = Figure(figsize=(5.2 * len(tasks), 3.8), layout="constrained")
    for axis, task in zip(_axes(against, len(tasks)), tasks, strict=True):
        ratios = measured.get(task, {})
        points = {}
        for name in names:
            base = name.removesuffix("_64")  # twice the rows have half of the variance
            if (task, name) in runs and base in ratios:
                variance = ratios[base]["value"] * METHODS[base].rows / METHODS[name].rows
                points[name] = variance, mean(runs[task, name].accuracy)
                axis.plot(*points[name], "o", color="C1" if name in OURS else "C0", markersize=5)
        label_beside(axis, points)
        rank = f": rank correlation {spearman(points.values()):.2f}" if len(points) > 2 else ""
        axis.set(title=task + rank, xlabel="variance of a step's gradient, Standard = 1")
        axis.set_ylabel("right answers, %")

    curves = Figure(figsize=(4.2 * len(tasks), 3.4), layout="constrained")
    shown = ("standard", "ppots_mirror", "count_pareto", "complement_pareto")
    for axis, task in zip(_axes(curves, len(tasks)), tasks, strict=True):
        for i, name in enumerate(shown):
            for j, run in enumerate(
                runs[task, name].by_seed.values() if (task, name) in runs else ()
            ):
                points = run["curves"].get("val/nelbo_nats_per_token", [])[1:]
                label = METHODS[name].label if j == 0 else None
                axis.plot(*zip(*points, strict=True), color=f"C{i}", alpha=0.7, label=label)
        axis.set(title=task, xlabel="step", ylabel="validation NELBO, nats per token", yscale="log")
        axis.legend(fontsize=7)
    return dict(zip(FIGURES, (accuracy, against, curves), strict=True))


def label_beside(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Methods' labels in a column beside the axes, in the points' order, a line to each point."""
    ordered = sorted(points, key=lambda name: points[name][::-1])
    low, high = axis.get_ylim()
    least = 1 / max(len(ordered), 14)  # of the axes' height, from one label to the next
    places: list[float] = []
    for name in ordered:
        wanted = (points[name][1] - low) / (high - low)
        places.append(max(wanted, places[-1] + least) if places else max(wanted, least / 2))
    top = 1 - least / 2
    for i in reversed(range(len(places))):  # those above the top come down, and push others down
        places[i] = min(places[i], top)
        top = places[i] - least
    for name, place in zip(ordered, places, strict=True):
        axis.annotate(
            METHODS[name].label,
            points[name],
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    axis.set_ylim(low, high)


def spearman(points: Collection[tuple[float, float]]) -> float:
    """Rank correlation of the pairs."""
    return float(spearmanr(*zip(*points, strict=True)).statistic)


def _axes(figure: Figure, count: int) -> list[Any]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def spreads(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Standard deviations over seeds of what answers 80 % or more, beside the autoregressive's."""
    lines = [
        "| task | method | right answers | against the autoregressive model's |",
        "|---|---|---|---|",
    ]
    for task in SETTINGS:
        if (task, "autoregressive_2") not in runs:
            continue
        base = stdev(runs[task, "autoregressive_2"].accuracy)
        for name, method in SECOND.items():
            values = runs[task, name].accuracy if (task, name) in runs else []
            if len(values) > 1 and mean(values) >= 80:
                times = f"{stdev(values) / base:.1f} ×" if base else "at its ceiling: it has none"
                found = f"{mean(values):.1f} ± {stdev(values):.1f}"
                lines.append(f"| {task} | {method.label} | {found} | {times} |")
    return lines


def of_part(results: Path, methods: Mapping[str, Method]) -> dict[tuple[str, str], Runs]:
    """The stored runs of a part of the study: its methods, and these with one thing changed."""
    names = {*methods, *(name for name, cause in CAUSES.items() if cause.like in methods)}
    return {key: x for key, x in load(results).items() if key[1] in names}


def objective_sections(results: Path) -> str:
    """The generated part of docs/objectives.md."""
    runs = of_part(results, SECOND)
    total = sum(len(x.by_seed) for x in runs.values())
    seconds = sum(x["seconds"] for r in runs.values() for x in r.by_seed.values())
    parts = [f"{total} runs are stored, {seconds / 3600:.1f} hours of one core."]
    for title, *tables in (
        (
            "**Right answers**, % of 500 test rows, as in docs/study.md.",
            table_of_accuracy(runs, SECOND),
        ),
        (
            "**Differences**, mean over tasks; intervals and tests as in docs/study.md.",
            table_of_differences(runs, "standard_2", SECOND),
            table_of_differences(runs, "standard_64_2", SECOND),
            table_of_differences(runs, "standard_muon", SECOND),
            table_of_differences(runs, "standard_muon_80", SECOND),
            table_of_differences(runs, "autoregressive_2", SECOND),
        ),
        (
            "**Spread over seeds**, where 80 % or more are right; and the autoregressive model's, "
            "stopped where it is at its ceiling no more.",
            spreads(runs),
            table_of_causes(runs),
        ),
        (
            "**In fewer forwards**: right answers of the same models, written by other samplers.",
            table_of_parallel(runs),
        ),
        (
            "**Learning rates**: right answers on 300 validation rows, with a seed that the study "
            "does not use; bold is what the family uses.",
            table_of_tuning(results, SECOND),
        ),
        (
            "**Momenta**: right answers on the same rows with the same seed, at the rate of the "
            "family; bold is what was taken.",
            table_of_momenta(results),
        ),
    ):
        filled = ["\n".join(table) for table in tables if len(table) > 2]
        parts += [title, *filled] if filled else []
    return "\n\n".join(parts)


def sections(results: Path) -> str:
    """The generated part of docs/study.md."""
    runs = of_part(results, FIRST)
    if not runs:
        tuned = len(list((results / "tuning").rglob("*.json")))
        return f"No run is stored yet (of the tuning of learning rates: {tuned})."
    total = sum(len(x.by_seed) for x in runs.values())
    seconds = sum(x["seconds"] for r in runs.values() for x in r.by_seed.values())
    parts = [f"{total} runs are stored, {seconds / 3600:.1f} hours of one core."]
    for title, *tables in (
        (
            "**Right answers**, % of 500 test rows, greedy: mean ± standard deviation over seeds "
            "(from the worst to the best); forwards in a step; nats per token of the test answers, "
            "by task (a bound; exact for the autoregressive model).",
            table_of_accuracy(runs, FIRST),
        ),
        ("**Claims.**", goals(runs)),
        (
            "**Differences**, mean over tasks; ± half of a 95 % interval (bootstrap over seeds and "
            "rows); p of the exact sign-flip test over pairs of runs, of the same task and seed; "
            "and corrected by Holm.",
            table_of_differences(runs, "standard", FIRST),
            table_of_differences(runs, "standard_64", FIRST),
        ),
        (
            "**Why**: one thing changed at a time (mean ± standard deviation over seeds; 95 % "
            "intervals).",
            table_of_causes(runs),
        ),
        (
            "**Variance of the gradient** halfway through Standard's training, Standard = 1: at "
            "equal rows (95 % interval); at equal forwards.",
            table_of_variance(results),
        ),
        (
            "**Learning rates**: right answers on 300 validation rows, with a seed that the study "
            "does not use; bold is what the family uses.",
            table_of_tuning(results, FIRST),
        ),
    ):
        filled = ["\n".join(table) for table in tables if len(table) > 2]
        parts += [title, *filled] if filled else []
    parts += [f"![{title}]({name}.png)" for name, title in FIGURES.items()]
    return "\n\n".join(parts)


def write(results: Path) -> None:
    """Put the tables into both pages, between their markers, and draw the figures."""
    for name, made in (("study", sections), ("objectives", objective_sections)):
        page = DOCS / f"{name}.md"
        before, rest = page.read_text().split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
        page.write_text(f"{before}{MARKERS[0]}\n\n{made(results)}\n\n{MARKERS[1]}{after}")
        print(f"Written to {page}")
    runs = load(results)
    for name, figure in draw(runs, results).items() if runs else ():
        figure.savefig(DOCS / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    write(parser.parse_args().results)
