"""Tokens per second of faster ways to generate, side by side with LLaDA's plain loop.

    python benchmarks/generation.py --output generation.json

    python benchmarks/generation.py --output generation.json --device cuda \
        --shape 126464,32,32,4096,4096,12288 --tokens 256

The quickstart's fine-tuned model (after `tune run mdm_full_finetune --config quickstart`) on its
held-out rows, with exact match and its 95 % interval; and a wider model at random weights, of whose
speed alone it says something: 8 layers of 512, 128 new tokens, four tokens a step in place of a
threshold, which random logits do not reach one by one. Each round runs every way once, in turn;
figures are medians of the ratios over the rounds, with their range. ``--shape`` measures a model of
that shape alone, at random weights, in bf16.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from quickstart_model import WORLD, Quickstart, last_checkpoint
from torchtune.training import set_default_dtype

from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.evaluation import Questions, exact_match
from mdm_plugin.generation import Decoding, Threshold, TokenIds, generate
from mdm_plugin.models import MDMTransformer, llada
from mdm_plugin.quickstart.data import verify

ENDLESS = TokenIds(mask_id=1, pad_id=0)  # no EOS: every way writes all tokens


def ways(block: int, few: dict[str, Any], name: str) -> dict[str, Decoding]:
    """The plain loop first; then one thing more at a time. ``few``: several tokens a step."""
    few = {"block_length": block, **few}
    return {
        "LLaDA, one token a step": Decoding(),
        "blocks": Decoding(block_length=block),
        name: Decoding(**few),
        f"{name}, prefix cache": Decoding(**few, cache="prefix"),
        f"{name}, dual cache": Decoding(**few, cache="dual"),
    }


def measure(
    model: MDMTransformer,
    prompts: list[torch.Tensor],
    n: int,
    decodings: dict[str, Decoding],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Seconds of each way, relative to the first one's of the same round, and forwards."""
    seconds: dict[str, list[float]] = {name: [] for name in decodings}
    forwards = {}
    for number in range(rounds + 1):
        for name, decoding in decodings.items():
            start, used = time.perf_counter(), 0
            for i, prompt in enumerate(prompts):  # one at a time, as text is written for a user
                used += generate(
                    model, [prompt], decoding, special=ENDLESS, max_new_tokens=n, seeds=[i]
                ).forwards
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            forwards[name] = used / len(prompts)
    first = seconds[next(iter(decodings))]
    found = {}
    for name, took in seconds.items():
        ratios = sorted(a / b for a, b in zip(first, took, strict=True))
        found[name] = {
            "times_as_fast": median(ratios),
            "range": [ratios[0], ratios[-1]],
            "forwards": forwards[name],
            "tokens_per_second": n * len(prompts) / median(took),
        }
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':28} times as fast       forwards  tokens/s  exact match")
    for name, x in found.items():
        low, high = x["range"]
        right = "{:.1%} ({:.1%} to {:.1%})".format(*x["exact_match"]) if "exact_match" in x else ""
        print(
            f"{name:28} {x['times_as_fast']:5.2f} [{low:.2f}, {high:.2f}]  "
            f"{x['forwards']:8.1f}  {x['tokens_per_second']:8.0f}  {right}"
        )


def wide(rounds: int) -> dict[str, dict[str, Any]]:
    """8 layers of 512 at random weights, 128 new tokens."""
    torch.manual_seed(0)
    model = llada(4096, 8, 8, 512, 512, 1536).eval()
    prompts = [torch.randint(2, 4096, (64,))]
    return measure(model, prompts, 128, ways(32, {"steps": 32}, "4 tokens a step"), rounds)


def of_shape(shape: str, n: int, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """``n`` new tokens after a prompt of as many, by a model of that shape, in bf16."""
    torch.manual_seed(0)
    sizes = [int(x) for x in shape.split(",")]
    with torch.device(device), set_default_dtype(torch.bfloat16):
        model = llada(*sizes).eval()
    prompts = [torch.randint(2, sizes[0], (n,), device=device)]
    block = {"steps": n // 4}
    return measure(model, prompts, n, ways(min(32, n // 2), block, "4 tokens a step"), rounds)


def main() -> None:
    """Measure both models, or one of the shape that is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--shape", help="vocabulary, layers, heads, width, longest row, MLP's width"
    )
    parser.add_argument("--tokens", type=int, default=256, help="to be written, with --shape")
    parser.add_argument("--device", default="cpu", help="with --shape")
    given = parser.parse_args()
    if given.shape:
        found = of_shape(given.shape, given.tokens, given.device, given.rounds)
        show(f"{given.shape} at random weights, {given.tokens} new tokens", found)
        given.output.write_text(json.dumps({"shape": found}, indent=1))
        return

    quickstart = Quickstart()
    model = quickstart.model(last_checkpoint(quickstart.run))
    questions = read_prompts(quickstart.tokenizer, prompts=str(quickstart.home / "test.jsonl"))
    prompts = [torch.tensor(x.ids) for x in questions[:10]]
    small = ways(12, {"sampler": Threshold(0.9)}, "threshold")
    results = {"quickstart": measure(model, prompts, 24, small, given.rounds)}
    for name, decoding in small.items():
        match = exact_match(
            model,
            quickstart.tokenizer,
            Questions(questions, verify),
            WORLD,
            max_new_tokens=24,
            batch_size=100,
            decoding=decoding,
            progress=name,
        )
        results["quickstart"][name]["exact_match"] = [match.accuracy, *match.interval()]
    show("The quickstart's model, 24 new tokens", results["quickstart"])

    results["wide"] = wide(given.rounds)
    show("8 layers of 512 at random weights, 128 new tokens", results["wide"])
    given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
