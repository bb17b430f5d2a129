"""Which releases of torch are in range: pyproject.toml, the Makefile and docs/gpu.md agree."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def in_range(requirements: list[str], release: str) -> bool:
    torch = next(x for x in map(Requirement, requirements) if x.name == "torch")
    return torch.specifier.contains(release)


def releases() -> list[str]:
    """Of the heading of the page's table."""
    text = (ROOT / "docs/gpu.md").read_text()
    heading = next(x for x in text.splitlines() if x.startswith("| CPU | "))
    return re.findall(r"\d+\.\d+\.\d+", heading)


def test_every_minor_release_in_range_is_in_the_table_and_no_other():
    minors = {x.rpartition(".")[0] for x in releases()}
    known = [f"2.{n}" for n in range(20)]
    assert minors == {x for x in known if in_range(PROJECT["dependencies"], f"{x}.0")}
    assert len(minors) == len(releases()) > 1


@pytest.mark.parametrize("release", releases())
def test_make_has_an_environment_for_each_and_torchtitan_where_it_goes_with_it(release):
    words = ["make", "--dry-run", "--always-make", "tests", f"TORCH={release}"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    place = ".venv" if f"torch=={release}" in (ROOT / "constraints.txt").read_text() else ""
    place = place or f".venvs/{release}"
    assert f"{place}/bin/python -m pytest" in shown and f"torch=={release}" in shown
    titan = in_range(PROJECT["optional-dependencies"]["titan"], release)
    assert (".[dev,titan]" in shown) == titan and (".[dev]" in shown) != titan
