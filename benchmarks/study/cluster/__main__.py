"""All runs of the study with LLaDA-8B-Instruct, and what they cost. NOT RUN HERE.

    python -m benchmarks.study.cluster --data /shared/data --output /shared/study          # print
    python -m benchmarks.study.cluster --data … --output … --launch slurm                  # submit
    python -m benchmarks.study.cluster --data … --output … --launch torchrun --task gsm8k  # here

Each run is the recipe on one node of 8 GPUs, then mdm_eval. One whose results.json is there is left
out, and one that was stopped goes on from its last checkpoint. Times are by docs/scaling.md's
model, which no measurement has confirmed. Memory is by dry_run, for rows of 1,024 tokens on each of
8 GPUs: 14.0 GiB in one view, 14.6 in two.
"""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

from benchmarks.scaling import LLADA_8B, Layout, fitted, step
from benchmarks.study.methods import METHODS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# Training rows, and tokens of a row with its padding: our estimates for the cost alone.
TASKS = {"gsm8k": (7_473, 512), "hitab": (7_417, 1024), "openscience": (19_000, 1024)}
SEEDS = (42, 731, 20231)


def overrides(name: str, task: str, seed: int, data: str, output: Path) -> list[str]:
    """Of finetune_8b.yaml: the small study's method at the paper's batch of 32 rows."""
    given = [x for x in METHODS[name].overrides if not x.startswith("ema.decay")]
    rows = METHODS[name].rows  # 64 where Standard gets twice the rows
    return [
        f"data={data}",
        f"task={task}",
        f"seed={seed}",
        f"output_dir={output}",
        f"global_batch_size={rows}",
        f"epochs={5 * rows // 32}",
        *given,
    ]


def script(name: str, task: str, seed: int, data: str, output: Path) -> str:
    """Shell commands of a run: training, then evaluation."""
    where = output / task / name / str(seed)
    train = ["--config", str(HERE / "finetune_8b.yaml"), *overrides(name, task, seed, data, where)]
    evaluate = ["--config", str(HERE / "evaluate_8b.yaml"), f"data={data}", f"task={task}"]
    tune = "tune run --nproc_per_node ${GPUS:-8}"
    last = f'last="$(ls -d {where}/step_* 2>/dev/null | sort -V | tail -n 1 || true)"'
    return "\n".join(
        [
            "set -euo pipefail",
            f"export PYTHONPATH={ROOT} MDM_ALLOW_COMPONENTS=benchmarks.study",
            f"{tune} mdm_full_finetune {shlex.join(train)}",
            last,
            'if [ -d "$last/ema" ]; then last="$last/ema"; fi',
            f'{tune} mdm_eval {shlex.join(evaluate)} checkpoint="$last" output_dir={where}/eval',
        ]
    )


def cost(name: str, task: str) -> float:
    """GPU hours of a run's training, by docs/scaling.md's model."""
    rows, length = TASKS[task]
    method = METHODS[name]
    each = method.rows * method.views // 8
    layout = Layout(8, rows=1, micro_batches=each, recompute=1.0)
    steps = 5 * rows // 32
    return 8 * steps * step(LLADA_8B, layout, length, machine=fitted()).seconds / 3600


def main() -> None:
    """Print, submit or run what has no result yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--launch", choices=("slurm", "torchrun"))
    given = parser.parse_args()
    total = 0.0
    for task in given.task:
        for name in METHODS:
            if name == "autoregressive":  # a model of another family: mdm_lora/full with NextToken
                continue
            for seed in SEEDS:
                where = given.output / task / name / str(seed)
                if (where / "eval" / "results.json").is_file():
                    continue
                hours = cost(name, task)
                total += hours
                text = script(name, task, seed, given.data, given.output)
                if given.launch == "slurm":
                    where.mkdir(parents=True, exist_ok=True)
                    (where / "run.sh").write_text(text + "\n")
                    job = ["sbatch", "--nodes", "1", "--output", str(where / "%j.log")]
                    launch = str(ROOT / "docs" / "launch" / "mdm.sbatch")
                    subprocess.run([*job, launch, str(where / "run.sh")], check=True)
                elif given.launch == "torchrun":
                    subprocess.run(["bash", "-c", text], check=True, env=dict(os.environ))
                else:
                    print(f"# {task} {name} seed {seed}: {hours:.0f} GPU hours\n{text}\n")
    print(f"# {total:,.0f} GPU hours of H100 in all, by a model that no measurement has confirmed")


if __name__ == "__main__":
    main()
