"""Reinforcement that is killed while it writes answers, learns from them, or saves."""

import os
import random

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import scalars
from tests.faults.runs import Fault, arguments, run
from tests.recipes.test_grpo import GRPO, SHORT

pytestmark = pytest.mark.slow
ALL = os.environ.get("MDM_FAULTS") == "all"
STEPS, LAST = 6, "step_6"
OF_TIME = ("speed/", "memory/", "rollout/seconds", "rollout/tokens_per", "rollout/share")
OPTIONS = (
    *("save_every_n_steps=2", f"max_steps_per_epoch={STEPS}", "updates_share_noise=False"),
    *("ema._component_=mdm_plugin.training.EMA", "ema.decay=0.9", "optimizer.lr=1e-2"),
)


def given(data_dir, directory, ranks, *more):
    options = [x.replace("{data}", str(data_dir)) for x in (*GRPO, *SHORT)]
    own = (*options, *OPTIONS, f"batch_size={4 // ranks}", *more)
    return arguments(data_dir, directory, *own, recipe="mdm_grpo")


@pytest.fixture(scope="module", params=[1, 2] if ALL else [1], ids=lambda n: f"{n} ranks")
def unbroken(request, data_dir, tmp_path_factory):
    """A run that nothing happens to: its directory, rank 0's events, and the number of ranks."""
    ranks = request.param
    directory = tmp_path_factory.mktemp(f"unbroken{ranks}")
    codes, events = run(given(data_dir, directory, ranks), ranks)
    assert codes == [0] * ranks
    return directory, events, ranks


@pytest.mark.parametrize("kind", ["rollout", "update", "save"])
def test_killed_in_a_rollout_an_update_or_a_save_and_resumed_it_ends_bit_equal(
    kind, unbroken, data_dir, tmp_path
):
    """Weights, their average, and all figures of every step."""
    directory, events, ranks = unbroken
    found = [i for i, event in enumerate(events, 1) if event == kind]
    later = [i for i in found if events[:i].count("step") >= 3]  # a checkpoint is there
    for number, at in enumerate(random.Random(kind).sample(later, 4 if ALL else 1)):
        out, rank = tmp_path / str(number), number % ranks
        mode = f"enable_async_checkpointing={bool(number % 2)}"
        codes, _ = run(given(data_dir, out, ranks, mode), ranks, Fault("kill", at, rank))
        assert codes[rank] == -9, (at, codes)
        codes, _ = run(given(data_dir, out, ranks, mode), ranks)  # the same command line
        assert codes == [0] * ranks, at
        files = sorted(x.relative_to(directory) for x in (directory / LAST).rglob("*.safetensors"))
        assert len(files) > 1
        for file in files:
            whole, resumed = load_file(directory / file), load_file(out / file)
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), (at, file)
        before, after = scalars(directory), scalars(out)
        assert len(before["reward/mean"]) == STEPS and before["reward/groups_that_differ"][-1] > 0
        for name in before:
            if not name.startswith(OF_TIME):
                assert after[name] == before[name], (at, name)
