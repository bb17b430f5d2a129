"""lm-eval's requests per second: in batches by length, side by side with one at a time.

    python benchmarks/harness.py --output harness.json

The quickstart's fine-tuned model (after `tune run mdm_full_finetune --config quickstart`) on its
held-out questions. Generation: each request by itself, and in batches; with the default sampler
and with a threshold. The "greedy" flags of four choices a question, of which one is the reference:
each choice decoded whole by itself, and followed until it differs. Log-likelihoods with their
flags: as the two add up. Each round runs every way once, in turn; figures are medians of the ratios
over the rounds, with their range. The answers are compared, too: they must be the same.

Then the noise of a difference between the reference and another choice, with draws of masks that
the choices of a question share, and with draws of their own: its standard deviation over seeds, the
median over the pairs. The other choices are other questions' answers, and the reference with
another result. Needs lm-eval.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.api.instance import Instance
from quickstart_model import WORLD, Quickstart, last_checkpoint

from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.evaluation.harness import Harness, Pair
from mdm_plugin.generation import Decoding, Threshold, TokenIds, generate

TOKENS = 24


def requests(kind: str, arguments: list[tuple[Any, ...]], per_document: int) -> list[Instance]:
    return [
        Instance(kind, {}, given, i, metadata=("quickstart", i // per_document, 1))
        for i, given in enumerate(arguments)
    ]


def texts_alone(lm: Harness, asked: list[Instance]) -> list[str]:
    """Each request's text, by itself."""
    found = []
    for x in asked:
        written = generate(
            lm.model,
            [lm.tokenizer.encode(x.args[0])],
            lm.decoding,
            special=lm.tokenizer,
            max_new_tokens=TOKENS,
            seeds=[lm.seed],
        )
        found.append(lm.tokenizer.decode(written.tokens[0].tolist()))
    return found


def greedy_alone(lm: Harness, pairs: list[Pair]) -> list[bool]:
    """Whether each continuation is what the model writes to its end, by itself."""
    found = []
    for x in pairs:
        written = generate(
            lm.model,
            [x.context],
            special=TokenIds(lm.tokenizer.mask_id, lm.tokenizer.pad_id),
            max_new_tokens=len(x.continuation),
        )
        found.append(written.tokens[0].tolist() == x.continuation)
    return found


def measure(
    ways: dict[str, Callable[[], list[Any]]], count: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Requests per second of each way, and relative to the first one's of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            answers[name] = way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(ways))
    found = {}
    for name, took in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds[first], took, strict=True))
        found[name] = {
            "requests_per_second": count / median(took),
            "times_as_many": median(ratios),
            "range": [ratios[0], ratios[-1]],
            "same_answers": answers[name] == answers[first],
        }
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'':24} requests/s  times as many        same answers")
    for name, x in found.items():
        low, high = x["range"]
        ratio = f"{x['times_as_many']:5.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:24} {x['requests_per_second']:10.1f}  {ratio:20} {x['same_answers']}")


def noise(lm: Harness, pairs: list[tuple[str, str]], seeds: int) -> dict[str, float]:
    """Of the first choice's log-likelihood less each other's, in nats; four choices a question."""
    found = {}
    for name, documents in (("shared draws", 4), ("draws of their own", 1)):
        asked = [lm.pair(x) for x in requests("loglikelihood", pairs, documents)]
        values = []
        for lm.seed in range(seeds):
            values.append(torch.tensor(lm.bounds(asked), dtype=torch.float64).view(-1, 4))
        each = torch.stack(values)
        found[name] = float((each[..., :1] - each[..., 1:]).std(0).median())
    return found


def main() -> None:
    """Measure generation, flags, and log-likelihoods with their flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--questions", type=int, default=48)
    given = parser.parse_args()

    quickstart = Quickstart()
    model, tokenizer = quickstart.model(last_checkpoint(quickstart.run)), quickstart.tokenizer
    rows = [x.row for x in read_prompts(tokenizer, prompts=str(quickstart.home / "test.jsonl"))]
    turns = [row["messages"] for row in rows[: given.questions]]
    contexts = [tokenizer.render(x[:1], generation_prompt=True) for x in turns]
    references = [x[1]["content"] for x in turns]
    results: dict[str, Any] = {}

    def harness(decoding: Decoding) -> Harness:
        return Harness(
            model,
            tokenizer,
            decoding,
            WORLD,
            batch_size=given.batch_size,
            draws=8,
            seed=0,
            max_new_tokens=TOKENS,
        )

    asked = requests("generate_until", [(x, {}) for x in contexts], 1)
    for name, decoding in (
        ("one token a step", Decoding()),
        ("threshold 0.9", Decoding(block_length=12, sampler=Threshold(0.9))),
    ):
        lm = harness(decoding)
        ways = {"one at a time": lambda lm=lm: texts_alone(lm, asked)}
        ways["in batches"] = lambda lm=lm: lm.generate_until(asked)
        results[f"generation, {name}"] = measure(ways, len(asked), given.rounds)

    others = [references[(i + k) % len(references)] for i in range(len(turns)) for k in range(4)]
    pairs = [(contexts[i // 4], text) for i, text in enumerate(others)]
    chosen, lm = requests("loglikelihood", pairs, 4), harness(Decoding())
    split = [lm.pair(x) for x in chosen]
    flags: dict[str, Callable[[], list[Any]]] = {
        "one at a time, whole": lambda: greedy_alone(lm, split),
        "together, until it differs": lambda: lm.greedy(split),
    }
    results["greedy flags"] = measure(flags, len(chosen), given.rounds)
    both: dict[str, Callable[[], list[Any]]] = {
        "one at a time, whole": lambda: list(
            zip(lm.bounds(split), greedy_alone(lm, split), strict=True)
        ),
        "together, until it differs": lambda: lm.loglikelihood(chosen),
    }
    results["log-likelihoods and flags"] = measure(both, len(chosen), given.rounds)
    for title, found in results.items():
        show(title, found)
    steps = [x.rpartition(" ")[0] for x in references]  # "…\nAnswer:", which all but ends them
    altered = [
        (context, f"{steps[i // 4]} {text.rpartition(' ')[2]}")
        for i, (context, text) in enumerate(pairs)
    ]
    print("\nNoise of a difference between two choices, nats")
    for kind, choices in (("other answers", pairs), ("another result", altered)):
        results[f"noise, {kind}"] = deviations = noise(lm, choices, seeds=16)
        for name, value in deviations.items():
            print(f"{kind}, {name:24} {value:10.3f}")
    given.output.write_text(json.dumps({"threads": torch.get_num_threads(), **results}, indent=1))


if __name__ == "__main__":
    main()
