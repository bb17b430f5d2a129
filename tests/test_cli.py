"""`mdm`, and `tune` from any directory, from an editable install and from a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def test_ls_cat_and_validate_know_our_recipes_and_torchtune_s(command):
    listed = command("mdm", "ls")
    listing = listed.stdout
    assert not listed.stderr  # nothing of torchao, as in tests/test_startup.py
    assert "mdm_full_finetune" in listing and "quickstart" in listing
    for family in ("llada/8B", "dream/7B"):
        assert {f"{family}_eval", f"{family}_generate"} <= set(listing.split())
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
    for tool in ("mdm", "tune"):
        out = f"output_dir={tmp_path / tool}"
        command(tool, "run", "mdm_full_finetune", "--config", "my.yaml", out, *overrides)
        weights = load_file(tmp_path / tool / "step_1/model.safetensors")
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
        "    def __call__(self, n, generator):\n"
        "        t = torch.rand(n, generator=generator, dtype=torch.float64)\n"
        "        return Times(t.sqrt(), 0.5 / t.sqrt())\n"  # density 2t, weight 1 / 2t
    )
    (tmp_path / "my_sampler.py").write_text(text)
    tune("timesteps=my_sampler.Late", "max_steps_per_epoch=1")
    (tmp_path / "my_sampler.py").write_text(text.replace("Late(TimestepSampler)", "Late"))
    done = tune("timesteps=my_sampler.Late", out="refused", check=False)
    line = "timesteps: Late is no TimestepSampler: derive it from mdm_plugin.contract"
    assert done.returncode == 2 and line in done.stderr.strip().splitlines()[-1]


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
    assert configs | modules | recipes | {"mdm_plugin/py.typed"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_an_installed_wheel_runs_by_name_from_another_directory(wheel, command, tmp_path, data_dir):
    """The wheel's files alone on the path, before the checkout's."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import sys, mdm_plugin, mdm_full_finetune, torchtune._cli.tune as tune\n"
        f"assert mdm_plugin.__file__.startswith({str(site)!r}), mdm_plugin.__file__\n"
        f"assert mdm_full_finetune.__file__.startswith({str(site)!r})\n"
        "sys.argv[0] = 'tune'\n"
        "tune.main()\n"
    )
    # fmt: off
    command(
        sys.executable, "-c", script, "run", "mdm_full_finetune", "--config", "quickstart",
        f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}", "prepare=null",
        "timesteps=mdm_plugin.timesteps.Stratified",
        "checkpointer.checkpoint_dir=null", "run_val_every_n_steps=null",
        "max_steps_per_epoch=1", "epochs=1", PYTHONPATH=str(site),
    )
    # fmt: on
    assert (tmp_path / "out/step_1/model.safetensors").is_file()
