"""Every command of the pages is run as it stands there, with sizes cut; or it says what it needs.

An 8B model is a directory of that layout at a small size, eight GPUs are two ranks on a CPU, and
the quickstart takes two steps. What measures for minutes (benchmarks/) has its arguments read.
"""

import argparse
import contextlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mdm_plugin import cli
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from tests import forks
from tests.checkpoints import HEAD_DIM, oracle, write, write_tokenizer
from tests.commands import MARKS, PAGES, ROOT, blocks, commands
from tests.config.test_config import OPTIONS
from tests.conftest import scalars
from tests.test_journey import FAMILIES as BIDIRECTIONAL
from tests.test_journey import SHORT, SMALL

pytestmark = pytest.mark.slow
FAMILIES = {
    **BIDIRECTIONAL,
    "sdar": ("sdar/4B", "mdm_plugin.models.{}qwen3"),
    "Fast_dLLM_Qwen": ("fast_dllm/7B", "mdm_plugin.models.{}dream"),
}
QUICKSTART = ("prepare=null", "epochs=1", "max_steps_per_epoch=2", "run_val_every_n_steps=null")
VARIANCE = [
    "prepare=null",
    "batches=2",
    "batches_per_round=2",
    "batch_size=4",
    "autoregressive=null",
]
PLACES = ("output_dir=", "dataset.source=my.jsonl", "dataset.source=/")
TASKS = ("draws=2", "max_new_tokens=8")
# What a page has the user write.
FILES = {"my_methods.py": "adding-a-method.md", "my_model.py": "own-model.md"}
FILES["my_sampler.py"] = "own-sampler.md"
LAUNCH = {
    "docs/launch/tune.sh": ["tune", "run", "--nnodes=2"],
    "docs/launch/titan.sh": ["titan"],
}
FOUND = {}
for _page in PAGES:
    for _command in commands(_page):
        FOUND.setdefault(" ".join(_command.words), _command)
RUN = {x: command for x, command in FOUND.items() if not command.needs}


def test_a_command_of_a_block_is_seen_with_its_mark():
    text = (
        "A `make x` of text.\n\n    tune run a \\\n        b=1   # why\n    mdm ls\n\n"
        "<!-- needs: network -->\n\n    pip install x\n\n"
        "```bash\nmake y\n```\n```yaml\nno: 1\n```\n"
    )
    found = [(x.strip(), y) for x, y in blocks(text)]
    assert found == [
        ("make y", ""),
        ("tune run a \\\n        b=1   # why\n    mdm ls", ""),
        ("pip install x", "network"),
    ]


def test_marks_are_of_a_closed_set():
    said = {x for page in PAGES for x in re.findall(r"<!-- needs: (.*?) -->", page.read_text())}
    assert said <= MARKS, said
    assert sum(x.block for x in RUN.values()) > 40
    # A mark that nothing is behind would hide what is written there later.
    for page in PAGES:
        marked = [x for x in commands(page) if x.needs]
        assert len(marked) >= len(re.findall("<!-- needs", page.read_text())), page


@pytest.mark.parametrize("text", [x for x in FOUND if x.startswith("make ")])
def test_make_knows_the_target(text):
    words = ["make", "-n", "-C", ROOT, *text.split()[1:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def machine(data_dir, tmp_path_factory):
    """A user's directory: rows, the quickstart trained, an 8B model of each family and its runs."""
    place = tmp_path_factory.mktemp("machine")
    home = place / "home/quickstart"
    shutil.copytree(data_dir, home)
    rows = (data_dir / "val.jsonl").read_text().splitlines(keepends=True)
    for file, count in (("train.jsonl", 128), ("val.jsonl", 8), ("test.jsonl", 8)):
        (home / file).write_text("".join(rows[:count]))
    for name, count in (
        ("my", 64),
        ("questions", 4),
        ("test", 8),
        ("shared/my", 32),
        ("data/train", 32),
    ):
        file = place / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(rows[:count]))
    pairs = [json.dumps({"input": "7 - 2 =", "output": "5"}) + "\n"] * 64
    (place / "texts.jsonl").write_text("".join(pairs))
    texts = [turn["content"] for row in map(json.loads, rows) for turn in row["messages"]]
    for family in FAMILIES:
        base = place / family
        write(oracle(family, dtype=torch.bfloat16, vocab_size=640), base, family)
        write_tokenizer(base, family, texts, data_dir)
    for name, page in FILES.items():
        parts = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
        (place / name).write_text("".join(parts))

    def trained(recipe: str, config: str, out: str, name: str) -> None:
        made = tune(
            f"tune run {recipe} --config {config} output_dir={place / out}".split(), place, new=True
        )
        made.rename(made.parent / name)

    trained(
        "mdm_full_finetune", "quickstart_pretrain", "pretraining", "../home/quickstart/pretrained"
    )
    trained(
        "mdm_full_finetune",
        "quickstart_autoregressive",
        "autoregression",
        "../home/quickstart/autoregressive",
    )
    trained("mdm_full_finetune", "quickstart", "home/quickstart/run", "step_1840")
    trained("mdm_full_finetune", "quickstart_block", "home/quickstart/block", "step_460")
    shutil.copytree(home / "block/step_460", home / "block/step_690")
    shutil.copytree(home / "run/step_1840", place / "runs/step_1000")
    trained("mdm_full_finetune", "llada/8B_full", "LLaDA-8B-Instruct-full", "step_1000")
    trained("mdm_lora_finetune", "llada/8B_lora", "LLaDA-8B-Instruct-lora", "step_1000")
    evaluate = f"tune run mdm_eval --config quickstart_eval output_dir={place / 'before'}"
    shutil.copytree(tune(evaluate.split(), place, new=True), place / "after")
    return place


def variance(config: str) -> list[str]:
    """Of mdm_variance. P-POTS probes with 2,000 forwards each; two estimators are enough."""
    file = ROOT / f"configs/{config}.yaml"
    names = yaml.safe_load(file.read_text())["estimators"] if file.is_file() else {}
    return [*VARIANCE, *(f"~estimators.{x}" for x in names if x not in ("Standard", "FixedCount"))]


def cut(recipe: str, config: str, given: list[str], place: Path) -> list[str]:
    """Overrides that make a command small."""
    of = [x for x, (name, *_) in FAMILIES.items() if config.startswith(name.split("/")[0] + "/")]
    if of:
        family, in_blocks = of[0], of[0] not in BIDIRECTIONAL
        kind = "lora_" if recipe == "mdm_lora_finetune" else ""
        cuts = [*SMALL, f"model={FAMILIES[family][1].format(kind)}", "model.max_seq_len=160"]
        cuts += ["model.num_kv_heads=4"] if family != "llada" else []
        cuts += [f"model.head_dim={HEAD_DIM}"] if family == "sdar" else []
        cuts += ["model.block_length=8"] if family == "Fast_dLLM_Qwen" else []
        if not any(x.startswith("checkpoint_dir=") for x in given):
            cuts.append(f"checkpoint_dir={place / family}")
        if recipe.endswith("finetune"):
            other = any(x.startswith("timesteps=") and "Pareto" not in x for x in given)
            other = other or in_blocks  # whose configs have no probe
            cuts += [x for x in SHORT if not (other and x.startswith("timesteps."))]
            cuts += ["epochs=1", "max_steps_per_epoch=1", "compile=False"]
            cuts += ["save_every_n_steps=null", "dataset_val.max_rows=4", "val_draws=2"]
        elif recipe == "mdm_eval":
            cuts += ["tokenizer.max_seq_len=160", "draws=2"]
        else:
            cuts += ["max_new_tokens=32", "decoding.block_length=16"]
        return cuts
    cuts = {"mdm_eval": TASKS, "mdm_generate": ()}.get(recipe, QUICKSTART)
    if recipe == "mdm_variance":
        cuts = variance(config)
    probed = any("Pareto" in x for x in given)
    return [*cuts, *(x for x in SHORT if probed and x.startswith("timesteps."))]


run_already: set[tuple] = set()


def tune(words: list[str], place: Path, new: bool = False) -> Path:
    """Run ``tune run …`` with its sizes cut, in ``place``; what it has made.

    Several GPUs are two ranks here: torchrun's own parser reads what it would be given. ``new``:
    run it, whether or not one to the same effect has been.
    """
    from torch.distributed.run import get_args_parser

    at = next(i for i, x in enumerate(words) if x.startswith("mdm_"))
    launch, recipe, (flag, config, *given) = words[2:at], words[at], words[at + 1 :]
    assert words[1] == "run" and flag == "--config" and recipe in cli.RECIPES
    get_args_parser().parse_args([*launch, recipe])
    ranks = ("--nproc_per_node", "2") if "--nproc_per_node" in launch else ()
    if config == "my.yaml":
        packaged = {"mdm_eval": "quickstart_eval"}.get(recipe, "quickstart")
        shutil.copy(ROOT / f"configs/{packaged}.yaml", place / config)
    if recipe in ("mdm_dpo", "mdm_grpo") or config.endswith(("dpo_variance", "grpo_variance")):
        # tests/test_journey_alignment.py and tests/recipes/ run them, so cut.
        load_config(config, given, OPTIONS[recipe])
        return place
    # What was run before, from another file or to another place, is read alone.
    effect = (ranks, recipe, *[x for x in (config, *given) if not x.startswith(PLACES)])
    if effect in run_already and not new:
        file = str(place / config) if config == "my.yaml" else config
        load_config(file, given, OPTIONS.get(recipe, Options))
        return place
    run_already.add(effect)
    outputs = [x.partition("=")[2] for x in given if x.startswith("output_dir=")]
    out = place / (outputs[0] if outputs else "made")
    if recipe != "mdm_generate":
        given = [*given, f"output_dir={out}"]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "MDM_PLUGIN_HOME": str(place / "home")}
    words = ["run", *ranks, recipe, "--config", config, *given, *cut(recipe, config, given, place)]
    done = forks.command(["tune", *words], place, env, 200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name, value in (x.split("=", 1) for x in given):
        assert name not in ("output", "replay") or (place / value).is_file(), name
    if any(x.startswith("dry_run") for x in given):
        assert re.search("^Fits: ", done.stdout, re.M) and not out.exists()
    elif recipe.endswith("finetune"):
        return next(out.glob("step_*"))
    elif recipe == "mdm_generate":
        assert not any(x.startswith("prompt=") for x in given) or '"prompt": ' in done.stdout
    else:
        assert (out / f"{'variance' if recipe == 'mdm_variance' else 'results'}.json").is_file()
    return out


def in_process(module: str, words: list[str], monkeypatch) -> None:
    """``python -m module words`` or ``python file words``."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.delitem(sys.modules, module, raising=False)  # or runpy warns
    if module.endswith(".py"):
        runpy.run_path(str(ROOT / module), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__")


class Read(Exception):
    """A command line was taken."""


def only_read(module: str, words: list[str], monkeypatch) -> None:
    """The same up to where its arguments are read."""
    parse = argparse.ArgumentParser.parse_known_args

    def read(parser, *args, **kwargs):
        _, unknown = parse(parser, *args, **kwargs)
        assert not unknown
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", read)
    with pytest.raises(Read):
        in_process(module, words, monkeypatch)


def python(words: list[str], monkeypatch) -> None:
    """What follows ``python``."""
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if module == "pytest":
        for file in (x for x in rest if x.startswith("tests/")):
            assert (ROOT / file).is_file()
    elif module.startswith("docs/") and module != "docs/screenshots.py":
        assert (ROOT / module).is_file()  # figures: each is drawn by a test of its own
    elif module.startswith(("benchmarks", "docs/")):
        only_read(module, rest, monkeypatch)
    else:
        in_process(module, rest, monkeypatch)


def simple(text: str) -> bool:
    """Not torchtitan's, nor make's."""
    return launched(RUN[text].words)[0] not in ("torchrun", "titan", "make")


def launched(words: list[str]) -> list[str]:
    """A job on several nodes as the command that each node runs."""
    if words[0] == "sbatch":
        at = words.index("docs/launch/mdm.sbatch")
        assert (ROOT / words[at]).is_file()
        words = words[at + 1 :]
    for script, program in LAUNCH.items():
        if words[0] == script:
            assert (ROOT / script).is_file()
            words = [*program, *words[1:]]
    return words


@pytest.mark.parametrize("text", [x for x in RUN if simple(x)], ids=str)
def test_the_command_runs(text, machine, tmp_path, monkeypatch, capsys):
    place = tmp_path / "user"
    shutil.copytree(machine, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(place / "home"))
    for path in (ROOT / "benchmarks", ROOT):
        monkeypatch.syspath_prepend(path)
    places = {"/shared/": f"{place}/shared/", "$HOME/.cache/mdm_plugin": f"{place}/home"}
    places["~/.cache/mdm_plugin"] = f"{place}/home"
    words = launched(RUN[text].words)
    for shown, here in places.items():
        words = [x.replace(shown, here) for x in words]
    program, rest = words[0], words[1:]
    if program in ("tune", "mdm") and rest[0] == "run":
        tune(words, place)
    elif program == "mdm":
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit) if rest == ["doctor"] else contextlib.nullcontext():
            cli.main()
        assert rest[0] != "cp" or (place / rest[-1]).is_file()
        assert capsys.readouterr().out
    elif program == "tensorboard":
        assert rest[0] == "--logdir" and scalars(Path(rest[1]))
    elif program in ("python", ".venv/bin/python"):
        python(rest, monkeypatch)
    else:
        assert program == "pytest" and python(["-m", *words], monkeypatch) is None


def test_torchtitan_reads_each_of_its_commands(tmp_path):
    pytest.importorskip("torchtitan")
    given = []
    for words in (launched(x.words) for x in FOUND.values() if x.words[0] != "pip"):
        if "--module" in words:
            given.append(words[words.index("--module") :])
    assert len(given) > 2
    script = (
        "import json, sys\nfrom torchtitan.config import ConfigManager\n"
        "for words in json.loads(sys.argv[1]): ConfigManager().parse_args(words)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
