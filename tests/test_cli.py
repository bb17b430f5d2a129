"""`mdm`, and `tune` from any directory, from an editable install and from a wheel."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mdm_plugin import cli, doctor
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.torchtune_internals import command_line
from tests.config.test_config import OPTIONS
from tests.conftest import BIN

ROOT = Path(__file__).parents[1]


def test_ls_cat_and_validate_know_our_recipes_and_torchtune_s(command):
    listed = command(BIN / "mdm", "ls")
    listing = listed.stdout
    assert not listed.stderr  # nothing of torchao, as in tests/test_startup.py
    assert "mdm_full_finetune" in listing and "quickstart" in listing
    for family in ("llada/8B", "dream/7B"):
        assert {f"{family}_eval", f"{family}_generate"} <= set(listing.split())
    assert {"sdar/4B_full", "sdar/4B_lora", "fast_dllm/7B_lora"} <= set(listing.split())
    assert {"quickstart_block", "quickstart_block_variance"} <= set(listing.split())
    assert "full_finetune_distributed" in listing
    shown = yaml.safe_load(command("mdm", "cat", "quickstart").stdout)
    assert shown["loss"]["_component_"] == "mdm_plugin.loss.MDMLoss"
    assert "Config is well-formed!" in command("mdm", "validate", "quickstart").stdout
    assert command("mdm", "download", "--help").stdout


def test_a_copied_config_runs_with_mdm_and_with_tune(command, tmp_path, data_dir):
    command("mdm", "cp", "quickstart", "my.yaml")
    text = (tmp_path / "my.yaml").read_text()
    assert "embed_dim: 64" in text
    (tmp_path / "my.yaml").write_text(text.replace("embed_dim: 64", "embed_dim: 32"))
    overrides = [
        f"data_dir={data_dir}",
        "prepare=null",
        "timesteps=mdm_plugin.timesteps.Stratified",  # no probe
        "checkpointer.checkpoint_dir=null",
        "run_val_every_n_steps=null",
        "max_steps_per_epoch=1",
        "epochs=1",
    ]
    for name, tool in (("mdm", BIN / "mdm"), ("tune", "tune")):
        out = f"output_dir={tmp_path / name}"
        command(tool, "run", "mdm_full_finetune", "--config", "my.yaml", out, *overrides)
        weights = load_file(tmp_path / name / "step_1/model.safetensors")
        assert weights["output.weight"].shape[1] == 32  # the copy's
    out = f"output_dir={tmp_path / 'packaged'}"
    command("mdm", "run", "mdm_full_finetune", "--config", "quickstart", out, *overrides)
    command("mdm", "cp", "mdm_full_finetune", "mine.py")
    assert "MDMFinetune" in (tmp_path / "mine.py").read_text()


def test_a_component_of_the_user_s_own_file(tune, tmp_path):
    text = (
        "import torch\n"
        "from mdm_plugin.contract import Times, TimestepSampler\n"
        "class Late(TimestepSampler):\n"
        "    def __call__(self, n, generator, w):\n"
        "        t = torch.rand(n, generator=generator, dtype=torch.float64)\n"
        "        return Times(t.sqrt(), 0.5 / t.sqrt())\n"  # density 2t, weight 1 / 2t
    )
    (tmp_path / "my_sampler.py").write_text(text)
    tune("timesteps=my_sampler.Late", "max_steps_per_epoch=1")
    (tmp_path / "my_sampler.py").write_text(text.replace("Late(TimestepSampler)", "Late"))
    done = tune("timesteps=my_sampler.Late", out="refused", check=False)
    line = "timesteps: Late is no TimestepSampler: derive it from mdm_plugin.contract"
    assert done.returncode == 2 and line in done.stderr.strip().splitlines()[-1]


def call(monkeypatch, *words):
    """``mdm WORDS`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["mdm", *words])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_each_example_of_the_help_names_what_is_there(monkeypatch, capsys):
    for words in ([], ["-h"], ["--help"], ["help"]):
        assert call(monkeypatch, *words) == 0 and capsys.readouterr().out == cli.HELP
    examples = [shlex.split(x) for x in re.findall(r"^ +mdm (.+)$", cli.HELP, re.M)]
    assert {words[0] for words in examples} == set(cli.COMMANDS)
    tune_s = re.search(r"\{(.+?)\}", command_line("mdm")._parser.format_help())[1].split(",")
    assert {*tune_s, "doctor"} == set(cli.COMMANDS)
    runs = [words for words in examples if words[0] == "run"]
    assert {name for words in runs for name in words if name in cli.RECIPES} == set(cli.RECIPES)
    for words in runs:
        at = words.index("--config")
        load_config(words[at + 1], words[at + 2 :], OPTIONS.get(words[at - 1], Options))


def test_the_help_and_an_unknown_command_need_no_torch():
    script = (
        "import sys\nfrom mdm_plugin.cli import main\nsys.argv = ['mdm']\nmain()\n"
        "sys.argv = ['mdm', 'doctr']\n"
        "try: main()\nexcept SystemExit as stopped: assert stopped.code == 2\n"
        "assert not {'torch', 'torchtune', 'omegaconf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = "error: mdm doctr: no such command (known: doctor, download, ls, cat, cp, validate, run)"
    assert done.stderr == line + "\n"


def test_the_doctor_reads_the_pins_of_the_package_and_says_what_to_install():
    requirements = [
        *("torch<2.14,>=2.13", "torchao<0.16,>=0.13", "torchtune==0.6.1", "scipy>=1.11"),
        *('wmi>=1; sys_platform == "win32"', 'lm-eval>=0.4.13; extra == "eval"'),
        *('torchtitan==0.3.0; extra == "titan"', 'triton==3.7.1; extra == "titan"'),
        *('mdm-plugin[titan]; extra == "dev"', 'pytest>=8; extra == "dev"'),
    ]
    there = {"torch": "2.13.0+cpu", "torchao": "0.16.0", "scipy": "1.12rc1", "torchtitan": "0.3.0"}
    there |= {"triton": "3.7.1", "pytest": "7.4"}
    found = [str(x).split(None, 2) for x in doctor.check_packages(requirements, there.get)]
    assert [(state, what) for state, what, _ in found] == [
        *(("ok", "torch"), ("wrong", "torchao"), ("wrong", "torchtune"), ("ok", "scipy")),
        *(("note", "[eval]"), ("ok", "[titan]"), ("note", "[dev]")),
    ]
    said = {what: text for _, what, text in found}
    assert said["torchao"] == (
        "0.16.0 does not go with this release, which takes <0.16,>=0.13: "
        'pip install "torchao<0.16,>=0.13"'
    )
    assert said["torchtune"] == 'is missing: pip install "torchtune==0.6.1"'
    assert said["[eval]"] == (
        'for lm-eval\'s tasks in mdm_eval: lm-eval is missing: pip install "mdm-plugin[eval]"'
    )
    assert "torchtitan 0.3.0, triton 3.7.1" in said["[titan]"]
    assert "pytest 7.4 does not go" in said["[dev]"]


def test_the_doctor_finds_this_environment_well_and_a_home_that_cannot_be_written_wrong(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(tmp_path / "home"))
    assert call(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in [re.match(r"[\w-]+", x)[0] for x in stated] + list(cli.RECIPES):
        assert re.search(rf"^ok +{name} ", out, re.M), name
    assert f"{tmp_path / 'home'}, " in out and re.search(
        r"^note +quickstart +not run yet", out, re.M
    )
    assert out.splitlines()[-1] == "the recipes have all that they need"

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MDM_PLUGIN_HOME", str(tmp_path / "file/home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main(["mdm_eval"]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^wrong +MDM_PLUGIN_HOME .*name another place by the environment's", out, re.M
    )
    assert re.search(r"^note +tune +not on the PATH: activate this environment", out, re.M)
    assert out.splitlines()[-1] == "1 wrong: see above"
    monkeypatch.setattr(doctor, "PROJECT", "mdm-nowhere")
    assert doctor.main([]) == 1 and "mdm-nowhere" in capsys.readouterr().out


def test_the_doctor_says_what_each_gpu_can(monkeypatch):
    gpus = [("H100", 9, 0, 80), ("A100", 8, 0, 40), ("V100", 7, 0, 16)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(
            **dict(zip(("name", "major", "minor"), gpus[i], strict=False)),
            total_memory=gpus[i][3] * 1024**3,
        ),
    )
    said = {x.what: x.found for x in doctor.check_device()}
    assert said["GPU 0"] == "H100, 80 GiB: bf16 yes, float8 yes"
    assert said["GPU 1"] == "A100, 40 GiB: bf16 yes, float8 no"
    assert said["GPU 2"] == "V100, 16 GiB: bf16 no, float8 no"
    assert "CPU" not in said


def test_the_doctor_works_where_a_package_does_not(command, tmp_path):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").write_text("raise ImportError('not with this torch')")
    done = command("mdm", "doctor", check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = r"^wrong +mdm_generate +cannot be imported: ImportError: not with this torch$"
    assert re.search(line, done.stdout, re.M), done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory]
    built = subprocess.run([*map(str, command), str(ROOT)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(directory.glob("*.whl"))


def test_the_wheel_holds_recipes_configs_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"mdm_plugin/configs/{p.relative_to(ROOT / 'configs')}"
        for p in ROOT.glob("configs/**/*.yaml")
    }
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("mdm_plugin/**/*.py")}
    recipes = {p.name for p in ROOT.glob("recipes/*.py")}
    others = {"mdm_plugin/py.typed", "mdm_plugin/generation/replay.html"}
    assert configs | modules | recipes | others <= names
    assert not any(name.startswith("tests") for name in names)


OUTSIDE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MDM_TRACEBACK")}
OUTSIDE["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def installed(wheel, tmp_path):
    """A virtual environment with the wheel and, without the network, this one's other packages."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*map(str, pip), "--quiet", wheel], env=OUTSIDE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    site = next(home.glob("lib/python*/site-packages"))
    # A path alone: this environment's own .pth files, as of an editable install, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin", site


def test_the_wheel_alone_trains_answers_evaluates_and_exports(installed, tmp_path, data_dir):
    """Outside of the checkout, from an empty directory, with the packaged configs."""
    (scripts, site), work, run = installed, tmp_path / "empty", tmp_path / "out/step_20"
    work.mkdir()

    def call(*words: str) -> str:
        done = subprocess.run(
            [str(x) for x in words], cwd=work, env=OUTSIDE, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    script = "import mdm_plugin, mdm_eval; print(mdm_plugin.__file__, mdm_eval.__file__)"
    places = call(scripts / "python", "-c", script).split()
    assert len(places) == 2 and all(x.startswith(str(site)) for x in places), places

    quick = (f"data_dir={data_dir}", "prepare=null", "checkpointer.checkpoint_dir=null")
    quick += ("epochs=1", "max_steps_per_epoch=20", "run_val_every_n_steps=null")
    train = ("run", "mdm_full_finetune", "--config", "quickstart", *quick)
    assert "objective Window" in call(scripts / "mdm", *train, f"output_dir={run.parent}")
    model = (f"data_dir={data_dir}", f"checkpointer.checkpoint_dir={run}")
    generate = ("run", "mdm_generate", "--config", "quickstart_generate", "prompt=3 + 4 =")
    assert '"prompt": "3 + 4 ="' in call(scripts / "mdm", *generate, *model)
    lines = (data_dir / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:9]))
    few = [f"{key}={tmp_path / 'few.jsonl'}" for key in ("rows", "dataset.source")]
    few += [f"output_dir={tmp_path / 'eval'}", "draws=2", "max_new_tokens=4"]
    call(scripts / "mdm", "run", "mdm_eval", "--config", "quickstart_eval", *model, *few)
    found = json.loads((tmp_path / "eval/results.json").read_text())["tasks"]
    assert found["exact_match"]["rows"] == 9 and found["nelbo"]["nats_per_token"] < 7
    call(scripts / "python", "-m", "mdm_plugin.checkpoint.export", run, tmp_path / "exported")
    before, after = (load_file(x / "model.safetensors") for x in (run, tmp_path / "exported"))
    assert "model.transformer.wte.weight" in after and len(after) == len(before)
    sums = [sorted(float(x.double().sum()) for x in found.values()) for found in (before, after)]
    assert sums[1] == pytest.approx(sums[0], abs=0.5) and not list(work.iterdir())
