"""Compiled steps over eager ones, for few and for many masked positions.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --output compiled.json

A model of d 256, V 32,000 and 2 layers; forward, backward and optimizer step on a micro-batch of
about 50, 500 and 5,000 masked positions, in rows of 0.5 to 1.5 times their mean length, padded and
packed. Ratios are of CPU seconds (on CUDA of seconds), medians over pairs in turn (of 20, 2 and 1
steps), with their range. Beside them is how many graphs the warm-up compiled, on three other
micro-batches, and how many came later.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from training import Size, Step, a_batch, adamw, in_turn, our_step, ratio

from mdm_plugin.distributed.build import Build, build_model
from mdm_plugin.distributed.parameters import initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.models import llada
from mdm_plugin.training.corruption import Corrupted, pack

# About so many masked positions, in so many rows.
MEASURED = ((50, 5), (500, 6), (5000, 24))
# Inductor's CPU code sums more than 4,096 terms in another way: a graph for each.
WARM_UP = ((200, 3), (4000, 20), (4500, 20))


def a_micro_batch(sizes: tuple[int, int], size: Size, layout: str, world: World) -> Corrupted:
    """Rows of which about so many positions come to be masked; a third of each is prompt."""
    positions, rows = sizes
    lengths = (torch.linspace(0.5, 1.5, rows) * 2 * positions / rows).long().tolist()
    _, noisy, _ = a_batch([(n // 2, n) for n in lengths], size.vocabulary)
    # Of the model, packing reads that its attention is full.
    return noisy if layout == "padded" else pack(noisy, llada(8, 1, 1, 8, 8, 8), world.device)


def a_way(size: Size, world: World, compiled: bool) -> Callable[[Corrupted], None]:
    """A step of a model of its own, on a micro-batch."""
    shape = (size.layers, size.heads, size.width, size.length, size.mlp)
    model = build_model(
        lambda: llada(size.vocabulary, *shape), world, size.dtype, Build(compile=compiled)
    )
    initialize_parameters(model, 0)
    loss, optimizer = MDMLoss(), adamw(model)
    if compiled:
        loss.compile_chunks()
    return lambda noisy: our_step(model, noisy, loss, optimizer, world.device.type)()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    world = World(0, 1, torch.device(given.device), None)
    size = Size(vocabulary=32_000, width=256, layers=2, heads=4, length=1024, mlp=768)
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    results: list[dict[str, Any]] = []
    for layout in ("padded", "packed"):
        torch._dynamo.reset()
        counters.clear()
        ways = {way: a_way(size, world, way == "compiled") for way in ("eager", "compiled")}
        for sizes in WARM_UP:
            ways["compiled"](a_micro_batch(sizes, size, layout, world))
        graphs = counters["stats"]["unique_graphs"]
        for sizes in MEASURED:
            noisy = a_micro_batch(sizes, size, layout, world)
            steps: dict[str, Step] = {way: partial(step, noisy) for way, step in ways.items()}
            masked = len(noisy.targets.labels)
            seconds = in_turn(steps, given.pairs, max(1, 1000 // sizes[0]), clock)
            found = ratio(seconds, "compiled", "eager")
            later = counters["stats"]["unique_graphs"] - graphs
            print(
                f"{layout}, {masked:5} masked positions: compiled / eager {found['ratio']:.2f} "
                f"({found['low']:.2f}–{found['high']:.2f}), {found['seconds']:.3f} s; "
                f"{graphs} graphs, and {later} later",
                flush=True,
            )
            more = {"layout": layout, "masked": masked, "graphs": graphs, "graphs_later": later}
            results.append(found | more)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
