"""What ``mdm_variance`` writes: a table, JSON, CSV, figures and TensorBoard scalars."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mdm_plugin.config.secrets import redacted
from mdm_plugin.variance import Decomposition, Estimate, decompose, noise_scale, ratio


class Measured(NamedTuple):
    """An estimator's name, forwards per row, seconds per draw, contributions [G, 4] each, and what
    its batches say of the gradient's length, [G] (``variance.signal``)."""

    name: str
    forwards: int
    seconds: float
    loss: Tensor
    gradient: Tensor
    signal: Tensor


class Line(NamedTuple):
    """An estimator's figures; the ratios are of the gradient's variance to the first one's."""

    measured: Measured
    loss: Decomposition
    gradient: Decomposition
    rows: Estimate
    at_forwards: Estimate
    at_time: Estimate
    scale: Estimate | None


def write_report(
    measured: list[Measured], cfg: DictConfig, directory: Path
) -> tuple[str, dict[str, Any], dict[str, float]]:
    """Write variance.json, variance.csv and PNGs; give the table, the figures and the scalars."""
    standard = measured[0]
    lines = [
        Line(
            m,
            decompose(m.loss),
            decompose(m.gradient),
            ratio(m.gradient, standard.gradient),
            ratio(m.gradient, standard.gradient, m.forwards / standard.forwards),
            ratio(m.gradient, standard.gradient, m.seconds / standard.seconds),
            noise_scale(m.gradient, m.signal),
        )
        for m in measured
    ]
    records = [_record(line) for line in lines]
    # All unbiased estimators have the same C, and the quietest one shows it best.
    quietest = min(
        (x for x in lines if x.measured.name != "Autoregressive"),
        key=lambda x: x.gradient.variance.value,
    )
    floor = quietest.gradient.C.value / lines[0].gradient.variance.value
    result = {
        "rows_per_batch": cfg.batch_size,
        "batches": len(standard.gradient),
        "projection": cfg.projection,
        "projection_relative_error": (2 / cfg.projection) ** 0.5 if cfg.projection else 0.0,
        "floor_equal_rows": floor,
        "floor_from": quietest.measured.name,
        "estimators": records,
        "config": OmegaConf.to_container(redacted(cfg)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "variance.json").write_text(json.dumps(result, indent=1))
    with (directory / "variance.csv").open("w", newline="") as file:
        flat = [_flat(record) for record in records]
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)
    figures = {"variance/parts": _bars(lines, floor), "variance/compute": _compute(lines, floor)}
    for name, figure in figures.items():
        figure.savefig(directory / f"{name.replace('/', '_')}.png", dpi=120)
    scalars = {f"variance/{x.measured.name}_equal_forwards": x.at_forwards.value for x in lines}
    objective = cfg.objective._component_.rpartition(".")[2] if cfg.objective else "ELBO"
    return f"{_table(lines, floor, result)}\n\n{advice(lines, objective)}", figures, scalars


def advice(lines: list[Line], objective: str) -> str:
    """What to take, in a line: the least variance for its forwards, and how many rows a step."""
    choice = [x for x in lines if x.measured.name != "Autoregressive"]
    if not choice:
        return "No advice: nothing here estimates the objective."
    best, first = min(choice, key=lambda x: x.at_forwards.value), lines[0].measured.name
    saved = 1 - best.at_forwards.value
    if best.at_forwards.high < 1:
        line = (
            f"Advice for the objective {objective}: {best.measured.name}, which has {first}'s "
            f"noise for {saved:.0%} fewer forwards"
        )
    else:
        line = f"Advice for the objective {objective}: nothing here is surely better than {first}"
        best = lines[0]
    if best.scale is None:
        return f"{line}. Its signal is not seen above its noise: raise batches, or batch_size."
    rows = " to ".join(f"{x:.3g}" for x in (best.scale.low, best.scale.high))
    return (
        f"{line}. In a step of {best.scale.value:.3g} rows ({rows}) noise and signal are equal: "
        "far fewer rows are mostly noise, far more are mostly wasted."
    )


def _record(line: Line) -> dict[str, Any]:
    return {
        "name": line.measured.name,
        "forwards_per_row": line.measured.forwards,
        "seconds_per_draw": line.measured.seconds,
        "loss": {k: v._asdict() for k, v in line.loss._asdict().items()},
        "gradient": {k: v._asdict() for k, v in line.gradient._asdict().items()},
        "gradient_ratio": {
            "equal_rows": line.rows._asdict(),
            "equal_forwards": line.at_forwards._asdict(),
            "equal_time": line.at_time._asdict(),
        },
        "noise_scale_rows": line.scale._asdict() if line.scale else dict.fromkeys(Estimate._fields),
    }


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _table(lines: list[Line], floor: float, result: dict[str, Any]) -> str:
    first = lines[0].measured.name
    unit = lines[0].gradient.variance.value
    width = max(len(line.measured.name) for line in lines)

    def interval(e: Estimate) -> str:
        return f"{e.value:5.2f} [{e.low:4.2f}, {e.high:4.2f}]"

    out = [
        f"Variance of the gradient, {first} = 1 ({result['batches']} batches of "
        f"{result['rows_per_batch']} rows per rank, 95 % intervals)",
        f"{'':{width}}  fwd     A     B     C  A+B+C  total  {'equal rows':18}  "
        f"{'equal forwards':18}  equal time",
    ]
    for line in lines:
        d = line.gradient
        parts = [x.value / unit for x in (d.A, d.B, d.C)]
        out.append(
            f"{line.measured.name:{width}}  {line.measured.forwards:3d} "
            + " ".join(f"{x:5.2f}" for x in parts)
            + f"  {d.sum.value / unit:5.2f}  {d.total.value / unit:5.2f}  "
            + f"{interval(line.rows):18}  "
            + f"{interval(line.at_forwards):18}  {interval(line.at_time)}"
        )
    out.append(
        f"What the data leave (C, from {result['floor_from']}): {floor:.2f} at equal rows, times "
        "the forwards per row at equal forwards."
    )
    loss_unit = lines[0].loss.variance.value
    out += ["", f"Variance of the loss, {first} = 1"]
    for line in lines:
        d = line.loss
        values = " ".join(f"{x.value / loss_unit:5.2f}" for x in (d.A, d.B, d.C))
        out.append(
            f"{line.measured.name:{width}}  {line.measured.forwards:3d} {values}  "
            f"{d.sum.value / loss_unit:5.2f}  {d.total.value / loss_unit:5.2f}"
        )
    if result["projection"]:
        out.append(f"Projection error of a squared norm: {result['projection_relative_error']:.1%}")
    return "\n".join(out)


_PARTS: tuple[tuple[Callable[[Decomposition], Estimate], str, str], ...] = (
    (lambda x: x.A, "A masking pattern", "#4878cf"),
    (lambda x: x.B, "B masking rate", "#ee854a"),
    (lambda x: x.C, "C data", "#9a9a9a"),
)


def stack(
    axis: Any,
    names: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    shown: Sequence[Estimate],
) -> None:
    """A bar for each name, the first at the top, of parts one after another, and an interval.

    parts: label, colour, and the width of each name's; below 0 it is not drawn. shown: of each.
    """
    left = [0.0] * len(names)
    for label, colour, given in parts:
        widths = [max(0.0, x) for x in given]
        axis.barh(names, widths, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    low = [max(0, e.value - e.low) for e in shown]
    high = [max(0, e.high - e.value) for e in shown]
    at = [e.value for e in shown]
    axis.errorbar(at, names, xerr=[low, high], fmt="none", color="black", linewidth=1)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _bars(lines: list[Line], floor: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.4 * len(lines) + 1.6), layout="constrained")
    unit = lines[0].gradient.variance.value
    names = [f"{x.measured.name} ({x.measured.forwards})" for x in lines]
    for axis, title, by_forwards in zip(
        figure.subplots(1, 2, sharey=True),
        ("equal rows", "equal forwards"),
        (False, True),
        strict=True,
    ):
        parts = []
        for part, label, colour in _PARTS:
            scale = [x.measured.forwards / unit if by_forwards else 1 / unit for x in lines]
            widths = [part(x.gradient).value * k for x, k in zip(lines, scale, strict=True)]
            parts.append((label, colour, widths))
        stack(axis, names, parts, [(x.at_forwards if by_forwards else x.rows) for x in lines])
        axis.axvline(floor, color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=f"gradient variance, {lines[0].measured.name} = 1")
    figure.axes[0].legend(fontsize=8)
    return figure


def _compute(lines: list[Line], floor: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    budget = [1, 2, 4, 8, 16, 32]
    for i, x in enumerate(lines):
        variance = [x.at_forwards.value / b for b in budget]
        axis.plot(budget, variance, label=x.measured.name, linestyle=("-", "--", ":")[i // 10 % 3])
    axis.plot(budget, [floor / b for b in budget], color="black", label="C alone, one forward")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"forwards, those of a {lines[0].measured.name} batch = 1",
        ylabel=f"variance of the batch's gradient, {lines[0].measured.name} = 1",
    )
    axis.legend(fontsize=7, ncols=2)
    return figure
