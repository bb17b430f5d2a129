"""Draws figures of the pages: ``python docs/figures.py`` → masks, blocks, densities, parts.png.

The masks and the blocks are drawn by their own classes. The other two are of measurements that are
kept in docs/figures.json; ``python docs/figures.py RUN VARIANCE…`` takes them anew, from a run's
directory and from variance.json files of mdm_variance (docs/variance.md has the commands).
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from mdm_plugin.contract import Masking
from mdm_plugin.density import Density, uniform_density
from mdm_plugin.masking import Bernoulli, Complement, FixedCount, Mirror, Rotation
from mdm_plugin.models.blocks import BlockAttention
from mdm_plugin.objectives import Widening
from mdm_plugin.timesteps import ParetoStream

HERE = Path(__file__).parent
MEASURED = HERE / "figures.json"
LENGTH = 24
RATES = (0.25, 0.5, 0.75)
MASKS: dict[str, Masking] = {
    "Bernoulli": Bernoulli(),
    "Mirror": Mirror(),
    "FixedCount": FixedCount(),
    "Complement": Complement(),
    "Rotation(4)": Rotation(4),
    "Rotation(4) by counts": Rotation(4, fixed_count=True),
}
PARTS = {
    "A": ("A: masking pattern", "#4878cf"),
    "B": ("B: masking rate", "#ee854a"),
    "AB": ("A and B, not to be told apart", "#b5a3c9"),
    "C": ("C: data", "#9a9a9a"),
}


def views(mask: Masking, t: float) -> Tensor:
    """[V, LENGTH], bool: the masks of one row at the rate t, of the same noise for all."""
    noise = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rate = torch.tensor([t], dtype=torch.float64)
    everywhere = torch.ones(1, LENGTH, dtype=torch.bool)
    return mask(rate, noise, everywhere, uniform_density()).mask[:, 0]


def draw_masks() -> Figure:
    """One row of 24 positions under each mask at three rates; a line of cells is a forward."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    heights = [mask.views for mask in MASKS.values()]
    axes = figure.subplots(len(MASKS), len(RATES), height_ratios=heights)
    for line, (name, mask) in zip(axes, MASKS.items(), strict=True):
        for axis, t in zip(line, RATES, strict=True):
            found = views(mask, t)
            axis.pcolormesh(
                found.flip(0).double().numpy(),
                cmap=ListedColormap(["#e4e7eb", "#2a6fb5"]),
                vmin=0,
                vmax=1,
                edgecolors="white",
                linewidth=1.5,
            )
            counts = found.sum(1).tolist()[::-1]
            axis.set_yticks([i + 0.5 for i in range(len(counts))], counts, fontsize=8)
            axis.tick_params(length=0, labelleft=False, labelright=True)
            axis.set_xticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    for axis, t in zip(axes[0], RATES, strict=True):
        axis.set_title(f"t = {t}", fontsize=10)
    figure.supxlabel(
        "positions of a response; dark ones are masked, their number is at the right", fontsize=9
    )
    return figure


def draw_blocks() -> Figure:
    """Who attends to whom in a row of 12 tokens in blocks of 4, with two views of the last two."""
    attend = BlockAttention(4, 12, first=4, views=2)
    allowed = attend.allowed()[0].double()
    part = torch.tensor([1.0] * attend.noisy + [2.0] * attend.noisy + [3.0] * attend.clean)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axis = figure.subplots()
    axis.pcolormesh(
        (allowed * part).flip(0).numpy(),
        cmap=ListedColormap(["#eef0f3", "#ee854a", "#4878cf", "#6a9a6a"]),
        vmin=0,
        vmax=3,
        edgecolors="white",
        linewidth=1.2,
    )
    edges = [0, 4, 8, 12, 16, 20, 24]
    names = [
        "view 1\nblock 2",
        "block 3",
        "view 2\nblock 2",
        "block 3",
        "clean\nblock 1",
        "block 2",
    ]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    axis.set_xticks(middles, names, fontsize=8)
    axis.set_yticks([attend.width - x for x in middles], names, fontsize=8)
    axis.tick_params(length=0)
    for at in edges[1:-1]:
        heavy = at in (attend.noisy, 2 * attend.noisy)
        style = {"color": "#333333" if heavy else "#9aa0a6", "linewidth": 1.6 if heavy else 0.7}
        axis.axvline(at, **style)
        axis.axhline(attend.width - at, **style)
    axis.set_title("a token of each row sees the coloured ones", fontsize=10)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def draw_densities(stream: dict[str, Any]) -> Figure:
    """h of ParetoStream over a run, and w of the objective Widening."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [int(x) for x in stream]
    for step, state in stream.items():
        density = Density.from_state_dict(state)
        colour = _shade(int(step) / max(steps))
        left.plot(density.knots, density.values, color=colour, label=f"step {step}")
    left.axhline(1, color="0.6", linewidth=0.8, linestyle="--")
    left.set(
        title="ParetoStream: how often a rate is drawn", xlabel="masking rate t", ylabel="density"
    )
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        label = f"{progress:.0%} of training"
        right.plot(t, Widening()(progress)(t), color=_shade(progress), label=label)
    right.set(title="Widening: how much a rate counts", xlabel="masking rate t", ylabel="density w")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    return figure


def _shade(share: float) -> tuple[float, float, float, float]:
    return colormaps["viridis"](0.9 * share)


def draw_parts(measured: dict[str, Any]) -> Figure:
    """The gradient's variance by method at equal forwards, and its parts; Standard's whole is 1."""
    names = next(iter(measured.values()))
    figure = Figure(figsize=(11, 0.32 * len(names) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, measured.items(), strict=True):
        shown = [f"{name} ({x['forwards']})" for name, x in lines.items()][::-1]
        start = [0.0] * len(shown)
        for part, (label, colour) in PARTS.items():
            widths = [x[part] * x["forwards"] for x in lines.values()][::-1]
            axis.barh(shown, widths, left=start, label=label, color=colour)
            start = [x + width for x, width in zip(start, widths, strict=True)]
        for height, x in enumerate(reversed(lines.values())):
            interval = [x["forwards"] * end for end in x["interval"]]
            axis.plot(interval, [height] * 2, color="black", linewidth=1)
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="variance of the gradient × forwards of a row, Standard = 1")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(PARTS), frameon=False)
    return figure


def densities(run: Path) -> dict[str, Any]:
    """Step → h of a ParetoStream, of the checkpoints of a run that has kept all of them."""
    found = {"0": json.loads((run / "timesteps_step_0.json").read_text())["density"]}
    saved = sorted(run.glob("step_*"), key=lambda x: int(x.name[5:]))
    for directory in saved[1::2]:
        sampler = ParetoStream()
        state = json.loads((directory / "state.json").read_text())
        sampler.load_state_dict(state["parts"]["timesteps"]["state"])
        found[directory.name[5:]] = sampler.density(uniform_density()).state_dict()
    return found


def parts(file: Path) -> dict[str, Any]:
    """Estimator → forwards of a row, and the parts of the gradient's variance, Standard's being 1.

    A and B stand as one where the 95 % interval of B is wider than 0.3 of Standard's variance.
    """
    lines = json.loads(file.read_text())["estimators"]
    unit = lines[0]["gradient"]["variance"]["value"]
    found = {}
    for x in lines:
        ratio, gradient = x["gradient_ratio"]["equal_rows"], x["gradient"]
        b, c = ({k: v / unit for k, v in gradient[part].items()} for part in "BC")
        rest = ratio["value"] - c["value"]
        apart = b["high"] - b["low"] < 0.3
        rate = min(max(b["value"], 0), rest) if apart else 0
        split = {"A": rest - rate, "B": rate} if apart else {"AB": rest}
        widths = {part: round(split.get(part, 0), 4) for part in ("A", "B", "AB")}
        ends = [round(ratio[end], 4) for end in ("low", "high")]
        widths |= {"C": round(c["value"], 4), "interval": ends, "forwards": x["forwards_per_row"]}
        found[x["name"]] = widths
    return found


def main(given: list[str]) -> None:
    """Take the measurements in, if any are given as arguments, and draw."""
    if given:
        run, *variances = (Path(x) for x in given)
        named = {x.parent.name.replace("_", " "): parts(x) for x in variances}
        kept = {"stream": densities(run), "parts": named}
        MEASURED.write_text(json.dumps(kept, indent=1) + "\n")
    kept = json.loads(MEASURED.read_text())
    for name, figure in (
        ("masks", draw_masks()),
        ("blocks", draw_blocks()),
        ("densities", draw_densities(kept["stream"])),
        ("parts", draw_parts(kept["parts"])),
    ):
        figure.savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:])
