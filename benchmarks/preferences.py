"""Preferences against more fine-tuning, from one model and for as many forwards.

    python benchmarks/preferences.py --output /tmp/preferences

The start is quickstart_dpo's: a model half of whose demonstrations were careless, and preferences
of its own answers. Each seed trains by quickstart_dpo, by more of the fine-tuning that the model
comes from, and by fine-tuning on the answers alone that the preferences prefer, for as many
forwards or a few more. Learning rates are chosen by the validation questions with a seed that is
not used again. Right answers are of the 300 held-out questions. To results.json and
preferences.png; a run that is finished already is not run again. About 20 minutes on 2 cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from quickstart_model import right_answers

from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import DPOOptions
from mdm_plugin.quickstart import prepare_preferences

SEEDS, TUNED = (0, 1, 2), 9
RATES = {
    "preferences": ("3e-5", "1e-4", "3e-4"),
    "more fine-tuning": ("1e-3", "3e-3", "8e-3"),
    "the preferred answers": ("1e-3", "3e-3", "8e-3"),
}
# quickstart_block: 64 rows of two views
STEP = 128


def forwards(cfg: Any) -> int:
    """Of a run of quickstart_dpo: two passes of the policy and one of the reference."""
    return int(cfg.epochs * cfg.max_steps_per_epoch * 2 * cfg.batch_size * cfg.draws * 3)


def command(kind: str, rate: str, seed: int, cfg: Any, run: Path) -> list[str]:
    """The user's command of one run."""
    home = Path(cfg.tokenizer.path)
    questions = home / ("val.jsonl" if seed == TUNED else "test.jsonl")
    common = [
        *(f"seed={seed}", f"optimizer.lr={rate}", f"output_dir={run}", "sample_rows=0"),
        *(f"questions={questions}", "max_questions=300"),
    ]
    if kind == "preferences":
        return ["mdm_dpo", "--config", "quickstart_dpo", "run_val_every_n_steps=72", *common]
    steps = forwards(cfg) // STEP
    file, column = home / "demonstrations.jsonl", []
    if kind == "the preferred answers":
        file, column = home / "two_ways_pairs.jsonl", ["dataset.conversation_column=chosen"]
    each = len(file.read_text().splitlines()) // 64
    epochs = -(-steps // each)  # as many, or a few more
    return [
        *("mdm_full_finetune", "--config", "quickstart_block", f"dataset.source={file}", *column),
        *(f"checkpointer.checkpoint_dir={home / 'two_ways'}", f"epochs={epochs}"),
        *(f"max_steps_per_epoch={each}", f"run_val_every_n_steps={epochs * each}"),
        *("save_every_n_epochs=1000", "keep_last_n=1", *common),
    ]


def run(kind: str, rate: str, seed: int, cfg: Any, output: Path) -> dict[str, float]:
    """The share of right answers at the start of a run and at its end."""
    place = output / f"{kind.replace(' ', '_')}_{rate}_{seed}"
    result = place / "result.json"
    if not result.is_file():
        tune = Path(sys.executable).with_name("tune")
        subprocess.run([str(tune), "run", *command(kind, rate, seed, cfg, place)], check=True)
        right = right_answers(place)
        result.write_text(json.dumps({"start": right[0], "end": right[-1]}))
    return json.loads(result.read_text())


def chosen(kind: str, cfg: Any, output: Path) -> str:
    """The rate whose run of the seed for tuning has most right answers to validation questions."""
    return max(RATES[kind], key=lambda rate: run(kind, rate, TUNED, cfg, output)["end"])


def main() -> None:
    """Run what is missing, and report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    cfg = load_config("quickstart_dpo", [], DPOOptions)
    prepare_preferences(cfg.tokenizer.path)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"forwards": forwards(cfg)}
    for kind in RATES:
        rate = chosen(kind, cfg, output)
        runs = [run(kind, rate, seed, cfg, output) for seed in SEEDS]
        right = [x["end"] for x in runs]
        results[kind] = {"rate": rate, "right": right, "start": runs[0]["start"]}
        print(f"{kind} at {rate}: {mean(right):.3f} ± {stdev(right):.3f} right {right}")
    (output / "results.json").write_text(json.dumps(results, indent=2))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(RATES):
        right = [100 * x for x in results[kind]["right"]]
        axes.bar(place, mean(right), color="tab:blue", alpha=0.5)
        axes.plot([place] * len(right), right, "o", color="tab:blue")
    start = 100 * results["preferences"]["start"]
    axes.axhline(start, color="grey", linestyle="--", label="the start")
    axes.set(xticks=range(len(RATES)), xticklabels=list(RATES), ylim=(0, 100))
    axes.set(ylabel="right answers, %")
    axes.set_title(f"{results['forwards']:,} forwards or a few more, three seeds", fontsize=10)
    axes.legend()
    figure.savefig(output / "preferences.png", dpi=120)


if __name__ == "__main__":
    main()
