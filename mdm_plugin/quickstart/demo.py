"""The quickstart from nothing to a better model, measured.

    python -m mdm_plugin.quickstart.demo

Makes the data, pretrains, measures, fine-tunes with the user's own command, measures again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.data import chat_dataset
from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.evaluation import NELBO, BoundEstimator, ExactMatch, Questions, exact_match
from mdm_plugin.generation import Decoding
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.quickstart.data import prepare, verify

# The longest answer of the quickstart's data has 23 tokens, EOS included.
NEW_TOKENS = STEPS = 24
WORLD = World(0, 1, torch.device("cpu"), None)


def measure(
    model: MDMTransformer, weights: Path, home: Path, label: str
) -> tuple[NELBO, ExactMatch]:
    """NELBO and exact match on the held-out rows with the weights of a checkpoint."""
    Weights(weights).load(model)
    tokenizer = ChatTokenizer(str(home))
    test = home / "test.jsonl"
    bound = BoundEstimator(tokenizer, WORLD, batch_size=64).nelbo(
        model, chat_dataset(tokenizer, source=str(test))
    )
    match = exact_match(
        model,
        tokenizer,
        Questions(read_prompts(tokenizer, prompts=str(test)), verify),
        WORLD,
        max_new_tokens=NEW_TOKENS,
        decoding=Decoding(steps=STEPS),
        batch_size=100,
        progress=f"Evaluating {label}",
    )
    return bound, match


def main() -> None:
    """Run the demo; further ``key=value`` arguments go to the fine-tuning command."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    _, overrides = parser.parse_known_args()
    start = time.perf_counter()
    cfg = load_config("quickstart", overrides, Options)
    home, run = Path(cfg.tokenizer.path), Path(cfg.output_dir)
    prepare(str(home))
    model = build_model(lambda: instantiate(cfg, "model"), WORLD, torch.float32)
    before = measure(model, home / "pretrained", home, "the pretrained model")

    command = ["run", "mdm_full_finetune", "--config", "quickstart", *overrides]
    print(f"\n$ tune {' '.join(command)}\n", flush=True)
    tune = Path(sys.executable).with_name("tune")
    done = subprocess.run([str(tune), *command])
    if done.returncode:
        sys.exit(done.returncode)
    checkpoint = max(run.glob("step_*"), key=lambda d: int(d.name.removeprefix("step_")))
    after = measure(model, checkpoint, home, "the fine-tuned model")

    rows = [json.loads(line) for line in (home / "test.jsonl").open()]
    print("\nFive completions of held-out problems by the fine-tuned model:\n")
    for row, text in list(zip(rows, after[1].completions, strict=True))[:5]:
        print(f"  {row['messages'][0]['content']}")
        print("    " + text.replace("\n", "\n    "))
        verdict = "right" if verify(text, row) else f"wrong, it is {row['entry']['answer']}"
        print(f"    ({verdict})\n")
    print(f"On {after[1].total} held-out rows        before                 after")
    print(
        f"  NELBO, nats per token   {before[0].nats:<22.4f} {after[0].nats:.4f}\n"
        f"  exact match (95 % int.) {_share(before[1]):<22} {_share(after[1])}\n"
    )
    print(f"Checkpoint:  {checkpoint}")
    print(f"TensorBoard: tensorboard --logdir {cfg.metric_logger.log_dir}")
    print(f"Time:        {time.perf_counter() - start:.0f} s")


def _share(match: ExactMatch) -> str:
    low, high = match.interval()
    return f"{match.accuracy:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
