"""Results as Markdown: a table of each part, between two marks of a page."""

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read(directory: Path) -> list[dict[str, Any]]:
    """The parts of a directory, in the order of their names."""
    return [json.loads(x.read_text()) for x in sorted(directory.glob("*.json"))]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def table(cases: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each case, a column for each figure; a single case has a line for each figure."""
    if len(cases) == 1:
        ((name, found),) = cases.items()
        return [f"| {name} | |", "|---|---|", *(f"| {k} | {shown(v)} |" for k, v in found.items())]
    columns = list(dict.fromkeys(key for found in cases.values() for key in found))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, found in cases.items():
        cells = (shown(found[x]) if x in found else "" for x in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def section(part: dict[str, Any]) -> list[str]:
    """A part's heading, where and when it ran, and its table."""
    cases = {name: dict(found) for name, found in part["cases"].items()}
    for found in cases.values():
        found.pop("device", None)
    left = [x for x in part["names"] if x not in cases]
    return [
        *(f"### {part['part']}", ""),
        f"{part['device']}, torch {part['torch']}, {part['date']}"
        + (", at tiny sizes: a rehearsal." if part["tiny"] else "."),
        "",
        *table(cases),
        *(["", f"Not run yet: {'; '.join(left)}."] if left else []),
        "",
    ]


def report(directory: Path, page: Path) -> None:
    """Put the tables of a directory into a page.

    Raises:
        ValueError: if the page has not both marks, or the directory no results.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    parts = read(directory)
    if not begin or not end or not parts:
        raise ValueError(f"{page} has to have {BEGIN} and {END}, and {directory} results")
    lines = [line for part in parts for line in section(part)]
    page.write_text("\n".join([before + BEGIN, "", *lines, END]) + after)
