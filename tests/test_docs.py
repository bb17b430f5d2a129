"""The pages: links, plain sentences, every option, CONTRIBUTING's worked changes, and the site."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from omegaconf import MISSING

import mdm_plugin
from mdm_plugin.cli import RECIPES
from mdm_plugin.config import options
from mdm_plugin.config.loading import load_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("*.md"))
PLAIN = ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/8b.md", "docs/cpu.md"]
PLAIN += ["docs/one-gpu.md", "docs/slurm.md", "docs/moving.md", "docs/data.md"]
CLASSES = [options.Options, options.VarianceOptions, options.GenerateOptions, options.EvalOptions]


def without_code(text: str) -> str:
    """A page's text, but for blocks of code, those that are indented as well."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in found}


def broken(text: str, directory: Path) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(text))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link) or not path:
            continue
        target = directory / path
        if not target.is_file() or (anchor and anchor not in headings(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda x: x.name)
def test_every_relative_link_and_image_leads_to_a_file(page):
    text = page.read_text()
    assert broken(text, page.parent) == []
    own = re.findall(r"\]\(#([^)]+)\)", without_code(text))
    assert set(own) <= headings(page)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# A title, here\n")
    text = "[a](there.md#a-title-here) [b](gone.md) ![c](gone.png) [d](there.md#gone) `[e](code)`"
    assert broken(text, tmp_path) == ["gone.md", "gone.png", "there.md#gone"]


def test_the_version_is_the_same_wherever_it_stands():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mdm_plugin.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version


@pytest.mark.parametrize("page", PAGES, ids=lambda x: x.name)
def test_pages_read_the_same_on_github_and_on_the_site(page):
    """Python-Markdown wants an empty line before a list, and four spaces for what is in an item."""
    before = ""
    for line in without_code(page.read_text()).splitlines():
        starts = re.match(r"(- |\d+\. )", line)
        assert not starts or not before or re.match(r"(- |\d+\. |  )", before), line
        assert before or not re.match(r" {1,3}\S", line), line
        before = line


def sentences(text: str) -> list[str]:
    """Sentences of a page's prose; an item, a heading and a cell end one."""
    text = re.sub(r"^---.*?^---$|<!--.*?-->", "", without_code(text), flags=re.M | re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    parts = re.split(r"\n\s*\n|^\s*(?:[-#]+|\d+\.) |\||(?<=[.!?])[*)]*\s", text, flags=re.M)
    return [" ".join(x.split()) for x in parts if x.strip()]


@pytest.mark.parametrize("page", PLAIN)
def test_no_sentence_of_the_first_pages_has_more_than_35_words(page):
    for sentence in sentences((ROOT / page).read_text()):
        words = re.findall(r"\w[\w'’.\-]*", sentence)
        assert len(words) <= 35, sentence


def test_what_moving_names_on_our_side_are_options():
    """Each key=value and key of the tables' second column, in the config that it is for."""
    cells = re.findall(r"^\| .+? \| (.+) \|$", (ROOT / "docs/moving.md").read_text(), re.M)
    words = [x for code in re.findall(r"`([^`]+)`", " ".join(cells)) for x in code.split()]
    given = [x for x in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", x)]
    assert len(given) > 10
    load_config("llada/8B_lora", given, options.Options)
    known = {x.name for cls in CLASSES for x in dataclasses.fields(cls)} | {"checkpoint_dir"}
    keys = [x for x in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", x)]
    commands = {"tune", "run", "download", "qlora", "from_autoregressive", *RECIPES}
    commands |= {"response", "mix"}  # a value, and a word of the text
    assert len(keys) > 20 and {x.split(".")[0] for x in keys} - commands <= known


SITE = runpy.run_path(str(ROOT / "docs/pages.py"))


def shown(name: str) -> dict[str, tuple]:
    groups = SITE["option_groups"]((ROOT / "mdm_plugin/config/options.py").read_text(), name)
    return {x.name: x for group in groups for x in group.options}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda x: x.__name__)
def test_the_reference_lists_each_option_with_its_default_and_what_it_is(cls):
    found = shown(cls.__name__)
    fields = {x.name: x for x in dataclasses.fields(cls)}
    assert list(found) == list(fields)
    for name, option in found.items():
        default = fields[name].default
        assert option.default == ("" if default == MISSING else repr(default)), name
        assert eval(option.type, vars(options)) == fields[name].type, name
        assert option.text, f"{name} has no comment in options.py"


@pytest.mark.parametrize("recipe", SITE["recipes"]())
def test_a_recipe_s_page_has_the_options_of_its_class(recipe):
    assert recipe in RECIPES and len(SITE["recipes"]()) == len(RECIPES)
    page = SITE["options_page"](recipe)
    cls = {"mdm_variance": CLASSES[1], "mdm_generate": CLASSES[2], "mdm_eval": CLASSES[3]}
    for field in dataclasses.fields(cls.get(recipe, CLASSES[0])):
        assert f"\n| `{field.name}` | " in page
    within = options.PolicyNoise if recipe == "mdm_variance" else None
    assert ("**Within policy**" in page) == (within is not None)
    for field in dataclasses.fields(within) if within else ():
        assert f"\n| `{field.name}` | " in page.partition("**Within policy**")[2]
    assert all(len(re.findall(r"(?<!\\)\|", x)) == 5 for x in page.splitlines() if x[:1] == "|")


def test_every_packaged_config_is_in_the_gallery_as_it_is():
    page = SITE["configs_page"]()
    files = list((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert f"```yaml\n{file.read_text().rstrip()}\n```" in page


def test_bars_and_underscores_are_shown_as_they_are():
    assert SITE["cell"]("a | None", code=True) == "<code>a &#124; None</code>"
    assert SITE["cell"]("a_b", code=True) == "`a_b`"
    assert SITE["cell"]("the _component_ | b") == r"the \_component\_ \| b"


INTERNAL = {"cli", "quiet", "torchtune_internals"}  # commands, and what only our code uses


def test_every_module_has_its_place_in_the_api():
    """And so every public name: mkdocstrings shows all of a module; the built site is checked."""
    places = {x: make() for x, make in SITE["generated"]().items() if "/api/" in x}
    shown = set(re.findall(r"^::: (\S+)", "\n".join(places.values()), re.M))
    files = (ROOT / "mdm_plugin").rglob("*.py")
    parts = [x.relative_to(ROOT).with_suffix("").parts for x in files if x.stem != "__init__"]
    assert {".".join(x) for x in parts if x[1] not in INTERNAL} == shown
    for name in ("doctor", "generation.replay", "training.step", "training.probe"):
        assert f"mdm_plugin.{name}" in shown


def test_a_version_of_the_site_is_put_beside_the_others():
    """mike's: the pages name it, the extra installs it, and the Makefile calls it."""
    assert "version: {provider: mike, default: latest}" in (ROOT / "mkdocs.yml").read_text()
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = facts["project"]["optional-dependencies"]["docs"]
    assert any(x.startswith("mike>=") for x in extra)
    for given, version in (([], mdm_plugin.__version__), (["VERSION=1.2.3"], "1.2.3")):
        words = ["make", "--dry-run", "docs-version", *given]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        built, deployed = shown.index("mkdocs build --strict"), shown.index("mike deploy")
        assert built < deployed
        assert f"mike deploy --update-aliases {version} latest\n" in shown
        assert "mike set-default latest" in shown


def test_links_out_of_docs_are_pages_of_the_site():
    text = "[a](../mdm_plugin/loss.py) [b](../CONTRIBUTING.md#set-up) [c](8b.md) [d](gone.md)"
    assert SITE["rewritten"](text, "docs/x.md", "x.md") == (
        "[a](source/mdm_plugin/loss.py.md) [b](contributing.md#set-up) [c](8b.md) [d](gone.md)"
    )
    assert SITE["named_pages"]("`docs/8b.md` `x`") == "[`docs/8b.md`](8b.md) `x`"
    assert SITE["rewritten"]("[a](docs/8b.md)", "CHANGELOG.md", "a/b.md") == "[a](../8b.md)"


FIGURES = runpy.run_path(str(ROOT / "docs/figures.py"))


def test_the_figures_are_of_the_masks_themselves_and_of_what_was_measured():
    """``python docs/figures.py``, but for the files; facts that any such measurement must have."""
    views, masks = FIGURES["views"], FIGURES["MASKS"]
    assert not views(masks["Mirror"], 0.25).all(0).any()  # a pair of light masks is disjoint
    assert views(masks["Complement"], 0.25).any(0).all()
    assert views(masks["Rotation(4)"], 0.25).sum(0).float().mean() == pytest.approx(1, abs=0.05)
    assert views(masks["FixedCount"], 0.25).sum() == 7  # ⌊0.25·24⌋ + 1
    kept = json.loads(FIGURES["MEASURED"].read_text())
    for state in kept["stream"].values():
        knots, values = (torch.tensor(state[x]) for x in ("knots", "values"))
        assert torch.trapezoid(values, knots) == pytest.approx(1, abs=1e-6)
        assert values.min() >= 0.2 - 1e-6  # mix
    for lines in kept["parts"].values():
        whole = {name: sum(x[part] for part in FIGURES["PARTS"]) for name, x in lines.items()}
        assert whole["Standard"] == pytest.approx(1, abs=1e-3)
        assert whole["Complement"] < whole["FixedCount"] < 1  # at equal rows
        for name, x in lines.items():
            assert x["interval"][0] - 1e-3 <= whole[name] <= x["interval"][1] + 1e-3
            assert x["AB"] == 0 or x["A"] == x["B"] == 0
    for draw, name in (
        ("masks", None),
        ("blocks", None),
        ("densities", "stream"),
        ("parts", "parts"),
    ):
        assert FIGURES[f"draw_{draw}"](*([kept[name]] if name else [])).axes
        assert (ROOT / f"docs/{draw}.png").is_file()


# CONTRIBUTING's worked changes.


def changes(text: str) -> list[tuple[str, str, str]]:
    """(file, lines before, lines after) of each place that the page changes."""
    found = []
    for part in re.split(
        r"^\+\+\+ ", "\n".join(re.findall(r"```diff\n(.*?)```", text, re.S)), flags=re.M
    ):
        file, *places = re.split(r"^@@$\n?", part, flags=re.M)
        for place in places:
            lines = place.strip("\n").splitlines()
            before = "\n".join(x[1:] for x in lines if x[:1] != "+")
            found.append((file.strip(), before, "\n".join(x[1:] for x in lines)))
    return found


@pytest.mark.slow
def test_a_mask_and_a_verifier_are_added_as_contributing_says(tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    added = [x for x in re.findall(r"^\+(?!\+\+)(.*)$", text, re.M) if x.strip()]
    assert 20 < len(added) <= 40
    for name in ("mdm_plugin", "tests", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, before, after in changes(text):
        file = tmp_path / name
        if not before:
            assert not file.exists()
            file.write_text(after + "\n")
            continue
        old = file.read_text()
        assert old.count("\n" + before + "\n") == 1, f"{name}: {before}"
        file.write_text(old.replace("\n" + before + "\n", "\n" + after + "\n"))
    tests = ["tests/test_estimators.py", "tests/evaluation/test_numbers.py"]
    files = [*tests, "tests/toy.py", "mdm_plugin/masking.py", "mdm_plugin/evaluation/numbers.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("ruff", "check", *files)
    run("ruff", "format", "--check", *files)
    run("mypy", "--follow-imports=skip", *files[3:])
    out = run(
        "pytest", "-n", "0", "-q", *tests, "-k", "ParetoOptimal-BothEnds or last_number_decides"
    )
    assert int(re.findall(r"(\d+) passed", out)[0]) == 4  # three lengths of rows, and the verifier


# The site.


class Loaded(HTMLParser):
    """What a page makes a browser load, what it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {k: v or "" for k, v in attrs}
        self.ids |= {values[x] for x in ("id", "name") if x in values}
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href", ""))
        self.loads += [values[x] for x in ("src", "data", "poster") if x in values]
        self.loads += [x.split()[0] for x in values.get("srcset", "").split(",") if x.strip()]
        self.loads += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style", ""))


def outside(url: str) -> bool:
    return bool(urlsplit(url).netloc)


def test_what_a_page_would_load_is_seen():
    page = Loaded(
        '<link rel="preconnect" href="https://a/"><link rel="canonical" href="https://b/">'
        '<script src="//c/x.js"></script><img srcset="x.png 1x, https://d/y.png 2x">'
        '<p style="background: url(https://e/z.png)"><a href="https://f/">f</a>'
    )
    assert [x for x in page.loads if outside(x)] == [
        "https://a/",
        "//c/x.js",
        "https://d/y.png",
        "https://e/z.png",
    ]
    assert page.links == ["https://f/"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Page → what is in it, of the site as ``make docs`` builds it."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs installs it")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    # No network: a plugin that would fetch something fails.
    proxy = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://[::1]:9"
    )
    environment = {**os.environ, **proxy}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {x: Loaded(x.read_text()) for x in directory.rglob("*.html")}, directory


@pytest.mark.slow
def test_the_site_is_built_strictly_and_loads_nothing_from_the_network(site):
    pages, directory = site
    assert len(pages) > 30
    for file, page in pages.items():
        assert not [x for x in page.loads if outside(x)], file
        for url in page.loads + page.links:
            parts = urlsplit(url)
            if parts.scheme or not parts.path:
                continue
            target = (file.parent / unquote(parts.path)).resolve()
            assert target.is_file() or file.name == "404.html", f"{file.name}: {url}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{file.name}: {url}"
    for file in directory.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*['\"]?(https?:|//)", file.read_text())
        assert not found, file


@pytest.mark.slow
def test_every_public_name_has_its_place_on_the_site(site):
    pages, directory = site
    ids = set().union(*(page.ids for page in pages.values()))
    names = [f"mdm_plugin.{x}" for x in SITE["MATHS"]]
    for room in SITE["rooms"]():
        names += SITE["modules_of"](room)
        names += [x for x in SITE["public_names"](room).values() if x]
    assert len(names) > 100 and set(names) <= ids, set(names) - ids
    for name in SITE["generated"]():
        assert (directory / name).with_suffix(".html").is_file(), name
