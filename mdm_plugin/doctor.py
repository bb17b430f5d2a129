"""``mdm doctor``: what is installed, whether it goes together, and what this machine can do.

Nothing but the standard library is imported before it is looked for: so it works where the rest
does not.
"""

import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "mdm-plugin"
# What the optional dependencies are for; those that are not here are for work on the project.
PURPOSES = {"eval": "lm-eval's tasks in mdm_eval", "titan": "torchtitan's Trainer"}


class Finding(NamedTuple):
    """A line of the report.

    state: ``wrong`` where a recipe cannot run so, ``note`` where something optional is missing.
    what: what was looked at. found: what it is, and what to do.
    """

    state: Literal["ok", "note", "wrong"]
    what: str
    found: str

    def __str__(self) -> str:
        return f"{self.state:<5}  {self.what:<17}  {self.found}"


def installed(name: str) -> str | None:
    """The version of a package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(
    requirements: Sequence[str], version_of: Callable[[str], str | None] = installed
) -> Iterator[Finding]:
    """A line for each package that the recipes need, and one for each extra.

    Args:
        requirements: as a package's metadata has them: ``torch<2.14,>=2.13``, and
            ``lm-eval>=0.4.13; extra == "eval"``.
        version_of: the version of a package that is installed, None for none.
    """
    from packaging.requirements import Requirement

    extras: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        extra = re.search(r'extra == "(.+?)"', str(marker))
        if extra and marker:
            if requirement.name != PROJECT and marker.evaluate({"extra": extra[1]}):
                extras.setdefault(extra[1], []).append(requirement)
        elif not marker or marker.evaluate():
            found, problem = _version(requirement, version_of)
            advice = f': pip install "{requirement.name}{requirement.specifier}"'
            yield Finding(
                "wrong" if problem else "ok",
                requirement.name,
                problem + advice if problem else found,
            )
    for name, wanted in extras.items():
        looked = [(x.name, *_version(x, version_of)) for x in wanted]
        problems = [f"{package} {problem}" for package, _, problem in looked if problem]
        purpose = PURPOSES.get(name, "work on the project itself")
        if problems:
            advice = f'pip install "{PROJECT}[{name}]"'
            yield Finding("note", f"[{name}]", f"for {purpose}: {', '.join(problems)}: {advice}")
        else:
            names = ", ".join(f"{package} {version}" for package, version, _ in looked)
            yield Finding("ok", f"[{name}]", f"for {purpose}: {names}")


def _version(
    requirement: "Requirement", version_of: Callable[[str], str | None]
) -> tuple[str, str]:
    """The version that is installed, and what is wrong with it: nothing, if it is what is asked."""
    found = version_of(requirement.name)
    if found is None:
        return "", "is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return found, ""
    return found, f"{found} does not go with this release, which takes {requirement.specifier}"


def check_recipes(recipes: Sequence[str]) -> Iterator[Finding]:
    """Whether each recipe can be imported, with all that it imports."""
    for name in recipes:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package does that does not go with another
            yield Finding("wrong", name, f"cannot be imported: {_reason(error)}")
        else:
            yield Finding("ok", name, "can be imported")


def _reason(error: BaseException) -> str:
    """What an error began with, in a line: torchtune wraps others' in advice of many."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]


def check_device() -> Iterator[Finding]:
    """The GPUs, or the CPU; what they compute in, and what their ranks talk by."""
    import torch

    from mdm_plugin.training.precision import FLOAT8_CAPABILITY

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        facts = torch.cuda.get_device_properties(i)
        able = (facts.major, facts.minor)
        kinds = f"bf16 {_yes(able >= (8, 0))}, float8 {_yes(able >= FLOAT8_CAPABILITY)}"
        size = facts.total_memory / 1024**3
        yield Finding("ok", f"GPU {i}", f"{facts.name}, {size:.0f} GiB: {kinds}")
    if not count:
        threads = torch.get_num_threads()
        yield Finding("ok", "CPU", f"{threads} threads: bf16 yes, float8 no; say device=cpu")
        yield _no_gpu(torch.__version__, torch.version.cuda)
    ways = {
        "gloo": torch.distributed.is_gloo_available,
        "nccl": torch.distributed.is_nccl_available,
    }
    there = [x for x, has in ways.items() if torch.distributed.is_available() and has()]
    if ("nccl" if count else "gloo") in there:
        yield Finding("ok", "several ranks", f"by {' and '.join(there)}")
    else:
        yield Finding("note", "several ranks", f"torch {torch.__version__} has no way for them")
    if count or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"):
        yield Finding("ok", "compile=True", "by triton" if count else "by a C++ compiler")
    else:
        yield Finding("note", "compile=True", "needs a C++ compiler on a CPU: install g++")


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _no_gpu(torch_version: str, cuda: str | None) -> Finding:
    """Why there is no GPU, as far as can be said."""
    if not Path("/proc/driver/nvidia/version").exists():
        why = "none found; the quickstart needs none, the 8B configs do"
    elif cuda is None:
        why = (
            f"there is one, and torch {torch_version} is built without CUDA: install its CUDA build"
        )
    else:
        why = "there is one that torch cannot use: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return Finding("note", "GPU", why)


def check_home() -> Iterator[Finding]:
    """Where rows and the quickstart are kept."""
    from mdm_plugin.data.cache import home

    directory = home()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        advice = "name another place by the environment's MDM_PLUGIN_HOME"
        why = f"{directory} cannot be written ({error.strerror}): {advice}"
        yield Finding("wrong", "MDM_PLUGIN_HOME", why)
        return
    free = shutil.disk_usage(directory).free / 1024**3
    yield Finding("ok", "MDM_PLUGIN_HOME", f"{directory}, {free:.0f} GiB free")
    if not list((directory / "quickstart/run").glob("step_*")):
        run = "tune run mdm_full_finetune --config quickstart"
        why = f"not run yet: its configs for other recipes need what it saves: {run}"
        yield Finding("note", "quickstart", why)


def check_commands() -> Iterator[Finding]:
    """Whether ``tune`` is that of this environment."""
    own = sysconfig.get_path("scripts")
    found, advice = shutil.which("tune"), f"activate this environment ({own}), or say mdm"
    if found is None:
        yield Finding("note", "tune", f"not on the PATH: {advice}")
    elif str(Path(found).parent) in (own, sysconfig.get_path("scripts", f"{os.name}_user")):
        yield Finding("ok", "tune", found)
    else:
        yield Finding("note", "tune", f"{found} is of another environment: {advice}")


def report(recipes: Sequence[str]) -> Iterator[Finding]:
    """All findings, the cheap ones first."""
    needs = metadata.metadata(PROJECT)["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    fits = SpecifierSet(needs).contains(version, prereleases=True)
    where = f"{version} ({sys.executable})"
    yield Finding("ok" if fits else "wrong", "python", where if fits else f"{where}: use {needs}")
    yield from check_packages(metadata.requires(PROJECT) or [])
    imported = list(check_recipes(recipes))
    yield from imported
    yield from check_commands()
    if all(finding.state == "ok" for finding in imported):
        yield from check_device()
        yield from check_home()


def main(recipes: Sequence[str]) -> int:
    """Print the report, a line each; 1 if something is wrong that recipes need, else 0."""
    print(f"{PROJECT} {installed(PROJECT) or 'is not installed: pip install it'}")
    try:
        findings = []
        for finding in report(recipes):
            print(finding, flush=True)
            findings.append(finding)
    except ModuleNotFoundError as error:  # packaging, or this project's own metadata
        print(Finding("wrong", str(error.name), "is missing: install this project with pip again"))
        return 1
    wrong = sum(finding.state == "wrong" for finding in findings)
    print(f"{wrong} wrong: see above" if wrong else "the recipes have all that they need")
    return 1 if wrong else 0
