"""The study's tasks, its tokenizer and the text that its models are pretrained on.

Three families of reasoning-gym, each with its own verifier:

- ``chain``: ``chain_sum``, four one-digit numbers, answered with every running sum;
- ``legs``: ``leg_counting``, a word problem: how many legs some animals have, with its products
  and sums;
- ``sudoku``: ``mini_sudoku``, a table: a 4 x 4 grid with 6 to 8 empty cells, to be filled in.

No problem occurs twice, within or across the training, validation and test rows. The models are
pretrained on parts: running sums, products and their sum, which animal has how many legs, full
grids. No text holds a question.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

from mdm_plugin.quickstart import worked_answer, write_tokenizer

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": (
        "chain_sum",
        {
            "min_terms": 4,
            "max_terms": 4,
            "min_digits": 1,
            "max_digits": 1,
            "allow_negation": False,
        },
    ),
    "legs": (
        "leg_counting",
        {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 5},
    ),
    "sudoku": ("mini_sudoku", {"min_empty": 6, "max_empty": 8}),
}
SIZES = {"test": 500, "val": 300, "train": 3200}
VOCABULARY = 384


def chain_turns(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Question, and the answer with every running sum."""
    question = entry["question"].rpartition(": ")[2]
    return question, worked_answer(entry["metadata"]["expression"])


def legs_turns(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The question, shortened, and the answer: a product per animal, then running sums."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, total = [], 0
    for i, (animal, number) in enumerate(entry["metadata"]["animals"].items()):
        legs = number * ANIMALS[animal]
        lines.append(f"{number} x {ANIMALS[animal]} = {legs}")
        if i:
            lines.append(f"{total} + {legs} = {total + legs}")
        total += legs
    animals = entry["question"].strip().rpartition("if you have ")[2]
    return f"how many legs have {animals}", "\n".join([*lines, f"Answer: {total}"])


def sudoku_turns(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The grid with its empty cells, and the full one."""
    rows = entry["metadata"]["puzzle"]
    grid = "\n".join(" ".join(str(cell or "_") for cell in row) for row in rows)
    return grid, f"Answer:\n{entry['answer']}"


TURNS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    "chain": chain_turns,
    "legs": legs_turns,
    "sudoku": sudoku_turns,
}


def prepare(home: Path) -> None:
    """Make the data and the tokenizer in ``home``, if missing: TASK/train.jsonl and so on."""
    if (home / "tokenizer_config.json").is_file():  # written last
        return
    texts = []
    for task in SETTINGS:
        texts += _write_task(home / task, task)
    pretraining = list(_pretraining())
    random.Random(0).shuffle(pretraining)
    lines = (json.dumps({"text": text}) for text in pretraining)
    (home / "pretrain.jsonl").write_text("\n".join(lines) + "\n")
    write_tokenizer(home, texts + pretraining, VOCABULARY)


def _write_task(directory: Path, task: str) -> list[str]:
    """Rows of a task; the texts of those that are for training."""
    import reasoning_gym

    directory.mkdir(parents=True, exist_ok=True)
    family, settings = SETTINGS[task]
    size = 20 * sum(SIZES.values())
    source = iter(reasoning_gym.create_dataset(family, seed=0, size=size, **settings))
    seen: set[str] = set()
    texts: list[str] = []
    for split, count in SIZES.items():
        lines: list[str] = []
        while len(lines) < count:
            entry = next(source)
            question, answer = TURNS[task](entry)
            if question in seen:
                continue
            seen.add(question)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": turns, "entry": entry}))
            if split == "train":
                texts += [question, answer]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return texts


def _pretraining() -> Iterator[str]:
    """What the tasks are made of, each by itself: sums, products, which animal has how many legs,
    four to a text, none of which helps with another; and full grids."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    dice = random.Random(1)
    legs, grids = sorted(set(ANIMALS.values())), list(_grids())
    products = sorted({n * leg for n, leg in product(range(1, 6), legs)})

    def small() -> str:
        a, b, sign = dice.randrange(-18, 28), dice.randrange(10), dice.choice("+-")
        return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"

    def large() -> str:
        a, b = dice.choice(products), dice.choice(products)
        return f"{a} + {b} = {a + b}"

    def multiplied() -> str:
        n, leg = dice.randrange(1, 6), dice.choice(legs)
        return f"{n} x {leg} = {n * leg}"

    def animal() -> str:
        name = dice.choice(sorted(ANIMALS))
        return f"{name}s have {ANIMALS[name]} legs"

    for kind, count in ((small, 12000), (large, 6000), (multiplied, 2000), (animal, 2000)):
        for _ in range(count):
            yield "\n".join(kind() for _ in range(4))
    for _ in range(4000):
        yield dice.choice(grids)


def _grids() -> Iterator[str]:
    """The 288 grids with 1 to 4 in each row, column and quarter."""
    rows = list(permutations("1234"))
    for grid in product(rows, repeat=4):
        columns = zip(*grid, strict=True)
        quarters = (
            {grid[i][j] for i in (r, r + 1) for j in (c, c + 1)} for r in (0, 2) for c in (0, 2)
        )
        if all(len(set(x)) == 4 for x in columns) and all(len(x) == 4 for x in quarters):
            yield "\n".join(" ".join(row) for row in grid)


@cache
def _scorer(task: str) -> Any:
    import reasoning_gym

    family, settings = SETTINGS[task]
    return reasoning_gym.create_dataset(family, seed=0, size=1, **settings)


def verifier(task: str) -> Callable[[str, Mapping[str, Any]], bool]:
    """For ``mdm_eval``'s ``verifier``: does reasoning-gym's own give full marks to the text after
    "Answer:"?"""

    def verify(completion: str, row: Mapping[str, Any]) -> bool:
        _, found, answer = completion.rpartition("Answer:")
        return bool(found) and _scorer(task).score_answer(answer.strip(), entry=row["entry"]) == 1.0

    return verify
