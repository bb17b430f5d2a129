"""The second moment of P-POTS's density, fitted to noisy probes: `python benchmarks/fit.py`.

A probe i is one of six true shapes of the root at the grid of its family, each value times 1 + σ·z
with z ~ N(0, 1), and σ from 0 for the first probes to 0.3 for the last. Shown is ∫ root²/q dt over
(0, 1) of the true root for the fitted q, over the uniform density's ∫ root² dt: 1 is a density that
gains nothing. Beside it is the least possible, (∫ root dt)²/∫ root² dt.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mdm_plugin.pareto import EPR, fit, probe_grid

FAMILIES: tuple[Literal["epr", "piecewise"], ...] = ("epr", "piecewise")
POINTS, MOST = 30, 0.3
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "falling, 1/sqrt(t)": lambda t: (t + 0.001) ** -0.5,
    "rising, of the family": EPR(A=1, k=1.2, m=2, a=0.5, r=2, b=1e-9, q=3).root,
    "U, of the family": EPR(A=0.5, k=0.1, m=1.5, a=4, r=6, b=4, q=8).root,
    "bell": lambda t: 0.3 + torch.exp(-(((t - 0.5) / 0.15) ** 2) / 2),
    "steep near 0, of the family": EPR(A=1, k=0.2, m=1.5, a=0.1, r=2, b=60, q=30).root,
}
FINE = torch.linspace(0, 1, 20_001, dtype=torch.float64) ** 3


def integral(y: Tensor) -> float:
    """Over (0, 1), of what it is at ``FINE``."""
    return float(torch.trapezoid(y, FINE))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--probes", type=int, default=1000, help="of each family")
    parser.add_argument("--mix", type=float, default=0.2)
    given = parser.parse_args()
    heads = (f"{family + ': median':>20} {'largest':>8}" for family in FAMILIES)
    print(f"{'root':30} {'least':>6}", *heads, flush=True)
    found: dict[str, dict[str, list[float]]] = {}
    rounds = -(-given.probes // len(SHAPES))
    for family in FAMILIES:
        moments = found[family] = defaultdict(list)
        t = probe_grid(family, POINTS)
        for i in tqdm(range(given.probes), desc=family, leave=False):
            name = list(SHAPES)[i % len(SHAPES)]
            truth, noise = SHAPES[name], MOST * (i // len(SHAPES)) / max(1, rounds - 1)
            generator = torch.Generator().manual_seed(i)
            z = torch.randn(POINTS, generator=generator, dtype=torch.float64)
            root = truth(t) * (1 + noise * z).clamp(min=0)
            q = fit(t, root, family=family, mix=given.mix).density(FINE)
            square = truth(FINE).square()
            moments[name].append(integral(square / q) / integral(square))
            moments["all"].append(moments[name][-1])
    for name in (*SHAPES, "all"):
        if name == "all":
            least = ""
        else:
            root = SHAPES[name](FINE)
            least = f"{integral(root) ** 2 / integral(root.square()):.3f}"
        columns = (f"{median(x[name]):20.3f} {max(x[name]):8.3f}" for x in found.values())
        print(f"{name:30} {least:>6}", *columns)
    above = {family: sum(x > 1.05 for x in moments["all"]) for family, moments in found.items()}
    print(f"above 1.05, of {given.probes} probes: {above}")


if __name__ == "__main__":
    main()
