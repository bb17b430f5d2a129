"""The rooms: which may import which, and what is used of torchtune in one place alone."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mdm_plugin"
MATHS = ["noise", "density", "loss", "contract", "pareto"]
MATHS += ["objectives", "timesteps", "masking", "variance"]
# From below to above: each may import those before it, and itself.
FLOORS = [
    ["errors", "quiet", "torchtune_internals", *MATHS],
    ["config"],
    ["models"],
    ["data"],
    ["distributed"],
    ["checkpoint"],
    ["training"],
    ["generation"],
    ["evaluation"],
    ["alignment"],
    ["quickstart"],
    ["titan"],
    ["doctor"],
    ["cli"],
]
# Rooms that stand beside each other, or below with less than their floor.
MAY = {
    "config": ["errors", "torchtune_internals"],
    "models": ["errors", "torchtune_internals", "loss"],
    "data": ["errors", "noise", "models"],
    "distributed": ["errors", "noise", "models"],
    "checkpoint": ["errors", "config", "models", "distributed"],
    "generation": ["errors", "noise", "models"],
    "cli": ["config", "torchtune_internals", "doctor"],
    "doctor": ["training", "data"],
    "errors": [],
    "quiet": [],
    "torchtune_internals": [],
    **dict.fromkeys(MATHS, MATHS),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(file: Path) -> list[str]:
    """Dotted names of what a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def allowed(name: str) -> list[str]:
    if name in MAY:
        return [name, *MAY[name]]
    floor = next(i for i, rooms in enumerate(FLOORS) if name in rooms)
    return [x for rooms in FLOORS[: floor + 1] for x in rooms]


@pytest.mark.parametrize("file", FILES, ids=lambda x: str(x.relative_to(PACKAGE)))
def test_arrows_go_one_way(file):
    if file == PACKAGE / "__init__.py":
        assert not imported(file)
        return
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "mdm_plugin" and parts[1] not in allowed(room(file)):
            # A version is no part of a room.
            assert parts[1] == "__version__", f"{file}: {room(file)} imports {name}"


def test_no_room_is_above_itself():
    """Of the allowed arrows between rooms none goes back."""
    rooms = {room(file) for file in FILES} - {"__init__", *MATHS}
    for name in rooms:
        for other in set(allowed(name)) - {name, *MATHS}:
            assert name not in allowed(other), f"{name} and {other}"


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_needs_torch_and_scipy_alone(name):
    for found in imported(PACKAGE / f"{name}.py"):
        top = found.split(".")[0]
        assert top in ("torch", "scipy", "numpy", "mdm_plugin", "typing", "collections", "hashlib")


@pytest.mark.parametrize("file", FILES, ids=lambda x: str(x.relative_to(PACKAGE)))
def test_torchtune_s_private_names_are_in_one_file_and_torchtitan_in_its_room(file):
    names = imported(file)
    if file.name != "torchtune_internals.py":
        private = [x for x in names if x.startswith("torchtune.") and "._" in x]
        assert not private, private
        tree = ast.walk(ast.parse(file.read_text()))
        attributes = {x.attr for x in tree if isinstance(x, ast.Attribute)}
        assert not attributes & {"_attention_call", "_writer", "_parser"}
    if room(file) != "titan":
        assert not [x for x in names if x.startswith("torchtitan")]


def test_each_room_says_what_lives_in_it_and_what_it_may_import():
    rooms = [x for x in PACKAGE.iterdir() if (x / "__init__.py").is_file() and x.name != "configs"]
    assert len(rooms) == 11
    for directory in rooms:
        text = ast.get_docstring(ast.parse((directory / "__init__.py").read_text()))
        assert "May import: " in text, directory
        if directory.name in MAY:
            for other in MAY[directory.name]:
                assert other in text, f"{directory.name}: {other} is not named"


PROTOCOLS = {  # file → why it looks for a name all the same
    "config/components.py": "the home of any callable, to check it against the allow-list",
    "distributed/world.py": "a private name of torch's DeviceMesh, which later releases may drop",
    "training/memory.py": "the parts of an NF4 tensor, by torch's own __tensor_flatten__",
    "titan/compat.py": "what torchtitan's nightly torch has and this one may not",
    "titan/data.py": "a dotted path's last name",
}


def test_nothing_is_offered_by_hasattr():
    found = {
        str(file.relative_to(PACKAGE))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
    }
    assert found == set(PROTOCOLS)
    for file in (ROOT / "recipes").glob("*.py"):
        assert "hasattr(" not in file.read_text() and "getattr(" not in file.read_text()


def sizes(node: ast.FunctionDef) -> tuple[int, int]:
    """Lines and parameters, self apart."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = len([x for x in arguments if x.arg not in ("self", "cls")])
    return (node.end_lineno or 0) - node.lineno + 1, count


# Builders that a config calls: their parameters are the config's keys, flat as in torchtune's own.
BUILDERS = {"chat_dataset", "instruct_dataset", "text_dataset", "preference_dataset"}
BUILDERS |= {"llada", "dream", "qwen3", "lora_qwen3", "lora_sdar_4b"}


@pytest.mark.parametrize("file", FILES, ids=lambda x: str(x.relative_to(PACKAGE)))
def test_files_and_functions_can_be_read_in_one_sitting(file):
    text = file.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines, count = sizes(node)
            assert lines <= 60, node.name
            assert count <= 8 or node.name in BUILDERS, node.name


def test_the_page_of_the_rooms_names_what_is_there():
    """Each file that docs/architecture.md names is there; each room is in its table and figure."""
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = [x.name for x in PACKAGE.iterdir() if (x / "__init__.py").is_file()]
    drawn = (ROOT / "docs/rooms.py").read_text()
    for name in rooms:
        assert f"`{name}/`" in text and f'"{name}": (' in drawn
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        places = [ROOT / name, PACKAGE / name, *PACKAGE.glob(f"*/{name}")]
        assert any(x.is_file() for x in places), name
    numbers = [re.findall(r"^(\d)\. ", part, re.M) for part in text.split("## ")]
    assert [x[-1] for x in numbers if x] == ["7", "7"]  # stops of a row, and of a checkpoint


def test_the_figure_of_the_rooms_can_be_drawn_and_every_arrow_goes_down():
    """``python docs/rooms.py``, but for the file."""
    page = runpy.run_path(str(ROOT / "docs/rooms.py"))
    drawn = page["reduced"](page["arrows"]())
    assert len(drawn) > 10 and {"evaluation", "data", "the maths"} <= {b for _, b in drawn}
    for start, end in drawn:
        assert page["ROOMS"][start][1] > page["ROOMS"][end][1], (start, end)
    assert page["draw"]().axes
