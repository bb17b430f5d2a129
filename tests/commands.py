"""The commands that the pages show: blocks of a shell's lines, and those within a sentence."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / x for x in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# What a command may need that a test has not. `<!-- needs: network -->` stands right above its
# block, or behind it in a sentence.
MARKS = {"gpu", "network", "time"}
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$\n?", re.M | re.S)
SHELL = ("bash", "console", "sh", "shell")
MARK = re.compile(r"<!-- needs: (.*?) -->")
PROGRAMS = ("python", "tune", "mdm", "make", "pip", "torchrun", "sbatch", "tensorboard", "pytest")
PROGRAMS += ("chromium", ".venv/bin/python", "docs/launch/tune.sh", "docs/launch/titan.sh")


class Command(NamedTuple):
    """A command of a page: its text, what it needs (of ``MARKS``), and whether it is a block's."""

    text: str
    needs: str
    block: bool

    @property
    def words(self) -> list[str]:
        """Without what it sets in the environment, and comments."""
        words = shlex.split(self.text, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        return words


def blocks(text: str) -> list[tuple[str, str]]:
    """(lines, mark) of a page's blocks of shell: indented by four spaces, or between fences."""
    made = []

    def keep(found: re.Match[str]) -> str:
        made.append((found[4], mark(text[: found.start()])) if found[3] in SHELL else None)
        return "\n" * found[0].count("\n")

    text = re.sub(r"\r", "", text)
    rest = FENCE.sub(keep, text)
    for found in re.finditer(r"(?:^    .*\n)+", rest, re.M):
        if found[0].split()[0] in PROGRAMS or re.match(" +[A-Z_]+=", found[0]):  # not a formula
            made.append((found[0], mark(rest[: found.start()])))
    return [x for x in made if x]


def mark(before: str) -> str:
    """What the mark right above a block says; empty without one."""
    found = MARK.findall(before.rstrip().rpartition("\n\n")[2])
    return found[-1] if found and before.rstrip().endswith("-->") else ""


def commands(page: Path) -> list[Command]:
    """All commands of a page, but for names of them, and those with an ellipsis."""
    text = page.read_text()
    found = []
    for lines, needs in blocks(text):
        for line in re.sub(r"\\\n\s*", "", lines).splitlines():
            if shown := line.strip().removeprefix("$ "):
                found.append(Command(shown, needs, True))
    prose = re.sub(r"^    .*$", "", FENCE.sub("", text), flags=re.M)
    for code, _, needs in re.findall(r"(?<!`)`([^`]+)`(\s*<!-- needs: (.*?) -->)?", prose):
        command = Command(" ".join(code.split()), needs, False)
        try:
            words = command.words
        except ValueError:  # a lone quote
            continue
        if not words or words[0] not in PROGRAMS or "…" in words:
            continue
        needed = "--config" if words[:2] == ["tune", "run"] else words[-1]
        bare = words[0] == "tune" or words[1:] in (["cp"], ["cat"], ["run"])
        if len(words) > (2 if bare else 1) and needed in words:
            found.append(command)
    return found
