"""What a run learns in fp32, in bf16 with fp32 masters, and in bf16 alone.

    python benchmarks/precision.py --output bench     # about 40 minutes on 2 CPU cores

The quickstart's fine-tuning in four precisions by three seeds each, two runs at a time, from the
same pretrained weights: the bound of the validation rows at the end, and the share of the weights
that a step changes (those that are kept, after the optimizer has rounded them). The share is
measured again at the learning rate of the 8B configs, where steps are small. What has been run is
kept in OUTPUT/precision, and not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
PLAIN = ("dtype=bf16", "master_dtype=bf16")
PRECISIONS = {
    "fp32": ("dtype=fp32",),
    "bf16, fp32 masters": ("dtype=bf16",),
    "bf16, rounded at random": (*PLAIN, "optimizer=torchao.optim.AdamW8bit"),
    "bf16, rounded to the nearest": (*PLAIN, "stochastic_rounding=False"),
}
SMALL = "optimizer.lr=5e-5"  # the 8B configs'
EVERY = 60  # steps between two that are looked at
# What the figures are of: the likelihood bound, and an optimizer that torchao has in bf16 too.
ADAMW = ("objective=null", "optimizer=torch.optim.AdamW", "optimizer.lr=4e-3")
CHECKS = ("run_val_every_n_steps=2000", "questions=null", "verifier=null", "sample_rows=0")


def child(file: Path, arguments: list[str]) -> None:
    """One run, in a process of its own; ``file`` gets its figures."""
    import mdm_full_finetune as recipe
    import torch

    found: dict[str, Any] = {"changed": []}
    train_step, validate = recipe.MDMFinetune.train_step, recipe.MDMFinetune.validate

    def watched(self: Any, step: int) -> None:
        look = step % EVERY == EVERY - 1
        before = [p.detach().clone() for p in self.model.parameters()] if look else []
        train_step(self, step)
        if look:
            pairs = zip(before, self.model.parameters(), strict=True)
            changed = sum(int(torch.as_tensor((a != b).sum())) for a, b in pairs)
            found["changed"].append(changed / sum(p.numel() for p in before))

    def kept(self: Any, step: int) -> None:
        validate(self, step)
        found["nelbo"] = self.validated[step]

    recipe.MDMFinetune.train_step, recipe.MDMFinetune.validate = watched, kept
    sys.argv = ["mdm_full_finetune", "--config", "quickstart", *arguments]
    recipe.main()
    file.write_text(json.dumps(found))


def run(out: Path, name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """The figures of a run, from ``out`` if it is there."""
    file = out / f"{name.replace(', ', '-').replace(' ', '_')}.json"
    if not file.exists():
        script = [sys.executable, __file__, "--child", file]
        where = [f"output_dir={file.with_suffix('')}", "save_every_n_epochs=1000", *ADAMW, *CHECKS]
        command = [str(x) for x in (*script, *where, *arguments)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        print(f"{name}: done", flush=True)
    return json.loads(file.read_text())


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a directory")
    out = parser.parse_args().output / "precision"
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(  # the data and the pretrained weights, before two runs want them
        [sys.executable, "-c", PREPARE], check=True
    )
    jobs: dict[tuple[str, str], Any] = {}
    with ThreadPoolExecutor(2) as pool:
        for seed in SEEDS:
            for name, given in PRECISIONS.items():
                every = (*given, f"seed={seed}")
                jobs[name, f"seed {seed}"] = pool.submit(run, out, f"{name}, seed {seed}", every)
        for name, given in PRECISIONS.items():
            few = (*given, SMALL, "max_steps_per_epoch=4")
            jobs[name, "small"] = pool.submit(run, out, f"{name}, small steps", few)
    found = {key: job.result() for key, job in jobs.items()}
    print("| | NELBO, nats per token, seeds 0, 1, 2 | mean | changed by a step | at lr 5e-5 |")
    print("|---|---|---|---|---|")
    for name in PRECISIONS:
        nelbo = [found[name, f"seed {seed}"]["nelbo"] for seed in SEEDS]
        changed = [x for seed in SEEDS for x in found[name, f"seed {seed}"]["changed"]]
        small = found[name, "small"]["changed"]
        print(
            f"| {name} | {', '.join(f'{x:.4f}' for x in nelbo)} | {statistics.mean(nelbo):.4f} "
            f"± {statistics.stdev(nelbo):.4f} | {statistics.mean(changed):.1%} | "
            f"{statistics.mean(small):.1%} |"
        )


PREPARE = """
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.quickstart import prepare
prepare(load_config("quickstart", [], Options).prepare.directory)
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
