"""What a step teaches at each masking rate, on the study's model: signal, noise, and for whom.

    python -m benchmarks.study.rates --task chain --output bench

Standard fine-tunes the study's model; at some of its steps, for each t of a grid, with masks by
count, from batches of 32 rows:

- tokens: predicted in one forward of a row, t·N;
- signal: |G(t)|², of the mean gradient of the row loss at t, without the bias of its noise;
- noise: tr Cov of one row's gradient at t; signal / noise is what one forward says;
- cosine of G(t) with the ELBO's gradient, and with the decoder's: of the cross-entropy of the token
  that greedy decoding unmasks at each of its steps, along the path that it takes to the reference
  answer, one token a step.

Writes OUTPUT/rates_TASK.json and .png, and prints a table.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.methods import STEPS, overrides
from benchmarks.study.runs import CONFIGS, _recipe
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data import GlobalBatches
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import FixedCount
from mdm_plugin.models import MDMTransformer
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.batches import global_batches
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.step import backward, global_normalizer

WORLD = World(0, 1, torch.device("cpu"), None)
GRID = torch.linspace(1 / 24, 23 / 24, 12, dtype=torch.float64)


class Gradients(NamedTuple):
    """The gradients of some batches, [K, D], each the mean of its rows'."""

    each: Tensor

    def signal(self) -> float:
        """|E G|², unbiased."""
        k = len(self.each)
        return float((self.each.sum(0).square().sum() - self.each.square().sum()) / (k * (k - 1)))

    def noise(self, rows: int) -> float:
        """tr Cov of one row's gradient."""
        return float(self.each.var(0).sum()) * rows

    def product(self, other: "Gradients") -> float:
        """The inner product of both means, whose batches are drawn apart: unbiased."""
        return float(self.each.mean(0) @ other.each.mean(0))


def cosine(a: Gradients, b: Gradients) -> float:
    """Of both means, without the noise's share in their lengths; nan where there is no signal."""
    lengths = a.signal() * b.signal()
    return a.product(b) / lengths**0.5 if a.signal() > 0 < b.signal() else float("nan")


def collected(model: MDMTransformer) -> Tensor:
    """The gradient, flat, in fp64; and none is left."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found.double()


def at_rate(
    model: MDMTransformer, batches: GlobalBatches, t: float, mask_id: int, first: int, count: int
) -> Gradients:
    """Gradients of the row loss at t; below 0, of the ELBO, t stratified."""
    found = []
    for step in range(first, first + count):
        (batch,) = batches.micro_batches(step)
        estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), mask_id)
        if t < 0:
            generator = torch.Generator().manual_seed(step)
            times = estimator.timesteps(batches.size, generator, estimator.w)
        else:
            n = torch.full((batches.size,), t, dtype=torch.float64)
            times = Times(n, torch.ones_like(n))
        noisy = corrupt(batch, times, estimator)
        backward(model, estimator.loss, noisy, global_normalizer([noisy], WORLD), WORLD)
        found.append(collected(model))
    return Gradients(torch.stack(found))


def of_decoder(
    model: MDMTransformer, batches: GlobalBatches, mask_id: int, first: int, count: int
) -> Gradients:
    """Gradients of (1/N)·Σ CE of the tokens that greedy decoding unmasks, one at each step."""
    found = []
    for step in range(first, first + count):
        (batch,) = batches.micro_batches(step)
        _path(model, batch, mask_id)
        found.append(collected(model))
    return Gradients(torch.stack(found))


def _path(model: MDMTransformer, batch: Batch, mask_id: int) -> None:
    """Add the gradient along the path: the most confident position, then the reference's token."""
    masked, n = batch.eligible.clone(), batch.eligible.sum(1)
    rows = torch.arange(len(n))
    while masked.any():
        here = masked.any(1)
        logits = model(torch.where(masked, mask_id, batch.tokens), mask=batch.attend)
        sure = logits.detach().softmax(-1).amax(-1).masked_fill(~masked, -1)
        chosen = sure.argmax(1)
        ce = F.cross_entropy(logits[rows, chosen], batch.tokens[rows, chosen], reduction="none")
        (ce * here / n / len(n)).sum().backward()
        masked[rows[here], chosen[here]] = False


def measure(home: Path, task: str, work: Path, steps: list[int], count: int) -> dict[str, Any]:
    """All figures at each of ``steps`` of a run of Standard."""
    given = [f"home={home}", f"task={task}", f"output_dir={work}", *overrides("standard", task)]
    given += ["seed=1", "optimizer.lr=4e-3", f"checkpointer.checkpoint_dir={home / 'pretrained'}"]
    every = STEPS[task] // 8
    more = [f"save_every_n_steps={every}", "run_val_every_n_steps=null", "keep_last_n=20"]
    if not list(work.glob("step_*")):
        _recipe("mdm_full_finetune", CONFIGS / "finetune.yaml", given + more)
    config = load_config(str(CONFIGS / "finetune.yaml"), given, Options)
    tokenizer, model = instantiate(config, "tokenizer"), instantiate(config, "model")
    rows = instantiate(config, "dataset", tokenizer)
    batches = global_batches(config, rows, tokenizer, WORLD, 1)
    mask_id, size, found = tokenizer.mask_id, batches.size, {}
    for step in steps:
        Weights(home / "pretrained" if step == 0 else work / f"step_{step}").load(model)
        apart = [10_000 + 1_000 * i for i in range(len(GRID) + 2)]
        elbo = at_rate(model, batches, -1.0, mask_id, apart[-1], 4 * count)
        decoder = of_decoder(model, batches, mask_id, apart[-2], count)
        lines = []
        for t, first in zip(GRID.tolist(), apart, strict=False):
            here = at_rate(model, batches, t, mask_id, first, count)
            lines.append(
                {
                    "t": t,
                    "signal": here.signal(),
                    "noise": here.noise(size),
                    "cosine_elbo": cosine(here, elbo),
                    "cosine_decoder": cosine(here, decoder),
                    "toward_decoder": here.product(decoder),
                }
            )
        found[str(step)] = {"rates": lines, "elbo_decoder": cosine(elbo, decoder)}
        print(table(step, found[str(step)]), flush=True)
    return found


def table(step: int, found: dict[str, Any]) -> str:
    """What was measured at a step, as a table."""
    out = [
        f"step {step}: cosine of the ELBO's gradient and the decoder's {found['elbo_decoder']:.2f}",
        "     t    signal     noise   signal/noise   cos ELBO   cos decoder",
    ]
    for x in found["rates"]:
        ratio = x["signal"] / x["noise"]
        out.append(
            f"  {x['t']:.2f}  {x['signal']:8.4f}  {x['noise']:8.3f}  {ratio:13.5f}"
            f"  {x['cosine_elbo']:9.2f}  {x['cosine_decoder']:12.2f}"
        )
    return "\n".join(out)


def draw(found: dict[str, Any], file: Path) -> None:
    """Signal over noise, and both cosines, over t: a line for each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for step, x in found.items():
        t = [y["t"] for y in x["rates"]]
        ratio = [max(y["signal"], 0) / y["noise"] for y in x["rates"]]
        axes[0].plot(t, ratio, ".-", label=f"step {step}")
        axes[1].plot(t, [y["cosine_elbo"] for y in x["rates"]], ".-")
        axes[2].plot(t, [y["cosine_decoder"] for y in x["rates"]], ".-")
    axes[0].set(title="signal / noise of one row's gradient", xlabel="t", yscale="log")
    axes[1].set(title="cosine with the ELBO's gradient", xlabel="t", ylim=(-0.2, 1))
    axes[2].set(title="cosine with the greedy decoder's", xlabel="t", ylim=(-0.2, 1))
    axes[0].legend()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    """A run, its figures at five moments, a table and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = os.environ.get("MDM_PLUGIN_HOME", "~/.cache/mdm_plugin")
    parser.add_argument("--home", type=Path, default=Path(place) / "study")
    parser.add_argument("--task", default="chain", choices=list(STEPS))
    parser.add_argument("--batches", type=int, default=32, help="for each t")
    parser.add_argument("--output", type=Path, required=True, help="directory")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    home, total = given.home.expanduser().resolve(), STEPS[given.task]
    work = (given.output / f"rates_{given.task}").resolve()
    steps = [0, total // 8, total // 4, total // 2, total]
    found = measure(home, given.task, work, steps, given.batches)
    (given.output / f"rates_{given.task}.json").write_text(json.dumps(found, indent=1))
    draw(found, given.output / f"rates_{given.task}.png")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
