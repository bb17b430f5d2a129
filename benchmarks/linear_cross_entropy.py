"""The loss's linear cross-entropy beside torch's and beside full logits: time, memory, accuracy.

    python benchmarks/linear_cross_entropy.py --output FILE.json

M masked positions, each with a weight of its own, and a head of V × D; forward and backward. Ours
is ``MDMLoss``. torch's is ``F.linear_cross_entropy(reduction="none")``, times the weights: with the
chunks and precision it chooses itself, with our chunks, and with all in bf16. Full logits are
``F.cross_entropy`` of all of them in fp32. Times are ratios to ours with its default chunks:
medians over rounds in turn, with their range. Memory is the peak above what is there before, in a
process of its own (VmHWM on a CPU), after a step with 8 positions. Errors are the largest
difference to fp32 full logits of the same numbers, as a share of the largest value: the worse of
the two gradients', and CE's.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import in_turn, ratio

from mdm_plugin.loss import MDMLoss, Targets

OURS = "ours, chunks of 1024"
WAYS = (
    *(OURS, "ours, chunks of 256", "torch, its own chunks", "torch, chunks of 1024"),
    *("torch, chunks of 256", "full logits"),
)
LOOSE = "torch, chunks of 1024, sums in bfloat16"


class Case(NamedTuple):
    """Hidden states [M, D], a head of V × D, labels and weights."""

    hidden: Tensor
    head: nn.Linear
    targets: Targets


def a_case(given: Any, positions: int, dtype: str) -> Case:
    """A case whose logits have variance 1, with weights 1/p."""
    torch.manual_seed(0)
    hidden = torch.randn(positions, given.width)
    head = nn.Linear(given.width, given.vocabulary, bias=False)
    nn.init.normal_(head.weight, std=given.width**-0.5)
    place = torch.arange(positions)
    weights = 1 / (positions * torch.empty(positions).uniform_(0.1, 1))
    targets = Targets(place, torch.randint(given.vocabulary, (positions,)), place, weights)
    hidden = hidden.to(given.device, getattr(torch, dtype)).requires_grad_()
    return Case(hidden, head.to(hidden), targets.to(hidden.device))


def step(way: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and backward pass; it returns CE and the gradients of hidden states and head."""
    hidden, head, targets = case
    name = way.split(",")[0]
    size = next((int(x) for x in way.replace(",", "").split() if x.isdigit()), None)
    loss = MDMLoss(chunk_size=size or 1024)
    sums = {"acc_dtype": torch.bfloat16, "acc_policy": "compact"} if way == LOOSE else {}
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=size, **sums)

    def once() -> tuple[Tensor, ...]:
        if name == "ours":
            total, ce = loss(head, hidden, targets)
        else:
            if name == "full logits":
                ce = F.cross_entropy(head(hidden).float(), targets.labels, reduction="none")
            else:
                ce = F.linear_cross_entropy(
                    hidden, head.weight, targets.labels, reduction="none", options=options
                )
            total = (ce * targets.weights).sum()
        return ce.detach(), *torch.autograd.grad(total, (hidden, head.weight))

    return once


def errors(way: str, case: Case) -> dict[str, float]:
    """The largest differences to fp32 full logits, of the gradients and of CE."""
    exact = nn.Linear(1, 1, bias=False)
    exact.weight = nn.Parameter(case.head.weight.detach().float())
    hidden = case.hidden.detach().float().requires_grad_()
    right = step("full logits", Case(hidden, exact, case.targets))()
    found = step(way, case)()
    ce, *gradients = (
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)
    )
    return {"gradient_error": max(gradients), "ce_error": ce}


def peak(given: Any) -> None:
    """Print one way's peak above what is there before, MiB."""
    positions, dtype, way = json.loads(given.alone)
    step(way, a_case(given, 8, dtype))()
    once = step(way, a_case(given, positions, dtype))
    if given.device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once()
        print((torch.cuda.max_memory_allocated() - rest) / 2**20)
    else:
        rest = kib("VmRSS")
        once()
        print((kib("VmHWM") - rest) / 2**10)


def kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1])


def mib(given: Any, *what: Any) -> float:
    """What ``peak`` prints in a process of its own, whose allocator gives back what is freed."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--alone", json.dumps(what)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[500, 4000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        return peak(given)
    results = []
    heads = f"{'time / ours':>20} {'seconds':>8} {'MiB':>6} {'gradient error':>15} {'CE error':>9}"
    print(" " * 41, heads)
    for dtype in given.dtypes:
        for positions in given.positions:
            print(f"{dtype}, {positions} positions", flush=True)
            made = a_case(given, positions, dtype)
            ways = (*WAYS, LOOSE) if dtype == "bfloat16" else WAYS
            seconds = in_turn({way: step(way, made) for way in ways}, given.pairs)
            for way in ways:
                time = ratio(seconds, way, OURS)
                x = {"dtype": dtype, "positions": positions, "way": way, **time}
                x |= {"mib": mib(given, positions, dtype, way), **errors(way, made)}
                results.append(x)
                print(
                    f"  {way:40} {x['ratio']:6.2f} ({x['low']:5.2f}–{x['high']:5.2f}) "
                    f"{x['seconds']:8.2f} {x['mib']:6.0f} {x['gradient_error']:15.1e} "
                    f"{x['ce_error']:9.1e}",
                    flush=True,
                )
    if given.output:
        given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
