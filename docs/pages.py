"""Pages of the site that are made from the code, when mkdocs builds it (``make docs``).

Recipes with every option, the packaged configs, the API, and each file that a page links to. What
is written by hand are the other files of ``docs/``; their links work in the repository as well.
"""

import ast
import html
import io
import posixpath
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "mdm_plugin"
OPTIONS = PACKAGE / "config/options.py"
# The root's own pages, and where they are in the site.
COPIED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",  # the front page is the README in short
}
MATHS = ("contract", "objectives", "timesteps", "masking", "density", "pareto", "loss")
MATHS += ("variance", "noise", "errors", "doctor")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")


class Option(NamedTuple):
    """A key of a recipe's config, as its source says it."""

    name: str
    type: str
    default: str
    text: str


class Group(NamedTuple):
    """Options that stand together, under what the source says above them."""

    title: str
    options: list[Option]


def comments_of(source: str) -> dict[int, tuple[bool, str]]:
    """Line → (is it alone on its line, what it says)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (alone, token.string.lstrip("# ").strip())
    return found


def default_of(value: ast.expr | None) -> str:
    """A field's default as a config has it; empty where a value must be given."""
    if isinstance(value, ast.Call):
        value = next((x.value for x in value.keywords if x.arg == "default"), None)
    if value is None or ast.unparse(value) == "MISSING":
        return ""
    return ast.unparse(value)


def option_groups(source: str, name: str) -> list[Group]:
    """The fields of an option class, those it derives from first.

    A comment on a field's lines, or right above it, describes it. One after an empty line heads
    the fields below it.
    """
    comments = comments_of(source)
    classes = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.ClassDef)}
    groups = []
    for base in classes[name].bases:
        groups += option_groups(source, ast.unparse(base))
    groups.append(Group("", []))
    lines = source.splitlines()
    for node in classes[name].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while comments.get(first - 1, (False, ""))[0]:
            first -= 1
        above = [comments[i][1] for i in range(first, node.lineno)]
        beside = [comments[i][1] for i in range(node.lineno, node.end_lineno + 1) if i in comments]
        if above and not lines[first - 2].strip():
            groups.append(Group(" ".join(above), []))
            above = []
        text = " ".join(above + beside)
        option = Option(node.target.id, ast.unparse(node.annotation), default_of(node.value), text)
        for group in groups:  # what a base has by this name is another here
            group.options[:] = [x for x in group.options if x.name != option.name]
        groups[-1].options.append(option)
    return [x for x in groups if x.options]


def cell(text: str, code: bool = False) -> str:
    """What may stand in a table."""
    if not code or not text:
        return plain(text).replace("|", "\\|")
    # Within backticks Python-Markdown shows the backslash of an escaped bar too.
    return (
        f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"
    )


def plain(text: str) -> str:
    """A text whose underscores are no emphasis."""
    return text.replace("_", "\\_")


def options_page(recipe: str) -> str:
    """A recipe: what it says of itself, and every option of its class."""
    source = (ROOT / f"recipes/{recipe}.py").read_text()
    text = re.sub(r"``([^`]+)``", r"`\1`", ast.get_docstring(ast.parse(source)) or "")
    found = re.search(r"^@parse\((\w+)\)", source, re.M)
    assert found is not None, f"{recipe} does not say which options it takes"
    page = [f"# {recipe}", text, "## Options", "A key without a default must be given."]
    groups = option_groups(OPTIONS.read_text(), found[1])
    for option in [x for group in groups for x in group.options]:
        kind = option.type.split(" ")[0]
        if f"class {kind}:" in OPTIONS.read_text():  # its own keys
            inner = [x for group in option_groups(OPTIONS.read_text(), kind) for x in group.options]
            groups.append(Group(f"Within {option.name}", inner))
    for group in groups:
        page += [f"**{plain(group.title)}**"] if group.title else []
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        for x in group.options:
            name, kind, default = (cell(part, code=True) for part in x[:3])
            rows.append(f"| {name} | {kind} | {default} | {cell(x.text)} |")
        page.append("\n".join(rows))
    return "\n\n".join(page) + "\n"


def verbatim(file: Path) -> str:
    """A file as it is, in a block that nothing in it ends."""
    text = file.read_text()
    fence = "`" * max(3, *(len(x) + 1 for x in re.findall(r"`+", text) or [""]))
    kind = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}.get(file.suffix, "")
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}\n"


def configs_page() -> str:
    """All packaged configs."""
    page = ["# Packaged configs", "`mdm cp NAME my.yaml` copies one, to be changed.\n"]
    for file in sorted((ROOT / "configs").rglob("*.yaml"), key=lambda x: (len(x.parts), x)):
        name = file.relative_to(ROOT / "configs").with_suffix("").as_posix()
        page += [f"## {name}", verbatim(file)]
    return "\n\n".join(page)


def defines(module: str, name: str) -> bool:
    """Whether one of our modules defines a name, rather than passing another's on."""
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    return bool(re.search(rf"^((class|def) {name}\b|{name}\b.*=)", text, re.M))


def public_names(room: Path) -> dict[str, str | None]:
    """Name → dotted path of what a room offers; None for what is another package's."""
    tree = ast.parse((room / "__init__.py").read_text())
    offers = any(
        isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__" for x in tree.body
    )
    return {
        name.name: f"{node.module}.{name.name}" if defines(node.module or "", name.name) else None
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and offers
        for name in node.names
    }


def modules_of(room: Path) -> list[str]:
    """Dotted names of a room's files."""
    files = sorted(x for x in room.glob("*.py") if x.stem != "__init__")
    return [f"mdm_plugin.{room.name}.{x.stem}" for x in files]


def api_page(room: Path) -> str:
    """A room: what it says of itself, the names it offers, and each of its files."""
    page = [f"# mdm_plugin.{room.name}"]
    page.append(ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or "")
    if names := public_names(room):
        shown = sorted(names.items())
        links = ", ".join(
            f"[`{x}`][{path}]" if path else f"`{x}` (torchtune's)" for x, path in shown
        )
        page.append(f"Importable from `mdm_plugin.{room.name}`: {links}.")
    page += [f"::: {name}\n    options:\n      heading_level: 2" for name in modules_of(room)]
    return "\n\n".join(page) + "\n"


def rooms() -> list[Path]:
    """The package's folders that hold code."""
    return sorted(x.parent for x in PACKAGE.glob("*/__init__.py"))


def recipes() -> list[str]:
    """Names of the recipes."""
    return sorted(x.stem for x in (ROOT / "recipes").glob("mdm_*.py"))


def generated() -> dict[str, Callable[[], str]]:
    """Place in the site → what makes the page, in the order of the navigation."""
    pages: dict[str, Callable[[], str]] = {}
    for recipe in recipes():
        pages[f"reference/recipes/{recipe}.md"] = lambda name=recipe: options_page(name)
    pages["reference/configs.md"] = configs_page
    for name in MATHS:
        pages[f"reference/api/{name}.md"] = lambda name=name: (
            f"::: mdm_plugin.{name}\n    options:\n      heading_level: 1\n"
        )
    for room in rooms():
        pages[f"reference/api/{room.name}.md"] = lambda room=room: api_page(room)
    return pages


def linked(text: str, origin: str) -> Iterator[tuple[str, str]]:
    """(link, path from the root) of the relative links of a page that lies at ``origin``."""
    for link in LINK.findall(text):
        yield link, posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def place(path: str) -> str | None:
    """Where a file of the repository is in the site; None if it is not there."""
    if path in COPIED:
        return COPIED[path]
    if path.startswith("docs/") and Path(path).suffix in (".md", ".png"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if (ROOT / path).is_file() else None


def rewritten(text: str, origin: str, here: str) -> str:
    """A page with its links to the repository's files as links within the site."""
    places = {link: place(path) for link, path in linked(text, origin)}

    def there(found: re.Match[str]) -> str:
        target = places[found[1]]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") if target else found[1]

    return LINK.sub(there, text)


def named_pages(text: str) -> str:
    """A page of ``docs/`` whose mentions of another's file are links."""
    return re.sub(r"(?<!\[)`docs/([\w-]+\.md)`", r"[`docs/\1`](\1)", text)


# What mkdocs calls.


def on_config(config: Any) -> Any:
    """The version on each page; the generated pages in the navigation, under Reference."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    config.copyright = f"{project['name']} {project['version']}, {project['license']}"
    config.site_name += f" {project['version']}"
    pages = list(generated())
    api = [x for x in pages if x.startswith("reference/api/")]
    for part in config.nav:
        if "Reference" in part:
            part["Reference"] = [
                {"Recipes": [x for x in pages if x.startswith("reference/recipes/")]},
                {"Configs": "reference/configs.md"},
                {"API": [{x.split("/")[-1].removesuffix(".md"): x} for x in api]},
            ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds what is made from the code, the root's pages, and what a page links to."""
    from mkdocs.structure.files import File

    texts = {
        x.src_uri: ("docs/" + x.src_uri, x.content_string) for x in files.documentation_pages()
    }
    for path, uri in COPIED.items():
        if uri not in texts:
            texts[uri] = (path, (ROOT / path).read_text())
            text = rewritten(texts[uri][1], path, uri)
            files.append(File.generated(config, uri, content=text))
    for uri, make in generated().items():
        files.append(File.generated(config, uri, content=make()))
    paths = {path for origin, text in texts.values() for _, path in linked(text, origin)}
    for path in sorted(paths):
        uri = place(path) or ""
        if uri.startswith("source/"):
            text = f"# {path}\n\n{verbatim(ROOT / path)}"
            files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the pages of ``docs/`` to files outside of it."""
    uri = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return rewritten(named_pages(markdown), f"docs/{uri}", uri)
