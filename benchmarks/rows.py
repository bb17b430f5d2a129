"""Rows larger than memory: what a rank holds of them, how long starts take, and a kill.

    python benchmarks/rows.py --tokens 200e6 --output bench

Writes a file of chat rows with so many tokens, trains on it on two ranks by the user's own command,
and removes it again. Measured are: the first start, which tokenises into the cache, and the second,
which opens it; each rank's peak of resident memory above that of the same run on few rows; and that
a run which is killed and resumed ends with the weights of the one that was not.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mdm_plugin.quickstart import prepare_data

BIN = Path(sys.executable).parent
STEPS, BATCH = 60, 16
OPENING = """
import sys, time
from mdm_plugin.data import chat_dataset
from mdm_plugin.models import ChatTokenizer
tokenizer = ChatTokenizer(sys.argv[1], max_seq_len=512)
start = time.perf_counter()
rows = chat_dataset(tokenizer, source=sys.argv[2])
print(time.perf_counter() - start, len(rows), rows.facts.tokens)
"""


def write_rows(file: Path, tokens: float) -> None:
    """Sums of many terms, about 300 tokens a row, until there are ``tokens``."""
    draw = random.Random(0)
    written = 0
    with file.open("w") as out:
        while written < tokens:
            terms = [draw.randrange(10) for _ in range(70)]
            total, lines = terms[0], []
            for term in terms[1:]:
                lines.append(f"{total} + {term} = {total + term}")
                total += term
            turns = [
                {"role": "user", "content": " + ".join(map(str, terms)) + " ="},
                {"role": "assistant", "content": "\n".join(lines[:20])},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
            written += TOKENS_PER_ROW


TOKENS_PER_ROW = 300  # about


class Runs:
    """Runs of the recipe on two ranks, in a directory of their own."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home, self.data = home, data

    def start(self, source: Path, out: str, *more: str) -> subprocess.Popen:
        command = [
            *(BIN / "tune", "run", "--nproc_per_node", "2", "mdm_full_finetune"),
            *("--config", "quickstart_pretrain", f"data_dir={self.data}"),
            f"output_dir={self.home / out}",
            "dataset._component_=mdm_plugin.data.chat_dataset",
            f"dataset.source={source}",
            *("tokenizer.max_seq_len=512", "model.max_seq_len=512", f"batch_size={BATCH}"),
            *("epochs=1", f"max_steps_per_epoch={STEPS}", "log_every_n_steps=10"),
            *("dataset_val=null", "run_val_every_n_steps=null", "save_every_n_steps=20", *more),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MDM_PLUGIN_HOME": str(self.home)}
        return subprocess.Popen(
            [str(x) for x in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, source: Path, out: str, *more: str) -> tuple[float, list[float], str]:
        """Seconds, each rank's peak of resident memory in MB, and what was printed."""
        start, process = time.perf_counter(), self.start(source, out, *more)
        peaks: dict[int, float] = {}
        while process.poll() is None:
            for pid in children(process.pid):
                if (size := peak(pid)) is not None:
                    peaks[pid] = size
            time.sleep(0.2)
        printed = process.stdout.read() if process.stdout else ""
        if process.returncode:
            raise SystemExit(printed[-3000:])
        ranks = sorted(peaks.values())[-2:]  # torchrun itself is smaller than its ranks
        return time.perf_counter() - start, ranks, printed

    def killed(self, source: Path, out: str) -> None:
        """A run that is killed after its first checkpoint."""
        process = self.start(source, out)
        while not (self.home / out / "step_20").is_dir():
            if process.poll() is not None:
                raise SystemExit(process.stdout.read()[-3000:] if process.stdout else "ended early")
            time.sleep(0.05)
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """All processes that a process has begun, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            own = [int(x) for x in task.read_text().split()]
        except OSError:
            continue
        for child in own:
            found += [child, *children(child)]
    return found


def peak(pid: int) -> float | None:
    """VmHWM in MB: the most that a process ever held, pages of mapped files included."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(match[1]) / 1000 if match else None


def opening(data: Path, source: Path, home: Path) -> tuple[float, int, int]:
    """Seconds until a data set is there, in a process of its own; its rows and tokens."""
    environment = {**os.environ, "MDM_PLUGIN_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(data), str(source)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, rows, tokens = done.stdout.split()
    return float(seconds), int(rows), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, default=200e6)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="rows_", dir=given.output))
    try:
        found = measure(home, given.tokens)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    (given.output / "rows.json").write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        print(f"{name:42} {value}")


def measure(home: Path, tokens: float) -> dict[str, object]:
    data, few, many = home / "data", home / "few.jsonl", home / "many.jsonl"
    prepare_data(str(data))
    write_rows(few, 200 * TOKENS_PER_ROW * BATCH)
    write_rows(many, tokens)
    runs = Runs(home, data)
    _, small, _ = runs.run(few, "few")
    first, building, _ = runs.run(many, "first")  # tokenises, and trains
    second, large, _ = runs.run(many, "second")
    seconds, rows, count = opening(data, many, home)
    runs.killed(many, "killed")
    runs.run(many, "killed")
    weights = [
        (home / x / f"step_{STEPS}/model.safetensors").read_bytes() for x in ("second", "killed")
    ]
    return {
        "rows": rows,
        "tokens": count,
        "file_mb": round(many.stat().st_size / 1e6),
        "cache_mb": round(sum(f.stat().st_size for f in home.rglob("rows.arrow")) / 1e6),
        "first_start_and_training_s": round(first, 1),
        "second_start_and_training_s": round(second, 1),
        "opening_the_cache_s": round(seconds, 2),
        "rank_peak_mb_few_rows": [round(x) for x in small],
        "rank_peak_mb_above_few_rows_second_start": [
            round(a - b) for a, b in zip(large, small, strict=True)
        ],
        "rank_peak_mb_above_few_rows_first_start": [
            round(a - b) for a, b in zip(building, small, strict=True)
        ],
        "killed_and_resumed_bit_equal": weights[0] == weights[1],
    }


if __name__ == "__main__":
    main()
