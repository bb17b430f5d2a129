"""The quickstart trained with several methods and seeds, at the same number of forwards.

    python benchmarks/methods.py --output_dir /tmp/methods

Standard, P-POTS + MIRROR (the paper's pair of methods), and the two best of mdm_variance per
forward, each with the paper's three seeds. A step of each has 64 forwards: 64 rows, or 32 rows in
two views. All curves go to one TensorBoard folder, ``output_dir``/tensorboard; the validation NELBO
over training and the exact match on the 300 held-out rows go to methods.json and methods.png beside
it. A run that is finished already is not run again. About 2 minutes per run on 2 cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.quickstart.data import prepare
from mdm_plugin.quickstart.demo import measure

SEEDS = (42, 731, 20231)
STEPS = 1840
# The same steps and learning rates for each; a pair takes half the rows, and so half the epochs.
ONE_VIEW = ["batch_size=64", "epochs=40", "max_steps_per_epoch=46"]
TWO_VIEWS = ["batch_size=32", "epochs=20", "max_steps_per_epoch=92"]
UNIFORM = "timesteps._component_=mdm_plugin.timesteps.Uniform"
STRATIFIED = "timesteps._component_=mdm_plugin.timesteps.Stratified"
# 20 points in place of 30: the probe stays below 2 % of the training's forwards (one view).
PARETO = ["timesteps._component_=mdm_plugin.timesteps.ParetoOptimal", "timesteps.grid=20"]
METHODS = {
    "Standard": [UNIFORM, "masking._component_=mdm_plugin.masking.Bernoulli", *ONE_VIEW],
    "P-POTS + MIRROR": [*PARETO, "masking._component_=mdm_plugin.masking.Mirror", *TWO_VIEWS],
    "FixedCount": [STRATIFIED, "masking._component_=mdm_plugin.masking.FixedCount", *ONE_VIEW],
    "P-POTS FixedCount": [*PARETO, "masking._component_=mdm_plugin.masking.FixedCount", *ONE_VIEW],
}


def train(output: Path, method: str, seed: int) -> dict[str, Any]:
    """One run, and what came of it."""
    name = f"{method.replace(' + ', '_').replace(' ', '_')}_seed_{seed}"
    run, curves = output / name, output / "tensorboard" / name
    result = run / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    overrides = [
        *METHODS[method],
        f"seed={seed}",
        f"output_dir={run}",
        f"metric_logger.log_dir={curves}",
        "metric_logger.organize_logs=False",
        "run_val_every_n_steps=92",
        "sample_rows=0",
        *("objective=null", "optimizer=torch.optim.AdamW", "optimizer.lr=4e-3"),
    ]
    tune = Path(sys.executable).with_name("tune")
    command = [str(tune), "run", "mdm_full_finetune", "--config", "quickstart", *overrides]
    weights = run / f"step_{STEPS}"
    if not weights.is_dir():
        subprocess.run(command, check=True)

    cfg = load_config("quickstart", overrides, Options)
    world = World(0, 1, torch.device("cpu"), None)
    model = build_model(lambda: instantiate(cfg, "model"), world, torch.float32)
    home = Path(cfg.tokenizer.path)
    bound, match = measure(model, weights, home, name)
    found = {
        "method": method,
        "seed": seed,
        "test_nelbo": bound.nats,
        "exact_match": match.accuracy,
        "val_nelbo": scalars(curves, "val/nelbo_nats_per_token"),
    }
    result.write_text(json.dumps(found))
    return found


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    return [(x.step, float(make_ndarray(x.tensor_proto))) for x in events.Tensors(tag)]


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Validation NELBO over training, one line per run; exact match at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, method in enumerate(METHODS):
        runs = [x for x in results if x["method"] == method]
        for x in runs:
            steps, values = zip(*x["val_nelbo"][1:], strict=True)
            label = method if x is runs[0] else None
            left.plot(steps, values, color=f"C{i}", linewidth=1.2, alpha=0.8, label=label)
        right.plot([i] * len(runs), [100 * x["exact_match"] for x in runs], "o", color=f"C{i}")
    left.set(yscale="log", xlabel="step of 64 forwards", ylabel="validation NELBO, nats per token")
    left.legend()
    right.set(ylabel="exact match, % of 300 held-out rows")
    right.set_xticks(range(len(METHODS)), [name.replace(" ", "\n", 1) for name in METHODS])
    right.margins(x=0.2)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run what has not been run, and show all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    output = parser.parse_args().output_dir
    prepare(load_config("quickstart", [], Options).tokenizer.path)
    results = [train(output, method, seed) for seed in SEEDS for method in METHODS]
    (output / "methods.json").write_text(json.dumps(results))
    draw(results, output / "methods.png")
    print(f"\n{'':18} {'test NELBO':22} exact match, %")
    for method in METHODS:
        runs = [x for x in results if x["method"] == method]
        nelbo = [x["test_nelbo"] for x in runs]
        match = [100 * x["exact_match"] for x in runs]
        print(
            f"{method:18} {mean(nelbo):.4f} ± {stdev(nelbo):.4f}        {mean(match):.1f} ± "
            f"{stdev(match):.1f}, worst {min(match):.1f}"
        )
    print(f"\nTensorBoard: tensorboard --logdir {output / 'tensorboard'}")


if __name__ == "__main__":
    main()
