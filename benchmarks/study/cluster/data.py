"""GSM8K, HiTab and OpenScience as rows of chats. NOT RUN HERE: it needs the network.

    python -m benchmarks.study.cluster.data --output /shared/data

GSM8K from openai/gsm8k; OpenScience from nvidia/OpenScience (20,000 rows, 1,000 of them for the
test); HiTab from its repository, microsoft/HiTab, which --hitab names.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write(file: Path, rows: Iterable[tuple[str, str]]) -> None:
    """(question, answer that ends in "Answer: …") as chats."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for question, answer in rows:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def gsm8k(output: Path) -> None:
    """The rationale without its calculator marks, and the number."""
    from datasets import load_dataset

    for split in ("train", "test"):
        rows = load_dataset("openai/gsm8k", "main", split=split)
        pairs = []
        for row in rows:
            rationale, _, number = row["answer"].partition("####")
            text = re.sub(r"<<.*?>>", "", rationale).strip()
            pairs.append((row["question"], f"{text}\nAnswer: {number.strip()}"))
        write(output / "gsm8k" / f"{split}.jsonl", pairs)


def openscience(output: Path) -> None:
    """Question and worked answer; the letter in the last box is the answer."""
    from datasets import load_dataset

    rows = load_dataset("nvidia/OpenScience", split="train", streaming=True)
    pairs = []
    for row in rows:
        boxed = re.findall(r"\\boxed\{([^{}]+)\}", row["output"])
        if boxed:
            pairs.append((row["input"], f"{row['output'].strip()}\nAnswer: {boxed[-1].strip()}"))
        if len(pairs) == 20_000:
            break
    random.Random(0).shuffle(pairs)
    write(output / "openscience" / "test.jsonl", pairs[:1000])
    write(output / "openscience" / "train.jsonl", pairs[1000:])


def hitab(output: Path, source: Path) -> None:
    """The table as lines of cells, and the answer."""
    for split in ("train", "test"):
        pairs = []
        for line in (source / "data" / f"{split}_samples.jsonl").open():
            sample = json.loads(line)
            table = source / "data" / "tables" / "hmt" / f"{sample['table_id']}.json"
            cells = json.loads(table.read_text())
            lines = [" | ".join(map(str, row)) for row in cells.get("texts", cells.get("data", []))]
            question = f"{cells['title']}\n" + "\n".join(lines) + f"\n\n{sample['question']}"
            answer = ", ".join(map(str, sample["answer"]))
            pairs.append((question, f"Answer: {answer}"))
        write(output / "hitab" / f"{split}.jsonl", pairs)


def verifier() -> Callable[[str, Mapping[str, Any]], bool]:
    """What follows the last "Answer:" is the reference's, as a number where both are."""

    def value(text: str) -> str | float:
        answer = text.rpartition("Answer:")[2].strip().rstrip(".").replace(",", "")
        try:
            return float(answer.lstrip("$").rstrip("%"))
        except ValueError:
            return answer.lower()

    def verify(completion: str, row: Mapping[str, Any]) -> bool:
        return "Answer:" in completion and value(completion) == value(
            row["messages"][-1]["content"]
        )

    return verify


def main() -> None:
    """Write all that can be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hitab", type=Path, help="a checkout of microsoft/HiTab")
    given = parser.parse_args()
    gsm8k(given.output)
    openscience(given.output)
    if given.hitab:
        hitab(given.output, given.hitab)


if __name__ == "__main__":
    main()
