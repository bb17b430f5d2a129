"""How fresh the density of t stays: that of the start's probe, and that of the training stream.

    OMP_NUM_THREADS=1 python benchmarks/stream.py [--objective Window] [--masking Bernoulli]

The quickstart's model is fine-tuned by its optimizer with ``ParetoStream``. At the start and after
every tenth of the run a fresh probe, of more draws and not trained with, gives the root of the
second moment of the target at points of s = W(t). Shown is KL(root ‖ h) of the uniform density, of
the h that the start's probe gave, and of the stream's: means over seeds, and the standard deviation
of the last two's difference. Then the time that the stream adds to a step, as a share of it: steps
with it and without it take turns on one batch, and what is added is timed by itself beside them.
The quickstart's pretrained model must be there: run ``make demo`` once.
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
from mdm_plugin.objectives import ELBO, Window
from mdm_plugin.timesteps import ParetoStream
from mdm_plugin.training.corruption import Corrupted, corrupted_step
from mdm_plugin.training.hidden import row_norms
from mdm_plugin.training.probe import fit, probe
from mdm_plugin.training.schedules import get_linear_schedule_with_warmup
from mdm_plugin.training.step import backward, global_normalizer, learn, wants_norms

POINTS, ROWS, MASKS = 20, 64, 8  # of a fresh probe; many rows, as few of them have most of G²
TURNS = 40
FRESH = 1_000_000  # its draws are keyed by the step: others than those of the start's


class Training:
    """The quickstart's fine-tuning for some steps, with a sampler of t that learns."""

    def __init__(self, w: Density, masking: Any, target: Any, steps: int, seed: int) -> None:
        quickstart, self.steps = Quickstart(), steps
        cfg, tokenizer = quickstart.config, quickstart.tokenizer
        self.model: MDMTransformer = quickstart.model(quickstart.pretrained).train()
        self.batches = GlobalBatches(
            quickstart.rows("train"),
            Split(cfg.batch_size),
            Padding(tokenizer.pad_id, tokenizer.eos_id),
            seed=seed,
        )
        self.sampler = ParetoStream(target=target)
        self.estimator = Estimator(
            self.sampler, masking, instantiate(cfg, "loss"), tokenizer.mask_id, w
        )
        self.optimizer = instantiate(cfg, "optimizer", list(self.model.named_parameters()))
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
        """s and the root at the t of each, of ROWS rows × MASKS masks."""
        s = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        plan = ProbePlan(self.estimator.w.quantile(s), ROWS, MASKS, self.sampler.learns_from, None)
        key = FRESH + step
        measured = probe(self.model, self.estimator, plan, self.batches, WORLD, step=key)
        return s, measured.root


def freshness(training: Training) -> list[list[float]]:
    """Train; KL to a fresh probe's root of the uniform density, the start's and the stream's h, at
    each tenth."""
    start, tenth, found = training.begin(), training.steps // 10, []
    for step in range(training.steps + 1):
        if step % tenth == 0:
            s, root = training.fresh(step)
            own = training.sampler.density(training.estimator.w)
            densities = torch.ones_like(s), start(s), own(s)
            found.append([float(pareto.divergence(root, h.log(), s)) for h in densities])
        if step < training.steps:
            (batch,) = corrupted_step(training.batches, step, training.estimator)
            training.step(batch)
            training.schedule.step()
    return found


def table(found: list[list[list[float]]], steps: int) -> str:
    """Means over seeds, and the spread of the stream's difference from the start's."""
    out = ["  step   uniform     start    stream   stream - start   KL to a fresh probe's root"]
    kl = torch.tensor(found, dtype=torch.float64)  # [seeds, 11, 3]
    difference = kl[:, :, 2] - kl[:, :, 1]
    for i, x in enumerate(kl.mean(0).tolist()):
        spread = float(difference[:, i].std()) if len(kl) > 1 else float("nan")
        out.append(
            f"{i * steps // 10:6} "
            + " ".join(f"{y:9.4f}" for y in x)
            + f"   {float(difference[:, i].mean()):+.4f} ± {spread:.4f}"
        )
    return "\n".join(out)


def timed(run: Callable[[], Any]) -> float:
    """Seconds that the CPU works for it, so that other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


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
    objectives = {"ELBO": ELBO, "Window": Window}
    parser.add_argument("--objective", default="ELBO", choices=objectives)
    parser.add_argument("--masking", default="FixedCount", choices=masks)
    parser.add_argument("--target", default="gradient", choices=("gradient", "loss"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    w, masking = objectives[given.objective]()(0.0), masks[given.masking]()
    found = []
    for seed in given.seeds:
        training = Training(w, masking, given.target, given.steps, seed)
        found.append(freshness(training))
    print(table(found, given.steps), flush=True)
    cost(training)


if __name__ == "__main__":
    main()
