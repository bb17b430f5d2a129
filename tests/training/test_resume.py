"""Which checkpoint a run goes on from."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf

from mdm_plugin.checkpoint.parts import OptimizerState, Run
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.training import Checkpointer
from mdm_plugin.training.resume import find_checkpoint
from tests.conftest import TINY

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def config(data_dir, tmp_path):
    """The tests' config, of a run in tmp_path/run."""

    def load(*overrides):
        given = [f"data_dir={data_dir}", f"output_dir={tmp_path / 'run'}", *overrides]
        return load_config(str(TINY), given, Options)

    return load


@pytest.fixture
def saved(config, tiny_model, tokenizer, tmp_path):
    """Three checkpoints of a run of the tests' config."""
    checkpointer, cfg = Checkpointer(str(tmp_path / "run")), config()
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    parts = {"optimizer": OptimizerState(tiny_model, optimizer)}
    for step in (9, 10, 100):
        checkpointer.save(Run(ALONE, tiny_model, tokenizer, cfg, parts), step, {})
    return checkpointer


def find(cfg, checkpointer, asked="auto"):
    found = find_checkpoint(
        OmegaConf.merge(cfg, {"resume_from_checkpoint": asked}), checkpointer, ALONE
    )
    return found and found.name


def test_auto_starts_where_there_is_nothing_and_else_goes_on_from_the_newest(config, tmp_path):
    assert config().resume_from_checkpoint == "auto"  # also where a config does not say so
    assert find(config(), Checkpointer(str(tmp_path / "none"))) is None


def test_the_newest_is_by_number_and_a_named_one_is_taken(config, saved, tmp_path):
    cfg = config()
    assert [d.name for d in saved.steps()] == ["step_9", "step_10", "step_100"]
    assert find(cfg, saved) == find(cfg, saved, True) == "step_100"
    assert find(cfg, saved, str(tmp_path / "run/step_9")) == "step_9"
    for wrong in (str(tmp_path), "automatic"):
        with pytest.raises(UserError, match="is not a checkpoint"):
            find(cfg, saved, wrong)


def test_a_damaged_one_is_left_out_and_none_that_is_whole_is_no_start(config, saved, tmp_path):
    (tmp_path / "run/step_100/config.yaml").write_text("seed: 8")
    assert find(config(), saved) == "step_10"
    for step in (9, 10):
        (tmp_path / f"run/step_{step}/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: name another output_dir"):
        find(config(), saved)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=2e-3", "optimizer.lr is 0.001 there, and 0.002 in this config"),
        ("seed=8", "seed is 7 there, and 8"),
        ("epochs=2", "epochs is 1 there, and 2"),
        ("masking=mdm_plugin.masking.Mirror", "masking._component_ is .*Bernoulli there"),
        ("timesteps=mdm_plugin.timesteps.Uniform", "timesteps._component_ is .*Stratified"),
        ("objective._component_=mdm_plugin.objectives.ELBO", "objective._component_ is None there"),
        ("ema._component_=mdm_plugin.training.EMA", "ema is None there|ema._component_ is None"),
        ("dtype=bf16", "dtype is fp32 there"),
    ],
)
def test_another_run_s_checkpoints_are_refused_with_the_key(config, saved, override, words):
    cfg = config(override)
    with pytest.raises(UserError, match=rf"holds another run: ({words}).* name another output_dir"):
        find(cfg, saved)
    assert find(cfg, saved, True) == "step_100"
    assert len(saved.steps()) == 3


def test_a_run_that_goes_back_behind_damaged_steps_keeps_what_it_writes(
    config, saved, tiny_model, tokenizer, tmp_path
):
    (tmp_path / "run/step_100/model.safetensors").write_bytes(b"")
    checkpointer = Checkpointer(str(tmp_path / "run"), keep_last_n=1)
    parts = {"optimizer": OptimizerState(tiny_model, torch.optim.AdamW(tiny_model.parameters()))}
    checkpointer.save(Run(ALONE, tiny_model, tokenizer, config(), parts), 20, {})
    assert [x.name for x in saved.steps()] == ["step_20", "step_100"]
    assert find(config(), saved) == "step_20"


def test_where_and_how_it_runs_and_what_it_shows_may_change(config, saved):
    cfg = config(
        *("batch_size=2", "gradient_accumulation_steps=4", "compile=True", "log_every_n_steps=3"),
        *("keep_last_n=2", "loss.chunk_size=64", "save_every_n_steps=5", "timeout_minutes=1"),
        *("metric_logger=torchtune.training.metric_logging.DiskLogger", "device=cuda"),
    )
    assert find(cfg, saved) == "step_100"


def test_a_start_never_touches_an_earlier_run(config, saved, tmp_path):
    with pytest.raises(UserError, match=r"output_dir: .* holds checkpoints of an earlier run"):
        find(config(), saved, False)
    elsewhere = Checkpointer(str(tmp_path / "elsewhere"))
    shutil.copytree(tmp_path / "run/step_9", tmp_path / "elsewhere/step_3")
    with pytest.raises(UserError, match="holds checkpoints of its own"):
        find(config(), elsewhere, str(tmp_path / "run/step_9"))
    source = Checkpointer(str(tmp_path / "run"), checkpoint_dir=str(tmp_path / "run/step_9"))
    for asked in ("auto", True, False):
        with pytest.raises(UserError, match=r"is a checkpoint of output_dir itself: .* another"):
            find(config(), source, asked)
    with pytest.raises(UserError, match=r"holds no checkpoint .*auto starts"):
        find(config(), Checkpointer(str(tmp_path / "none")), True)
