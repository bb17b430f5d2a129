"""Results of an evaluation, a line per row, which a kill cannot spoil."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Parts:
    """The rows of a task that are done, in a file per rank: ``TASK.RANK.jsonl``.

    Args:
        directory: of the evaluation.
        task: its name; a / in it becomes a -.
        rank: whose file ``write`` appends to.
    """

    def __init__(self, directory: Path, task: str, rank: int = 0) -> None:
        self.directory, self.stem = directory, task.replace("/", "-")
        self.file = directory / f"{self.stem}.{rank}.jsonl"

    def read(self) -> dict[int, dict[str, Any]]:
        """index → record, of all ranks. A last line that a kill cut short is none."""
        found = {}
        for file in sorted(self.directory.glob(f"{self.stem}.*.jsonl")):
            for line in file.read_text().split("\n")[:-1]:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found[record["index"]] = record
        return found

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records; they are on their way to the disk when this returns."""
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records)
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a") as file:
            file.write(("\n" if cut else "") + text)
