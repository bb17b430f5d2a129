"""Preferences against more fine-tuning, from one model and for as many forwards.

    python benchmarks/preferences.py --output /tmp/preferences

The start is quickstart_dpo's: the apprentice, and preferences of its own answers. Each seed trains
once by quickstart_dpo and once by the quickstart's fine-tuning of the same objective, on the true
answers, with as many forwards. Learning rates are chosen by the validation questions with a seed
that is not used again. Right answers are of the 300 held-out rows. To results.json and
preferences.png; a run that is finished already is not run again. About 15 minutes on 2 cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import DPOOptions
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.quickstart import prepare_preferences
from mdm_plugin.quickstart.demo import measure

SEEDS, TUNED = (0, 1, 2), 9
RATES = {"preferences": ("1e-5", "3e-5", "1e-4"), "fine-tuning": ("1e-3", "3e-3", "1e-2")}
WORLD = World(0, 1, torch.device("cpu"), None)


def forwards(cfg: Any) -> int:
    """Of a run of quickstart_dpo: two passes of the policy and one of the reference."""
    return int(cfg.epochs * cfg.max_steps_per_epoch * 2 * cfg.batch_size * cfg.draws * 3)


def command(kind: str, rate: str, seed: int, cfg: Any, run: Path) -> list[str]:
    """The user's command of one run."""
    home = Path(cfg.tokenizer.path)
    common = [f"seed={seed}", f"optimizer.lr={rate}", f"output_dir={run}", "sample_rows=0"]
    if kind == "preferences":
        return ["mdm_dpo", "--config", "quickstart_dpo", "run_val_every_n_steps=72", *common]
    steps = forwards(cfg) // 64
    return [
        *("mdm_full_finetune", "--config", "quickstart", "objective=null"),
        *(f"checkpointer.checkpoint_dir={home / 'apprentice'}", f"epochs={-(-steps // 46)}"),
        *("run_val_every_n_steps=2000", "max_questions=200", *common),
    ]


def run(kind: str, rate: str, seed: int, cfg: Any, output: Path) -> dict[str, float]:
    """One run, and what came of it."""
    place = output / f"{kind}_{rate}_{seed}"
    result = place / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    tune = Path(sys.executable).with_name("tune")
    subprocess.run([str(tune), "run", *command(kind, rate, seed, cfg, place)], check=True)
    last = max(place.glob("step_*"), key=lambda x: int(x.name.removeprefix("step_")))
    found = accuracy(cfg, last)
    result.write_text(json.dumps(found))
    return found


def accuracy(cfg: Any, weights: Path) -> dict[str, float]:
    """Right answers to the held-out questions, and nats per token of their true answers."""
    model = build_model(lambda: instantiate(cfg, "model"), WORLD, torch.float32)
    bound, match = measure(model, weights, Path(cfg.tokenizer.path), str(weights.parent.name))
    return {"right": match.accuracy, "nats": bound.nats}


def chosen(kind: str, cfg: Any, output: Path) -> str:
    """The rate whose run of the seed for tuning has most right answers to validation questions."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for rate in RATES[kind]:
        run(kind, rate, TUNED, cfg, output)
        place = output / f"{kind}_{rate}_{TUNED}" / "tensorboard"
        events = EventAccumulator(str(next(place.rglob("events.*")).parent))
        events.Reload()
        found[rate] = events.Tensors("val/exact_match")[-1].tensor_proto.float_val[0]
    return max(found, key=lambda x: found[x])


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    cfg = load_config("quickstart_dpo", [], DPOOptions)
    prepare_preferences(cfg.tokenizer.path)
    output.mkdir(parents=True, exist_ok=True)
    start = accuracy(cfg, Path(cfg.tokenizer.path) / "apprentice")
    results: dict[str, Any] = {"start": start, "forwards": forwards(cfg)}
    for kind in RATES:
        rate = chosen(kind, cfg, output)
        runs = [run(kind, rate, seed, cfg, output) for seed in SEEDS]
        results[kind] = {"rate": rate, "runs": runs}
        right = [x["right"] for x in runs]
        print(f"{kind} at {rate}: {mean(right):.3f} ± {stdev(right):.3f} right {right}")
    (output / "results.json").write_text(json.dumps(results, indent=2))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(RATES):
        right = [100 * x["right"] for x in results[kind]["runs"]]
        axes.bar(place, mean(right), color="tab:blue", alpha=0.5)
        axes.plot([place] * len(right), right, "o", color="tab:blue")
    axes.axhline(100 * start["right"], color="grey", linestyle="--", label="the start")
    axes.set(xticks=range(2), xticklabels=list(RATES), ylabel="right answers, %", ylim=(0, 100))
    axes.set_title(f"{results['forwards']:,} forwards of each, three seeds", fontsize=10)
    axes.legend()
    figure.savefig(output / "preferences.png", dpi=120)


if __name__ == "__main__":
    main()
