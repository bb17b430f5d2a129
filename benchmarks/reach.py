"""Time to the plain loop's final likelihood bound, on the quickstart: `make bench`.

    python benchmarks/reach.py --output bench

The plain loop fine-tunes the quickstart's pretrained model as the field's scripts do: transformers'
Llama without its causal mask, Standard masks, logits of all positions, nothing compiled. Its
learning rate is the best of three by the validation rows; its bound is measured on the test rows
after its last step. Then the recipe runs with everything on and ever more steps, each a run of its
own with its own schedule, until one ends at that bound or below. Times are the seconds that the CPU
works for a training loop, compiling included, so that other work on the machine does not count.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from quickstart_model import WORLD, Quickstart, last_checkpoint
from training import Size, plain_loss, plain_model

from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.density import uniform_density
from mdm_plugin.evaluation import BoundEstimator
from mdm_plugin.masking import Bernoulli
from mdm_plugin.models import MDMTransformer
from mdm_plugin.models.naming import FAMILIES
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training import get_linear_schedule_with_warmup

EPOCHS = 40
# The quickstart's own settings, which docs/objectives.md found best, compiled; its rows are not
# filled with EOS, and its weights decay more, by the validation rows.
ON = ["compile=True", "train_eos_padding=False", "optimizer.weight_decay=0.3"]
ON += ["run_val_every_n_steps=null", "questions=null", "verifier=null"]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def bound(quickstart: Quickstart, model: MDMTransformer, split: str) -> float:
    estimator = BoundEstimator(quickstart.tokenizer, WORLD, batch_size=512, draws=32)
    return estimator.nelbo(model, quickstart.rows(split)).nats


def plain(quickstart: Quickstart, lr: float, epochs: int) -> tuple[MDMTransformer, float]:
    """The plain loop: the model, as one of ours, and its seconds."""
    tokenizer = quickstart.tokenizer
    padding = Padding(tokenizer.pad_id, tokenizer.eos_id)
    batches = GlobalBatches(quickstart.rows("train"), Split(64), padding, seed=0)
    ours = quickstart.model(quickstart.pretrained)
    theirs = FAMILIES["llama"].to_hf
    model = plain_model(Size(vocabulary=320, width=64, layers=3, heads=4, length=64, mlp=256))
    model.load_state_dict({theirs(k): v for k, v in ours.state_dict().items()}, strict=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    steps = epochs * batches.steps_per_epoch
    schedule = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=50, num_training_steps=steps
    )
    w = uniform_density()
    start = cpu_seconds()
    for step in range(steps):
        batch = batches.micro_batches(step)[0]
        t = Uniform()(64, keyed_generator(0, "t", step), w).t
        views = Bernoulli()(t, batch.u, batch.eligible, w)
        mask = views.mask[0]
        weight = mask * (views.inverse_p[0] / batch.eligible.sum(1) / 64)[:, None]
        real = torch.ones_like(batch.tokens, dtype=torch.bool)[:, None]
        loss = plain_loss(model, batch.tokens, mask, weight.float(), real, tokenizer.mask_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    seconds = cpu_seconds() - start
    found = model.state_dict()
    ours.load_state_dict({name: found[theirs(name)] for name in ours.state_dict()})
    return ours, seconds


def everything_on(given: Any, epochs: int) -> tuple[Path, float]:
    """A run of the recipe: its last checkpoint, and the seconds of its steps."""
    out = given.output / f"reach_{epochs}"
    script = f"""
import os, sys
import mdm_full_finetune as recipe
train = recipe.MDMFinetune.train
def timed(self):
    start = os.times()
    train(self)
    print("SECONDS", sum(os.times()[:4]) - sum(start[:4]))
recipe.MDMFinetune.train = timed
sys.argv = ["x", "--config", "quickstart", "output_dir={out}", "epochs={epochs}",
            "save_every_n_epochs={epochs}", "optimizer.lr={given.lr}", *{ON!r}]
recipe.main()
"""
    # Compiled in this one's children, and not in a pool of workers that outlives the loop.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    seconds = float(done.stdout.split("SECONDS")[1])
    return last_checkpoint(out), seconds


def main() -> None:
    """The plain loop, then the recipe with more and more epochs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory")
    parser.add_argument("--epochs", type=int, nargs="*", default=[12, 14, 16, 20, 30])
    parser.add_argument("--lr", type=float, default=16e-3, help="of the recipe")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    quickstart = Quickstart()

    rates = {}
    for lr in (2e-3, 4e-3, 8e-3):  # a quarter of the run, by the validation rows
        model, _ = plain(quickstart, lr, EPOCHS // 4)
        rates[lr] = bound(quickstart, model, "val")
        print(f"plain, lr {lr:g}, {EPOCHS // 4} epochs: {rates[lr]:.4f} on validation", flush=True)
    best = min(rates, key=lambda lr: rates[lr])
    model, seconds = plain(quickstart, best, EPOCHS)
    goal = bound(quickstart, model, "test")
    print(f"plain, lr {best:g}: {goal:.4f} nats per token after {seconds:.0f} s", flush=True)
    results: dict[str, Any] = {"plain": {"lr": best, "nats": goal, "seconds": seconds}, "ours": []}
    for epochs in given.epochs:
        checkpoint, ours = everything_on(given, epochs)
        nats = bound(quickstart, quickstart.model(checkpoint), "test")
        results["ours"].append({"epochs": epochs, "nats": nats, "seconds": ours})
        print(
            f"recipe, {epochs} epochs: {nats:.4f} after {ours:.0f} s, {ours / seconds:.2f} of the "
            "plain loop's time",
            flush=True,
        )
        if nats <= goal:
            results["ratio"] = ours / seconds
            break
    (given.output / "reach.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
