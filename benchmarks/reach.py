"""Time to the plain loop's final likelihood bound, on the quickstart: `make bench`.

    python benchmarks/reach.py --output bench

The plain loop fine-tunes the quickstart's pretrained model as the field's scripts do: transformers'
Llama without its causal mask, Standard masks, logits of all positions, nothing compiled. Its
learning rate is the best of three by the validation rows; its bound is measured on the test rows
after its last step. Then the recipe runs with everything on and ever more steps, each a run of its
own with its own schedule, until one ends at that bound or below. Times are of the training loops
alone, taken one after another in this process's children.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import plain_loss, plain_model

from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.data import GlobalBatches, chat_dataset
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation import nelbo
from mdm_plugin.masking import Bernoulli
from mdm_plugin.models import ChatTokenizer
from mdm_plugin.models.naming import FAMILIES
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training import get_linear_schedule_with_warmup

CPU = torch.device("cpu")
EPOCHS = 40
# The recipe with everything on: what docs/variance.md and docs/performance.md found best.
ON = ["compile=True", "run_val_every_n_steps=null", "questions=null", "verifier=null"]


def bound(model: nn.Module, tokenizer: ChatTokenizer, file: Path) -> float:
    rows = chat_dataset(tokenizer, source=str(file))
    ids = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    return nelbo(model, rows, batch_size=512, device=CPU, draws=32, **ids).nats


def our_model(cfg: Any, weights: Path) -> nn.Module:
    model = build_model(
        lambda: instantiate(cfg, "model"), World(0, 1, CPU, None), dtype=torch.float32
    )
    Weights(weights).load(model)
    return model


def plain(cfg: Any, home: Path, lr: float, epochs: int) -> tuple[nn.Module, float]:
    """The plain loop: the model, as one of ours, and its seconds."""
    tokenizer = ChatTokenizer(str(home), max_seq_len=64)
    rows = chat_dataset(tokenizer, source=str(home / "train.jsonl"))
    batches = GlobalBatches(
        rows, batch_size=64, seed=0, pad_id=tokenizer.pad_id, eos_padding_id=tokenizer.eos_id
    )
    ours = our_model(cfg, home / "pretrained")
    theirs = FAMILIES["llama"].to_hf
    model = plain_model(320, 64, 3, 4, torch.float32, 64, intermediate=256)
    model.load_state_dict({theirs(k): v for k, v in ours.state_dict().items()}, strict=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    steps = epochs * batches.steps_per_epoch
    schedule = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=50, num_training_steps=steps
    )
    start = time.perf_counter()
    for step in range(steps):
        batch = batches.micro_batches(step)[0]
        t, _ = Uniform()(64, keyed_generator(0, "t", step))
        mask, inverse_p, _ = Bernoulli()(t, batch.u, batch.eligible)
        weight = mask[0] * (inverse_p[0] / batch.eligible.sum(1) / 64)[:, None]
        real = torch.ones_like(batch.tokens, dtype=torch.bool)[:, None]
        loss = plain_loss(model, batch.tokens, mask[0], weight.float(), real, tokenizer.mask_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    seconds = time.perf_counter() - start
    found = model.state_dict()
    ours.load_state_dict({name: found[theirs(name)] for name in ours.state_dict()})
    return ours.eval(), seconds


def everything_on(given: Any, cfg: Any, epochs: int, lr: float) -> tuple[Path, float]:
    """A run of the recipe: its last checkpoint, and the seconds of its steps."""
    out = given.output / f"reach_{epochs}"
    script = f"""
import sys, time
import mdm_full_finetune as recipe
train = recipe.MDMFinetune.train
def timed(self):
    start = time.perf_counter()
    train(self)
    print("SECONDS", time.perf_counter() - start)
recipe.MDMFinetune.train = timed
sys.argv = ["x", "--config", "quickstart", "output_dir={out}", "epochs={epochs}",
            "save_every_n_epochs={epochs}", "optimizer.lr={lr}", *{ON!r}]
recipe.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    seconds = float(done.stdout.split("SECONDS")[1])
    return max(out.glob("step_*"), key=lambda d: int(d.name.removeprefix("step_"))), seconds


def main() -> None:
    """The plain loop, then the recipe with more and more epochs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory")
    parser.add_argument("--epochs", type=int, nargs="*", default=[10, 20, 30, 40])
    parser.add_argument("--lr", type=float, default=6e-3, help="of the recipe")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    cfg = load_config("quickstart", [], Options)
    home = Path(cfg.tokenizer.path)
    tokenizer = ChatTokenizer(str(home))

    rates = {}
    for lr in (2e-3, 4e-3, 8e-3):  # a quarter of the run, by the validation rows
        model, _ = plain(cfg, home, lr, EPOCHS // 4)
        rates[lr] = bound(model, tokenizer, home / "val.jsonl")
        print(f"plain, lr {lr:g}, {EPOCHS // 4} epochs: {rates[lr]:.4f} on validation", flush=True)
    best = min(rates, key=lambda lr: rates[lr])
    model, seconds = plain(cfg, home, best, EPOCHS)
    goal = bound(model, tokenizer, home / "test.jsonl")
    print(f"plain, lr {best:g}: {goal:.4f} nats per token after {seconds:.0f} s", flush=True)
    results: dict[str, Any] = {"plain": {"lr": best, "nats": goal, "seconds": seconds}, "ours": []}
    for epochs in given.epochs:
        checkpoint, ours = everything_on(given, cfg, epochs, given.lr)
        nats = bound(our_model(cfg, checkpoint).eval(), tokenizer, home / "test.jsonl")
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
