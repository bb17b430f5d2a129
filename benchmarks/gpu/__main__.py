"""All that needs a GPU, part by part: `make gpu`, or `make gpu PART=memory-llada`.

    PYTHONPATH=.:recipes python -m benchmarks.gpu memory-llada speed --output DIR
    PYTHONPATH=.:recipes python -m benchmarks.gpu report --output DIR   # tables into docs/gpu.md

From a source tree, with the torch that is installed, and without network. A part is a JSON file in
DIR, written anew after each case: the same command goes on with what is missing, and no case begins
after ``--minutes``. ``--device cpu --tiny`` rehearses all of it. Exit code 75: run it again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import ROOT, Case, Given, parts
from benchmarks.gpu.tables import report, section

AGAIN = 75  # EX_TEMPFAIL


class Failed(Exception):
    """A case's process ended with an error: its last lines."""


def environment() -> dict[str, str]:
    """Of a case's process: this source tree, and nothing from the network."""
    places = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "benchmarks")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "HF_HUB_OFFLINE": "1",
    }


def run(words: list[str]) -> str:
    """What ``python`` with these words prints.

    Raises:
        Failed: if it takes 9 minutes, or ends with an error, unless that is of pytest's tests.
    """
    command, options = [sys.executable, *words], {"capture_output": True, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=540, **options)
    except subprocess.TimeoutExpired as error:
        raise Failed("it takes more than 9 minutes") from error
    if done.returncode and "pytest" not in words:
        raise Failed("\n".join((done.stdout + done.stderr).strip().splitlines()[-15:]))
    return done.stdout


def facts(given: Given) -> dict[str, Any]:
    """What all cases of a part have in common."""
    import torch

    device = "CPU" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    return {"device": device, "torch": torch.__version__, "tiny": given.tiny}


def begun(file: Path, name: str, cases: list[Case], given: Given) -> dict[str, Any]:
    """A part as far as it has come.

    Raises:
        Failed: if what is there was measured on another device, or with another torch.
    """
    here = facts(given)
    part = {"part": name, **here, "names": [x.name for x in cases], "cases": {}}
    if file.is_file():
        there = json.loads(file.read_text())
        if other := [f"{key} {there[key]}" for key, value in here.items() if there[key] != value]:
            raise Failed(f"{file} was measured with {', '.join(other)}: use another --output")
        part["cases"] = there["cases"]
    return part | {"date": datetime.now(UTC).date().isoformat()}


def write(file: Path, part: dict[str, Any]) -> None:
    """Whole or not at all."""
    whole = file.with_suffix(".new")
    whole.write_text(json.dumps(part, indent=1))
    whole.rename(file)


def measure(name: str, cases: list[Case], given: Given, until: float) -> int:
    """What of a part is missing; 0, 1 if a case failed, or 75 if the time was up."""
    file, failed = given.output / f"{name}.json", 0
    part = begun(file, name, cases, given)
    for case in cases:
        if case.name in part["cases"]:
            continue
        if time.monotonic() > until:
            return AGAIN
        start = time.monotonic()
        try:
            found = case.measure(given)
        except Failed as error:
            print(f"{name}: {case.name}: failed:\n{error}", file=sys.stderr, flush=True)
            failed = 1
            continue
        part["cases"][case.name] = found
        write(file, part)
        print(f"{name}: {case.name}: {time.monotonic() - start:.0f} s", flush=True)
    if part["cases"]:
        print("\n".join(section(part)), flush=True)
    return failed


def measure_all(names: Iterable[str], given: Given, minutes: float) -> int:
    """The parts one after another; 75 if time is up, else 1 if a case failed, else 0."""
    given.output.mkdir(parents=True, exist_ok=True)
    until, known = time.monotonic() + 60 * minutes, parts(given.tiny)
    return max(measure(name, known[name], given, until) for name in names)


def main() -> None:
    """Run parts, or put their tables into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(parts(tiny=False))
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{names}; or report")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="directory")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/gpu.md", help="of the report")
    parser.add_argument("--minutes", type=float, default=7.5, help="no case begins later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to rehearse it")
    given = parser.parse_args()
    if given.parts == ["report"]:
        return report(given.output, given.page)
    if unknown := [x for x in given.parts if x not in parts(given.tiny)]:
        parser.error(f"{unknown[0]} is none of {names}")
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny rehearses it")
    place = Given(given.output.resolve(), given.device, given.tiny, run)
    try:
        sys.exit(measure_all(given.parts or parts(given.tiny), place, given.minutes))
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
