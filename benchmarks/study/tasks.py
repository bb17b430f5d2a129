"""The study's tasks, its tokenizer and the text that its models are pretrained on.

Three families of reasoning-gym, each with its own verifier:

- ``chain``: ``chain_sum``, three one-digit numbers, answered with every running sum;
- ``legs``: ``leg_counting``, a word problem: how many legs some animals have, with its products
  and sums;
- ``sudoku``: ``mini_sudoku``, a table: a 4 x 4 grid with 8 to 10 empty cells, to be filled in.

No problem occurs twice, within or across the training, validation and test rows. The models are
pretrained on parts: running sums, products and their sum, which animal has how many legs, full
grids. No lesson is a task's question.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mdm_plugin.quickstart.data import worked_answer, write_tokenizer

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": (
        "chain_sum",
        {
            "min_terms": 3,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 1,
            "allow_negation": False,
        },
    ),
    "legs": (
        "leg_counting",
        {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 5},
    ),
    "sudoku": ("mini_sudoku", {"min_empty": 8, "max_empty": 10}),
}
# Tokens of the longest response in training: a model that is asked for more has not seen so many
# end tokens, and may give nothing but them.
LONGEST = {"chain": 23, "legs": 33, "sudoku": 24}
SIZES = {"test": 500, "val": 300, "train": 2560}
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
    for task in SETTINGS:
        _write_task(home / task, task)
    lessons = list(_lessons())
    random.Random(0).shuffle(lessons)
    (home / "pretrain.jsonl").write_text("".join(_line(*lesson) for lesson in lessons))
    texts = [text for lesson in lessons for text in lesson]
    write_tokenizer(home, texts + 1000 * ["how many legs have", "Answer:", ", ?"], VOCABULARY)


def _write_task(directory: Path, task: str) -> None:
    """Rows of a task, in three files."""
    import reasoning_gym

    directory.mkdir(parents=True, exist_ok=True)
    family, settings = SETTINGS[task]
    size = 20 * sum(SIZES.values())
    source = iter(reasoning_gym.create_dataset(family, seed=0, size=size, **settings))
    seen: set[str] = set()
    for split, count in SIZES.items():
        lines: list[str] = []
        while len(lines) < count:
            entry = next(source)
            question, answer = TURNS[task](entry)
            if question in seen:
                continue
            seen.add(question)
            lines.append(_line(question, answer, entry=entry))
        (directory / f"{split}.jsonl").write_text("".join(lines))


def _line(question: str, answer: str, **more: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **more}) + "\n"


def _lessons() -> Iterator[tuple[str, str]]:
    """What the tasks are made of, three at a time, none helping with another: sums, products,
    how many legs an animal has, and rows of a grid with one cell empty."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    dice = random.Random(1)
    legs = sorted(set(ANIMALS.values()))
    products = sorted({n * leg for n, leg in product(range(1, 6), legs)})

    def small() -> tuple[str, str]:
        a, b, sign = dice.randrange(-18, 28), dice.randrange(10), dice.choice("+-")
        return f"{a} {sign} {b}", f"{a} {sign} {b} = {a + b if sign == '+' else a - b}"

    def large() -> tuple[str, str]:
        a, b = dice.choice(products), dice.choice(products)
        return f"{a} + {b}", f"{a} + {b} = {a + b}"

    def multiplied() -> tuple[str, str]:
        n, leg = dice.randrange(1, 6), dice.choice(legs)
        return f"{n} x {leg}", f"{n} x {leg} = {n * leg}"

    def animal() -> tuple[str, str]:
        name = dice.choice(sorted(ANIMALS))
        return f"{name}s", f"{name}s have {ANIMALS[name]} legs"

    def row() -> tuple[str, str]:
        cells, empty = dice.sample("1234", 4), dice.randrange(4)
        given = ["_" if i == empty else cell for i, cell in enumerate(cells)]
        return " ".join(given), " ".join(cells)

    for kind, count in (
        (small, 9000),
        (large, 7000),
        (multiplied, 3000),
        (animal, 3000),
        (row, 3000),
    ):
        for _ in range(count):
            asked, answered = zip(*(kind() for _ in range(3)), strict=True)
            yield "\n".join(asked), "\n".join(answered)


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
