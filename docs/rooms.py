"""Draws the rooms of mdm_plugin, and which import which: ``python docs/rooms.py`` → docs/rooms.png.

An arrow says that a room imports another. Arrows that follow from others are left out: a room may
import what the rooms below it import.
"""

import ast
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mdm_plugin"
MATHS = ("noise", "density", "loss", "contract", "pareto")
MATHS += ("objectives", "timesteps", "masking", "variance")
# Where each room is drawn: (across, up), and what it holds.
ROOMS = {
    "recipes": (0.6, 7, "one file per command"),
    "titan": (2.2, 7, "torchtitan's side"),
    "quickstart": (2.2, 6, "data, demo"),
    "alignment": (0.2, 6, "preferences, rewards,\nbounds, references"),
    "evaluation": (1.2, 5, "bound, answers, lm-eval,\nvalidation, variance"),
    "generation": (2.5, 4, "samplers, decoding,\ncaches, live view"),
    "training": (0.4, 4, "step, probe, guard, metrics,\nEMA, checks, stop, dry run"),
    "checkpoint": (0.2, 3, "weights, state,\nmanifest, export"),
    "data": (2.5, 2, "sources, cache, rows,\nbatches, prompts"),
    "distributed": (0.7, 2, "ranks, sharded models,\nparameters, gradients"),
    "config": (-1.1, 2, "options, components,\nsecrets"),
    "models": (1.4, 1, "LLaDA, Dream, tokenizer,\nnames"),
    "the maths": (
        1.0,
        0,
        "contract, objectives, timesteps, masking,\npareto, density, loss, variance, noise",
    ),
}


def room(name: str) -> str | None:
    """The room of a part of mdm_plugin; None for what all use."""
    if name in MATHS:
        return "the maths"
    return name if name in ROOMS else None


def arrows() -> set[tuple[str, str]]:
    """(from, to) of each room whose files import something of another."""
    found = set()
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        inside = file.is_relative_to(PACKAGE)
        own = room(file.relative_to(PACKAGE).with_suffix("").parts[0]) if inside else "recipes"
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdm_plugin"):
                names = [f"{node.module}.{x.name}" for x in node.names]
            for other in {room(name.split(".")[1]) for name in names} - {own, None}:
                if own:
                    found.add((own, other))
    return found


def reduced(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others."""
    below: dict[str, set[str]] = {name: {b for a, b in found if a == name} for name in ROOMS}

    def reach(name: str) -> set[str]:
        return below[name].union(*(reach(x) for x in below[name]))

    return {(a, b) for a, b in found if not any(b in reach(other) for other in below[a] - {b})}


def draw() -> Figure:
    figure = Figure(figsize=(8.5, 8), layout="constrained")
    axis = figure.subplots()
    for start, end in sorted(reduced(arrows())):
        (x0, y0, _), (x1, y1, _) = ROOMS[start], ROOMS[end]
        axis.annotate(
            "",
            (x1, y1 + 0.28),
            (x0, y0 - 0.28),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#4878cf",
                "linewidth": 1.2,
                "shrinkA": 0,
            },
        )
    for name, (x, y, text) in ROOMS.items():
        axis.text(
            x,
            y,
            f"{name}\n{text}",
            ha="center",
            va="center",
            fontsize=8.5,
            bbox={"boxstyle": "round,pad=0.45", "facecolor": "#fff8ec", "edgecolor": "#888888"},
        )
    axis.set(xlim=(-1.8, 3.4), ylim=(-0.5, 7.4))
    axis.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "docs/rooms.png", dpi=110)
