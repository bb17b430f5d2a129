"""What a command imports and says before it works: no more than it uses, and nothing idle."""

import gc
import logging
import re
import subprocess
import sys

import pytest

from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import GenerateOptions
from mdm_plugin.quiet import LINE, hide_torchao_line
from tests.conftest import BIN

RECIPES = ("mdm_full_finetune", "mdm_lora_finetune", "mdm_variance", "mdm_generate", "mdm_eval")
# Each takes long to import, and only some commands use it, at some point of theirs.
IDLE = ("matplotlib", "scipy", "reasoning_gym", "lm_eval", "transformers", "peft", "torchtitan")


def test_recipes_import_nothing_that_only_some_runs_use():
    script = f"import sys, {', '.join(RECIPES)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = {name.split(".")[0] for name in done.stdout.split()}
    assert set(RECIPES) <= found, done.stderr
    assert not found & {*IDLE, "tensorboard"}


def test_a_run_imports_only_what_it_uses_and_says_nothing_idle(command, tmp_path, data_dir):
    """The quickstart by torchtune's own ``tune``, for the bound; and an answer of its model."""
    done = command(
        *(BIN / "tune", "run", "mdm_full_finetune", "--config", "quickstart", "prepare=null"),
        *(f"data_dir={data_dir}", f"output_dir={tmp_path}", "checkpointer.checkpoint_dir=null"),
        *("objective=null", "epochs=1", "max_steps_per_epoch=1"),
        *("val_draws=2", "max_questions=4", "sample_rows=1"),
        PYTHONPROFILEIMPORTTIME="1",
    )
    line = r"import time: +\d+ \| +\d+ \| *(\S+)\n"
    found = {name.split(".")[0] for name in re.findall(line, done.stderr)}
    assert {"torchao", "tensorboard"} <= found and not found & set(IDLE)
    said = re.sub(line + r"|import time: self.*\n", "", done.stderr)
    bar = r"\s*(\d+%\|.*\d/1 \[.*\])?\s*"
    assert all(re.fullmatch(bar, x) for x in re.split(r"[\r\n]+", said)), said

    prompt = "7 - 2 + 9 ="
    done = command(
        *(BIN / "tune", "run", "mdm_generate", "--config", "quickstart_generate"),
        *(f"data_dir={data_dir}", f"checkpointer.checkpoint_dir={tmp_path / 'step_1'}"),
        f"prompt={prompt}",
    )
    assert f'"prompt": "{prompt}"' in done.stdout
    assert re.fullmatch(r"1 prompts, .* tokens/s\n", done.stderr), done.stderr


def test_full_collections_do_not_look_through_what_imports_made(monkeypatch):
    found = []
    main = parse(GenerateOptions)(lambda cfg: found.append(gc.get_freeze_count()))
    monkeypatch.setattr(sys, "argv", ["mdm_generate", "--config", "quickstart_generate"])
    try:
        main()
    finally:
        gc.unfreeze()
    assert found[0] > 100_000


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        (["python", "/there/bin/tune", "run", "mdm_generate", "--config", "x"], True),
        (["python", "-u", "-m", "mdm_full_finetune", "--config", "x"], True),
        (["python", "/there/bin/mdm", "ls"], True),
        (["python", "-m", "mdm_plugin.checkpoint.export", "a", "b"], True),
        (["torchrun", "-m", "torchtitan.train", "--module", "mdm_plugin.titan.llada"], True),
        (["python", "/mdm_plugin/bin/tune", "run", "full_finetune_single_device"], False),
        (["python", "quantize.py"], False),
    ],
)
def test_torchao_s_line_goes_from_our_commands_and_its_others_stay(
    words, hidden, monkeypatch, caplog
):
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(logger, "filters", [])
    hide_torchao_line()
    logger.warning(f"{LINE} 2.13.0 for torchao version 0.15.0")
    logger.warning("Skipping import of cpp extensions due to TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1")
    logger.warning("another thing")
    assert len(caplog.messages) == 3 - hidden and "another thing" in caplog.messages
    assert any(LINE in x for x in caplog.messages) != hidden
