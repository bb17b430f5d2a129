"""From ``tune run`` to the end of the quickstart's first step, and what else a command takes.

    python benchmarks/startup.py --output startup.json
    python benchmarks/startup.py --before /another/checkout

Its data and pretrained model are made first, so this is a second start. Runs are in turn with bare
imports of torchtune's command line, and with those of the other checkout. Shown are medians of wall
time and of processor time (of rank 0, on one thread unless OMP_NUM_THREADS says otherwise), with
their range. Where other work runs beside it, processor time is the one to look at.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mdm_plugin.training import TensorBoardLogger

BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parents[1]
Seconds = tuple[float, float]  # of wall and of processor time


def now() -> Seconds:
    return time.time(), time.process_time()


def processor_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# The config names this module's logger: so it is imported when the command's own imports are done.
MARKS = {"Python, imports, config": now()}
FLOOR = "of these, torchtune's command line"
TOTAL = "to the end of the first step"
ANSWER = "mdm_generate with a prompt, whole"


class FirstStep(TensorBoardLogger):
    """The quickstart's logger, which notes when what is done, and ends the run after one step."""

    def log_config(self, config: Any) -> None:
        MARKS["data, model, optimizer"] = now()
        super().log_config(config)

    def log_dict(self, payload: Any, step: int) -> None:
        MARKS["first step" if step else "validation"] = now()
        super().log_dict(payload, step)
        if step:
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(MARKS), flush=True)
            raise SystemExit(0)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        MARKS["probe, and fit of the density of t"] = now()
        super().log_figure(name, figure, step)
        MARKS["its figure drawn"] = now()


class Starts:
    """Starts of a checkout's code, with data in a directory of their own."""

    def __init__(self, checkout: Path, home: Path, ranks: int) -> None:
        self.home, self.ranks, self.count = home, ranks, 0
        path = [checkout, checkout / "recipes", HERE / "benchmarks"]
        self.environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "MDM_PLUGIN_HOME": str(home),
            # Of what is installed, and another checkout may lack it.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }

    def start(self) -> dict[str, Seconds]:
        """Seconds of each part of a start."""
        self.count += 1
        launch = ["--nproc_per_node", str(self.ranks)] if self.ranks > 1 else []
        command = [*map(str, (BIN / "tune", "run", *launch)), "mdm_full_finetune"]
        command += ["--config", "quickstart", f"output_dir={self.home / str(self.count)}"]
        command += ["log_every_n_steps=1", "metric_logger._component_=startup.FirstStep"]
        begin, used = time.time(), processor_of_children()
        said = self._run(command)
        end, used = time.time(), processor_of_children() - used
        seconds, last = {}, (begin, 0.0)
        for name, at in json.loads(said.strip().splitlines()[-1]).items():
            seconds[name], last = (at[0] - last[0], at[1] - last[1]), at
        seconds[TOTAL] = last[0] - begin, last[1]
        if self.ranks == 1:
            seconds["then, until the process has ended"] = end - last[0], used - last[1]
        return seconds

    def floor(self) -> Seconds:
        """Of Python that imports what the script ``tune`` does, before it looks for a recipe."""
        # Without its end: to take all that apart is a second of its own.
        script = "import time, torchtune._cli.tune; print(time.time(), time.process_time())"
        begin = time.time()
        end, processor = map(float, self._run([sys.executable, "-c", script]).split())
        return end - begin, processor

    def answer(self) -> Seconds:
        """Of mdm_generate with one prompt, as a whole."""
        weights = f"checkpointer.checkpoint_dir={self.home / 'quickstart' / 'pretrained'}"
        command = [str(BIN / "tune"), "run", "mdm_generate", "--config", "quickstart_generate"]
        begin, used = time.time(), processor_of_children()
        self._run([*command, weights, "prompt=3 + 4"])
        return time.time() - begin, processor_of_children() - used

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.home, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done.stdout


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, to be measured beside")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    checkouts = {"here": HERE}
    if arguments.before:
        checkouts = {"before": arguments.before.resolve(), **checkouts}
    found: dict[str, list[dict[str, Seconds]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as directory:
        starts: dict[str, Starts] = {}
        for name, checkout in checkouts.items():
            home = Path(directory) / name
            home.mkdir()
            for made in starts.values():
                shutil.copytree(made.home / "quickstart", home / "quickstart")
            starts[name] = Starts(checkout, home, arguments.ranks)
            starts[name].start()  # makes the data, and Python's compiled files
        for _ in range(arguments.runs):
            for name, checkout in starts.items():
                figures = {**checkout.start(), FLOOR: checkout.floor(), ANSWER: checkout.answer()}
                found[name].append(figures)
    for name, runs in found.items():
        print(f"{name + f': {len(runs)} starts':40} wall, s                processor, s")
        for part in runs[0]:
            wall, processor = zip(*(x[part] for x in runs), strict=True)
            print(f"  {part:38} {spread(wall):23} {spread(processor)}")
    if "before" in found:
        pairs = list(zip(found["here"], found["before"], strict=True))
        wall, processor = ([a[TOTAL][i] / b[TOTAL][i] for a, b in pairs] for i in (0, 1))
        print(f"{'here / before, ' + TOTAL:40} {spread(wall):23} {spread(processor)}")
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
