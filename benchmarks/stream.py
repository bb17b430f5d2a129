"""How fresh the density of t stays: that of the start's probe, and that of the training stream.

    OMP_NUM_THREADS=1 python benchmarks/stream.py [--masking FixedCount] [--target gradient]

The quickstart's model is fine-tuned with ``ParetoStream``. At the start and after every tenth of
the run a fresh probe, of more draws and not trained with, gives the root of the second moment of
the target at points of t. Shown is KL(root ‖ h) of the uniform density, of the h that the start's
probe gave, and of the stream's. Then the time that the stream adds to a step, as a share of it:
steps with it and without it take turns on one batch, and what is added is timed by itself beside
them. The quickstart's pretrained model must be there: run ``make demo`` once.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from quickstart_model import WORLD, Quickstart
from torch import Tensor

from mdm_plugin import pareto
from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator, ProbePlan
from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.density import Density
from mdm_plugin.masking import Bernoulli, FixedCount
from mdm_plugin.models import MDMTransformer
from mdm_plugin.timesteps import ParetoStream
from mdm_plugin.training.hidden import row_norms
from mdm_plugin.training.probe import fit, probe
from mdm_plugin.training.schedules import get_linear_schedule_with_warmup
from mdm_plugin.training.step import (
    Corrupted,
    backward,
    corrupted_step,
    global_normalizer,
    learn,
    wants_norms,
)

POINTS, ROWS, MASKS = 20, 64, 8  # of a fresh probe; many rows, as few of them have most of G²
TURNS = 40
FRESH = 1_000_000  # its draws are keyed by the step: others than those of the start's


class Training:
    """The quickstart's fine-tuning for some steps, with a sampler of t that learns."""

    def __init__(self, masking: Any, target: Any, steps: int) -> None:
        quickstart, self.steps = Quickstart(), steps
        cfg, tokenizer = quickstart.config, quickstart.tokenizer
        self.model: MDMTransformer = quickstart.model(quickstart.pretrained).train()
        self.batches = GlobalBatches(
            quickstart.rows("train"),
            Split(cfg.batch_size),
            Padding(tokenizer.pad_id, tokenizer.eos_id),
            seed=0,
        )
        self.sampler = ParetoStream(target=target)
        self.estimator = Estimator(
            self.sampler, masking, instantiate(cfg, "loss"), tokenizer.mask_id
        )
        self.optimizer = instantiate(cfg, "optimizer", list(self.model.parameters()))
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, num_warmup_steps=steps // 20, num_training_steps=steps
        )

    def step(self, batch: Corrupted, streaming: bool = True) -> None:
        """One optimizer step; the sampler learns from it."""
        normalizer = global_normalizer([batch], WORLD)
        norms = streaming and wants_norms(self.sampler)
        result = backward(self.model, self.estimator.loss, batch, normalizer, WORLD, norms=norms)
        if streaming:
            learn(self.sampler, [result.shown(self.sampler)], WORLD)
            self.sampler.density(self.estimator.w)  # what the next step draws from
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def begin(self) -> Density:
        """Probe, as the recipe does; the density that this gives."""
        plan = self.sampler.probe_plan(self.estimator.w)
        measured = probe(self.model, self.estimator, plan, self.batches, WORLD, step=0)
        fit(self.estimator, plan, measured, WORLD)
        return self.sampler.density(self.estimator.w)

    def fresh(self, step: int) -> tuple[Tensor, Tensor]:
        """t and the root at each, of ROWS rows × MASKS masks."""
        t = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        plan = ProbePlan(t, ROWS, MASKS, self.sampler.learns_from, None)
        key = FRESH + step
        measured = probe(self.model, self.estimator, plan, self.batches, WORLD, step=key)
        return t, measured.root


def freshness(training: Training) -> None:
    """Train, and print a table of divergences."""
    start, tenth = training.begin(), training.steps // 10
    print(f"{'step':>6} {'uniform':>9} {'start':>9} {'stream':>9}   KL to a fresh probe's root")
    for step in range(training.steps + 1):
        if step % tenth == 0:
            t, root = training.fresh(step)
            densities = (
                torch.ones_like(t),
                start(t),
                training.sampler.density(training.estimator.w)(t),
            )
            kl = [float(pareto.divergence(root, h.log(), t)) for h in densities]
            print(f"{step:6} " + " ".join(f"{x:9.4f}" for x in kl), flush=True)
        if step < training.steps:
            (batch,) = corrupted_step(training.batches, step, training.estimator)
            training.step(batch)
            training.schedule.step()


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cost(training: Training) -> None:
    """Print what the stream adds to a step."""
    sampler, w = training.sampler, training.estimator.w
    (batch,) = corrupted_step(training.batches, 0, training.estimator)
    hidden = torch.randn(*batch.noisy.shape, training.model.tok_embeddings.embedding_dim)

    def added() -> None:
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
        learn(sampler, [(batch.t, row_norms(batch, norms, torch.ones(())))], WORLD)
        sampler.density(w)

    parts: dict[str, list[float]] = {"with": [], "without": [], "added": []}
    for _ in range(TURNS):
        parts["with"].append(timed(lambda: training.step(batch)))
        parts["without"].append(timed(lambda: training.step(batch, streaming=False)))
        parts["added"].append(timed(added))
    medians = {name: median(times) for name, times in parts.items()}
    print(
        f"a step with the stream over one without: {medians['with'] / medians['without']:.4f}; "
        f"its own part: {medians['added'] / medians['without']:.3%} of {medians['without']:.4f} s"
    )


def main() -> None:
    """Print the table, and the cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    masks = {"FixedCount": FixedCount, "Bernoulli": Bernoulli}
    parser.add_argument("--masking", default="FixedCount", choices=masks)
    parser.add_argument("--target", default="gradient", choices=("gradient", "loss"))
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    training = Training(masks[given.masking](), given.target, given.steps)
    freshness(training)
    cost(training)


if __name__ == "__main__":
    main()
