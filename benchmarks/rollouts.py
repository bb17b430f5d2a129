"""Answers of a step of reinforcement, written together or not, and their share of a step.

    python benchmarks/rollouts.py --output rollouts.json

A step of quickstart_grpo: the answers to its prompts, each by itself; those to one prompt at a
time; and all of a micro-batch together, as the recipe writes them. They are the same answers, which
is checked. Each round writes them every way once, in turn, and learns from them once: figures are
medians over the rounds, with the range of the ratios. Seconds are of the processor, on one thread:
so what else the machine does counts for little.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from mdm_grpo import MDMReinforcement

from mdm_plugin.alignment.rollouts import Rollout, Writing, roll_out
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import GRPOOptions
from mdm_plugin.data.prompts import Prompt
from mdm_plugin.distributed.world import distributed

Batches = list[tuple[list[Prompt], torch.Tensor]]


def ways(recipe: MDMReinforcement, step: int) -> dict[str, tuple[Batches, int]]:
    """Prompts in batches, with their places, and how many answers each batch has to a prompt."""
    place, group = recipe.place(step), recipe.cfg.group_size
    numbers = recipe.batches.row_indices(place)
    together = [
        ([recipe.prompts[i] for i in numbers[at].tolist()], at)
        for at in recipe.batches.places(place)
    ]
    single = [([x], at[i : i + 1]) for found, at in together for i, x in enumerate(found)]
    alone = [(x, at * group + i) for x, at in single for i in range(group)]
    return {
        "each answer by itself": (alone, 1),
        "one prompt at a time": (single, group),
        "a micro-batch of prompts": (together, group),
    }


def write(recipe: MDMReinforcement, step: int, batches: Batches, group: int) -> Rollout:
    cfg = recipe.cfg
    return roll_out(
        recipe.model,
        recipe.tokenizer,
        batches,
        Writing(group, recipe.decoding, cfg.max_new_tokens),
        recipe.batches.padding,
        recipe.world,
        (cfg.seed, "rollout", step),
    )


def measure(recipe: MDMReinforcement, rounds: int) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {}
    learning, tokens = [], []
    for step in range(rounds + 1):
        texts = []
        for name, (batches, group) in ways(recipe, step).items():
            start = time.process_time()
            rollout = write(recipe, step, batches, group)
            took = time.process_time() - start
            texts.append([x for part in rollout.texts for x in part])
            if step:  # the first round warms up
                seconds.setdefault(name, []).append(took)
        assert texts[0] == texts[1] == texts[2]
        start = time.process_time()
        recipe.learn(step, rollout)
        if step:
            learning.append(time.process_time() - start)
            tokens.append(rollout.tokens)
    learnt, first, found = median(learning), next(iter(seconds.values())), {}
    for name, took in seconds.items():
        ratios = sorted(a / b for a, b in zip(first, took, strict=True))
        share = [a / (a + b) for a, b in zip(took, learning, strict=True)]
        found[name] = {
            "seconds": median(took),
            "times_as_fast": median(ratios),
            "range": [ratios[0], ratios[-1]],
            "share_of_step": median(share),
            "tokens_per_second": median(a / b for a, b in zip(tokens, took, strict=True)),
        }
    return {"seconds to learn from them": {"seconds": learnt}, **found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("overrides", nargs="*", help="of quickstart_grpo, e.g. batch_size=8")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        cfg = load_config(
            "quickstart_grpo", [f"output_dir={directory}", *given.overrides], GRPOOptions
        )
        instantiate(cfg, "prepare")
        with distributed(cfg.device, 1, 1, cfg.timeout_minutes) as world:
            recipe = MDMReinforcement(cfg, world, None)
            recipe.setup()
            recipe.model.train()
            found = measure(recipe, given.rounds)
            recipe.cleanup()
    print(f"\n{'':26} seconds  times as fast       tokens/s  share of the step")
    for name, x in found.items():
        if "range" not in x:
            print(f"{name:26} {x['seconds']:7.2f}")
            continue
        low, high = x["range"]
        print(
            f"{name:26} {x['seconds']:7.2f}  {x['times_as_fast']:5.1f} ({low:.1f} to {high:.1f}) "
            f"{x['tokens_per_second']:12,.0f}  {x['share_of_step']:.0%}"
        )
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
