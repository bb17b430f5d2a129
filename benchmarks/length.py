"""Objectives and masks on responses of 32, 128 and 512 tokens: what of them depends on the length.

    OMP_NUM_THREADS=1 python benchmarks/length.py --output benchmarks/length.json

Two contents, each at the three lengths. ``sums``: 1, 5 and 20 problems in one question, chains of
four one-digit numbers, answered one after another with their running sums; no problem of the test
rows is in a training row. ``text``: the pages of Python's own help (``pydoc_data.topics``), without
a question, about a byte a token; every tenth page is of the test rows. The model is the
quickstart's, from its pretrained weights (run ``make demo`` once), and so is the optimizer: Muon.

Each objective has a run by masks by count, and of sums by rate too, with as many forwards: what is
measured is the likelihood bound of the test rows. ``length_noise.py`` has the gradient's noise.
What is in OUTPUT already is not made again. Writes a figure, and prints tables.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from quickstart_model import WORLD, Quickstart
from torchtune.data import Message

from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator, Masking, Objective
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.evaluation import BoundEstimator
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, FixedCount
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.noise import keyed_generator
from mdm_plugin.objectives import ELBO, Widening, Window
from mdm_plugin.quickstart.data import worked_answer
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training import get_linear_schedule_with_warmup
from mdm_plugin.training.corruption import corrupted_step
from mdm_plugin.training.step import backward, global_normalizer

PROBLEMS = 32_000  # of the training rows, for all lengths
TESTED = 240  # problems; or texts of 64 tokens


class Length(NamedTuple):
    """problems: in a row. rows: in a step. steps: of a run."""

    problems: int
    rows: int
    steps: int


LENGTHS = {32: Length(1, 32, 600), 128: Length(5, 16, 400), 512: Length(20, 8, 200)}
RUNS: dict[str, tuple[Objective, Masking]] = {
    "ELBO": (ELBO(), FixedCount()),
    "window (.4, 1)": (Window(0.4), FixedCount()),
    "window (.15, 1)": (Window(0.15), FixedCount()),
    "widening (.5, 1)": (Widening(), FixedCount()),
    "ELBO, rates": (ELBO(), Bernoulli()),
    "window (.4, 1), rates": (Window(0.4), Bernoulli()),
}


def chains() -> Iterator[str]:
    """Expressions of four one-digit numbers."""
    import reasoning_gym

    settings = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    source = reasoning_gym.create_dataset(
        "chain_sum", seed=0, size=2 * PROBLEMS, allow_negation=False, **settings
    )
    return (entry["metadata"]["expression"] for entry in source)


def sums(tokenizer: ChatTokenizer, tokens: int) -> tuple[Rows, Rows]:
    """Rows to train on and to test on, of as many problems as take about so many tokens."""
    each, source = LENGTHS[tokens].problems, chains()
    tested = list(islice(source, TESTED))
    held = set(tested)
    trained = list(islice((x for x in source if x not in held), PROBLEMS))

    def turns(problems: list[str]) -> Iterator[list[Message]]:
        for start in range(0, len(problems), each):
            part = problems[start : start + each]
            answer = "\n".join(worked_answer(x) for x in part)
            yield [
                Message("user", "\n".join(part), masked=True),
                Message("assistant", answer),
            ]

    def rows(problems: list[str]) -> Rows:
        found = (tokenizer.tokenize_messages(x) for x in turns(problems))
        return Rows((ids, [not m for m in masked]) for ids, masked in found)

    return rows(trained), rows(tested)


def text(tokenizer: ChatTokenizer, tokens: int) -> tuple[Rows, Rows]:
    """Rows of so many tokens of Python's help, likewise."""
    from pydoc_data.topics import topics

    parts: dict[bool, list[int]] = {False: [], True: []}
    for i, name in enumerate(sorted(topics)):
        parts[i % 10 == 0] += [*tokenizer.encode(topics[name]), tokenizer.eos_id]

    def rows(ids: list[int]) -> Rows:
        starts = range(0, len(ids) - tokens + 1, tokens)
        return Rows((ids[i : i + tokens], [True] * tokens) for i in starts)

    test = rows(parts[True])
    chosen = torch.randperm(len(test), generator=keyed_generator(0, "test"))
    return rows(parts[False]), test.choose(chosen[: TESTED * 64 // tokens])


CONTENTS = {"sums": sums, "text": text}


class Bench:
    """A content at a length, with the quickstart's model."""

    def __init__(self, content: str, tokens: int) -> None:
        self.quickstart, self.length = Quickstart(), LENGTHS[tokens]
        self.tokenizer = self.quickstart.tokenizer
        self.rows, self.test = CONTENTS[content](self.tokenizer, tokens)
        longest = max(self.rows.facts.longest, self.test.facts.longest)
        self.quickstart.config.model.max_seq_len = longest + 8

    def model(self) -> MDMTransformer:
        return self.quickstart.model(self.quickstart.pretrained).train()

    def batches(self, rows: int, seed: int) -> GlobalBatches:
        padding = Padding(self.tokenizer.pad_id, self.tokenizer.eos_id)
        return GlobalBatches(self.rows, Split(rows), padding, seed=seed)

    def train(
        self, objective: Objective, masking: Masking, seed: int, share: float = 1.0
    ) -> MDMTransformer:
        """Fine-tune by the quickstart's optimizer, for a share of the steps of the schedule."""
        model, steps = self.model(), self.length.steps
        batches = self.batches(self.length.rows, seed)
        estimator = Estimator(Stratified(), masking, MDMLoss(), self.tokenizer.mask_id)
        optimizer = instantiate(self.quickstart.config, "optimizer", list(model.named_parameters()))
        schedule = get_linear_schedule_with_warmup(
            optimizer, num_warmup_steps=30, num_training_steps=steps
        )
        for step in range(round(share * steps)):
            now = estimator._replace(w=objective(step / (steps - 1)))
            (batch,) = corrupted_step(batches, step, now)
            backward(model, now.loss, batch, global_normalizer([batch], WORLD), WORLD)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        return model

    def bound(self, model: MDMTransformer) -> dict[str, float]:
        """Nats per token of the test rows, and its standard error: of the masks, over rows."""
        found = BoundEstimator(self.tokenizer, WORLD, batch_size=32, draws=32).nelbo(
            model, self.test
        )
        return {"nats": found.nats, "error": found.error, "spread": found.spread}


def run(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Train and test."""
    start = time.process_time()
    model = bench.train(*RUNS[method], seed)
    found = {"method": method, "seed": seed, **bench.bound(model)}
    found["seconds"] = round(time.process_time() - start)
    print(found, flush=True)
    return found


def fill(file: Path, content: str, tokens: int, methods: list[str], seeds: list[int]) -> None:
    """Make the runs that are missing of a content at a length."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    place = found.setdefault(f"{content} {tokens}", {"runs": []})
    bench, there = Bench(content, tokens), {(x["method"], x["seed"]) for x in place["runs"]}
    for seed in seeds:
        for method in methods:
            of_content = content == "sums" or RUNS[method][1].by_count
            if of_content and (method, seed) not in there:
                place["runs"].append(run(bench, method, seed))
                file.write_text(json.dumps(found, indent=1) + "\n")


def bounds(place: dict[str, Any]) -> dict[str, list[float]]:
    """The nats per token of each method's runs, in the order of RUNS."""
    runs = {m: [x["nats"] for x in place["runs"] if x["method"] == m] for m in RUNS}
    return {method: nats for method, nats in runs.items() if nats}


def table(found: dict[str, Any]) -> str:
    """Nats per token in Markdown: means and standard deviations over seeds, or the one run's."""
    out = [f"| content, N | seeds | {' | '.join(RUNS)} |", "|---" * (len(RUNS) + 2) + "|"]
    for name, place in found.items():
        nats, cells = bounds(place), []
        for x in (nats.get(method, []) for method in RUNS):
            spread = f" ± {stdev(x):.3f}" if len(x) > 1 else ""
            cells.append(f"{mean(x):.3f}{spread}" if x else "–")
        seeds = len({x["seed"] for x in place["runs"]})
        out.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(out)


def draw(found: dict[str, Any], file: Path) -> None:
    """Second moments over N (``length_noise.py``), and each method's bound over the ELBO's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    moments = {n: found.get(f"sums {n}", {}).get("moments") for n in LENGTHS}
    moments = {n: x for n, x in moments.items() if x}
    for objective, style in (("ELBO", "-"), ("window (.4, 1)", "--")):
        for i, name in enumerate(("counts", "P-POTS, rates", "P-POTS, counts")):
            y = [x[objective][name][0] for x in moments.values()]
            label = name if style == "-" else None
            left.plot(list(moments), y, f".{style}", color=f"C{i}", label=label)
    left.set(title="second moment, by rates = 1 (dashed: the window)", ylim=(0, 1.1))
    for content, style in zip(CONTENTS, ("-", "--"), strict=True):
        for i, method in enumerate(list(RUNS)[1:]):
            nats = {n: bounds(found.get(f"{content} {n}", {"runs": []})) for n in LENGTHS}
            ratio = {n: mean(x[method]) / mean(x["ELBO"]) for n, x in nats.items() if method in x}
            label = method if style == "-" else None
            right.plot(list(ratio), list(ratio.values()), f".{style}", color=f"C{i}", label=label)
    right.set(title="nats per token, the ELBO's run = 1 (dashed: text)")
    for axis in (left, right):
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="N, tokens of a response")
        axis.set_xticks(list(LENGTHS), [str(n) for n in LENGTHS], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; what is there is kept")
    parser.add_argument("--figure", type=Path, default=Path("docs/length.png"))
    parser.add_argument("--content", nargs="*", default=list(CONTENTS), choices=CONTENTS)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--methods", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    given = parser.parse_args()
    for content in given.content:
        for tokens in given.tokens:
            fill(given.output, content, tokens, given.methods, given.seeds)
    found = json.loads(given.output.read_text())
    print(table(found))
    draw(found, given.figure)


if __name__ == "__main__":
    main()
