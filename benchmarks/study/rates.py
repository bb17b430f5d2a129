"""What a step teaches at each masking rate, on the study's model: signal, noise, and for whom.

    python -m benchmarks.study.rates --task chain --output bench

Standard fine-tunes the study's model; ``benchmarks/gain.py`` measures at some of its steps, from
batches of 32 rows, and says from which rate on a forward is worth its noise.

Writes OUTPUT/rates_TASK.json and .png, and prints a table.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gain import ENOUGH, WORLD, measured, table
from benchmarks.study.methods import STEPS, overrides
from benchmarks.study.runs import CONFIGS, _recipe
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.training.batches import global_batches


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
    found = {}
    for step in steps:
        Weights(home / "pretrained" if step == 0 else work / f"step_{step}").load(model)
        lines, both = measured(model, batches, tokenizer.mask_id, count)
        found[str(step)] = {"rates": lines, "elbo_decoder": both}
        print(table(f"step {step}", lines), flush=True)
    return found


def draw(found: dict[str, Any], file: Path) -> None:
    """Signal over noise, both cosines, and the gain, over t: a line for each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for step, x in found.items():
        t = [y["t"] for y in x["rates"]]
        ratio = [max(y["signal"], 0) / y["noise"] for y in x["rates"]]
        axes[0].plot(t, ratio, ".-", label=f"step {step}")
        axes[1].plot(t, [y["cosine_elbo"] for y in x["rates"]], ".-")
        axes[2].plot(t, [y["cosine_decoder"] for y in x["rates"]], ".-")
        highest = max(y["gain"] for y in x["rates"])
        axes[3].plot(t, [y["gain"] / highest for y in x["rates"]], ".-")
    axes[0].set(title="signal / noise of one row's gradient", xlabel="t", yscale="log")
    axes[1].set(title="cosine with the ELBO's gradient", xlabel="t", ylim=(-0.2, 1))
    axes[2].set(title="cosine with the greedy decoder's", xlabel="t", ylim=(-0.2, 1))
    axes[3].axhline(ENOUGH, color="black", linewidth=0.6)
    axes[3].set(title="gain toward the decoder, highest = 1", xlabel="t", ylim=(-0.2, 1.05))
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
