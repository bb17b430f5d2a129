"""What works on CUDA alone: on a CPU each recipe refuses it by its name."""

import pytest
import torch

from tests.conftest import TINY
from tests.recipes.test_wrong_inputs import last_line

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
LINES = {
    "device=cuda": "device: cuda: there is none here (mdm doctor says why)",
    "fsdp_cpu_offload=True": "fsdp_cpu_offload: works on CUDA only, and the device is cpu",
    "enable_activation_offloading=True": "enable_activation_offloading: works on CUDA only",
    "enable_fp8_training=True": "enable_fp8_training: cpu has no float8 products",
    "optimizer.capturable=True": "optimizer.capturable: works on CUDA only",
}
TRAINING = {
    "mdm_full_finetune": "quickstart",
    "mdm_lora_finetune": "quickstart_lora",
    "mdm_dpo": "quickstart_dpo",
    "mdm_grpo": "quickstart_grpo",
}
OTHERS = {
    "mdm_eval": "quickstart_eval",
    "mdm_generate": "quickstart_generate",
    "mdm_variance": "quickstart_variance",
}


@pytest.mark.parametrize("option", LINES)
@pytest.mark.parametrize("recipe", TRAINING)
def test_a_training_recipe_refuses_it_by_name(recipe, option, tmp_path, monkeypatch, capfd):
    config = ["--config", TRAINING[recipe], "prepare=null", f"output_dir={tmp_path / 'out'}"]
    if recipe != "mdm_full_finetune":  # Muon, of the quickstart, has no such argument
        config += ["optimizer._component_=torch.optim.AdamW"]
    elif "optimizer" in option:
        config = ["--config", str(TINY), f"data_dir={tmp_path}", f"output_dir={tmp_path}"]
    line = last_line(recipe, [*config, option], monkeypatch, capfd)
    assert line.startswith(f"error: {LINES[option]}")


@pytest.mark.parametrize("recipe", OTHERS)
def test_every_other_recipe_refuses_a_device_that_is_not_there(
    recipe, tmp_path, monkeypatch, capfd
):
    given = ["--config", OTHERS[recipe], "device=cuda"]
    if recipe == "mdm_variance":
        given += ["prepare=null", f"output_dir={tmp_path}"]
    assert last_line(recipe, given, monkeypatch, capfd).startswith(f"error: {LINES['device=cuda']}")


def test_an_optimizer_that_keeps_its_state_in_cpu_memory_is_refused(
    data_dir, tmp_path, monkeypatch, capfd
):
    given = ["--config", str(TINY), f"data_dir={data_dir}", f"output_dir={tmp_path}"]
    given += ["optimizer=torchao.optim.CPUOffloadOptimizer"]
    line = last_line("mdm_full_finetune", given, monkeypatch, capfd)
    assert line.startswith("error: optimizer: CPU Offload currently only supports CUDA")
