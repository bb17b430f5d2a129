"""Block diffusion: views that share a clean copy, and writing with kept keys and values.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py --output blocks.json

Two tables, each of ratios of CPU seconds (on CUDA of seconds) measured side by side in one process,
medians over pairs in turn, with their range. The model has d 256, 4 layers (8 where it writes) and
a vocabulary of 4,096.

1. Time of a view's forward and backward pass, of rows of 512 tokens in blocks of 32: K views with
   one clean copy of (K + 1)·L tokens, over K rows of 2·L tokens, each with a clean copy of its own.
   ``ideal`` is (K + 1) / 2K, the tokens' ratio.
2. Tokens per second of writing 256 tokens, one a step, with the cache of finished blocks over
   without.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training import in_turn, ratio

from mdm_plugin.contract import Blocks, Estimator, Masking, Views
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.density import Density
from mdm_plugin.distributed.parameters import initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.generation import Decoding, TokenIds, generate
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount, Rotation
from mdm_plugin.models import MDMTransformer, llada
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.corruption import corrupted_step
from mdm_plugin.training.step import backward, global_normalizer

VOCABULARY, MASK = 4096, 4095


class OneView(Masking):
    """One of the views of another mask."""

    def __init__(self, masking: Masking, view: int) -> None:
        self.masking, self.view, self.by_count = masking, view, masking.by_count

    def __call__(self, t: Tensor, u: Tensor, eligible: Tensor, w: Density) -> Views:
        found = self.masking(t, u, eligible, w)
        at = slice(self.view, self.view + 1)
        return Views(found.mask[at], found.inverse_p[at])


def a_model(world: World, length: int, block: int, layers: int = 4) -> MDMTransformer:
    model = llada(VOCABULARY, layers, 4, 256, length, 768, block_length=block)
    initialize_parameters(model, 0)
    return model.to(world.device)


def views(world: World, number: int, length: int, block: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of 2 rows, ``number`` views of each: one clean copy, or one for each."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY - 1, (2, length)).tolist()
    rows = Rows((row, [False] * block + [True] * (length - block)) for row in tokens)
    batches = GlobalBatches(rows, Split(2), Padding(0), seed=0)
    masking = Rotation(number, fixed_count=True) if number > 1 else FixedCount()
    plain = Estimator(Stratified(), masking, MDMLoss(), MASK, blocks=Blocks(block))
    model = a_model(world, length, block)
    apart = [plain._replace(masking=OneView(masking, view)) for view in range(number)]

    def of(estimators: list[Estimator]) -> Callable[[], None]:
        micro_batches = [corrupted_step(batches, 0, x)[0] for x in estimators]

        def step() -> None:
            for batch in micro_batches:
                backward(model, plain.loss, batch, global_normalizer([batch], world), world)
            model.zero_grad(set_to_none=True)

        return step

    return {"shared": of([plain]), "apart": of(apart)}


def writing(world: World, number: int, block: int) -> dict[str, Callable[[], None]]:
    """4 responses of ``number`` tokens."""
    torch.manual_seed(0)
    prompts = [torch.randint(VOCABULARY - 1, (n,)).to(world.device) for n in (20, 33, 50, 64)]
    model = a_model(world, number + 64 + block, block, layers=8).eval()
    special = TokenIds(MASK, 0)

    def of(cache: Any) -> Callable[[], None]:
        def write() -> None:
            generate(model, prompts, Decoding(cache=cache), special=special, max_new_tokens=number)

        return write

    return {"without": of(None), "with": of("prefix")}


def shown(found: dict[str, float]) -> str:
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=512, help="of the rows")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="to be written")
    given = parser.parse_args()
    world = World(0, 1, torch.device(given.device), None)
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    results: dict[str, Any] = {"views": [], "writing": {}}
    print("Time of a view, one clean copy over a copy each")
    for number in (1, 2, 4):
        steps = views(world, number, given.length, given.block)
        found = ratio(in_turn(steps, given.pairs, clock=clock), "shared", "apart")
        ideal = (number + 1) / (2 * number)
        results["views"].append({"views": number, "ideal": ideal, "ratio": found})
        print(f"  K = {number}  {shown(found)}  ideal {ideal:.3f}", flush=True)
    ways = writing(world, given.tokens, given.block)
    found = ratio(in_turn(ways, max(2, given.pairs // 3), clock=clock), "without", "with")
    results["writing"] = found
    print(f"Tokens per second, with the cache over without: {shown(found)}")
    if given.output:
        given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
