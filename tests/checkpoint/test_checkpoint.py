import gc
import os
import weakref
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from mdm_plugin.checkpoint.parts import OptimizerState, Run, ScheduleState, check_states
from mdm_plugin.distributed.parameters import initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.training import EMA, Checkpointer
from mdm_plugin.training.resume import find_checkpoint

ALONE = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def trained(tiny_model):
    """A model and an optimizer that has taken a step."""
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=1e-2)
    tiny_model(torch.arange(12)[None]).square().mean().backward()
    optimizer.step()
    return tiny_model, optimizer


def a_run(model, own, **parts):
    """A run of an optimizer and other parts."""
    parts = {"optimizer": OptimizerState(model, own), **parts}
    return Run(ALONE, model, NoTokenizer(), OmegaConf.create({"a": 1}), parts)


def save(checkpointer, trained, step):
    return checkpointer.save(a_run(*trained), step, {"seed": 1})


class NoTokenizer:
    mask_token_added = False

    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_weights_optimizer_and_state_come_back_exactly(trained, tmp_path):
    model, optimizer = trained
    checkpointer = Checkpointer(str(tmp_path))
    path = save(checkpointer, trained, 3)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 5.0
    for p in model.parameters():
        p.data.zero_()
        optimizer.state[p]["exp_avg"].zero_()
    checkpointer.load_weights(model, checkpoint=path)
    state = checkpointer.load_state(path)
    checkpointer.load(a_run(model, optimizer), path, state)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for p, moment in zip(model.parameters(), moments, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert (state["seed"], state["step"], set(state["parts"])) == (1, 3, {"optimizer"})


class Counter:
    """A user's own part."""

    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count} if self.count is not None else {}

    def load_state_dict(self, state):
        self.count = state["count"]


class Other(Counter):
    pass


def test_parts_come_back_and_what_is_missing_or_of_another_kind_is_one_line(trained, tmp_path):
    model, optimizer = trained
    average = EMA(model, 0.5)
    average.update(3)
    expected = {name: x.clone() for name, x in average.weights().items()}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedule.step()
    parts = {
        "timesteps": Counter(5),
        "lr_scheduler": ScheduleState(schedule, "my.cosine"),
        "ema": average,
    }
    checkpointer = Checkpointer(str(tmp_path))
    path = checkpointer.save(a_run(model, optimizer, **parts), 1, {})
    state = checkpointer.load_state(path)
    before = schedule.state_dict()["last_epoch"]
    schedule.step()
    found = {**parts, "timesteps": Counter(), "ema": EMA(model, 0.5)}
    checkpointer.load(a_run(model, optimizer, **found), path, state)
    assert found["timesteps"].count == 5 and schedule.last_epoch == before == 1
    for name, truth in expected.items():
        assert torch.equal(found["ema"].weights()[name], truth)
    for change, words in (
        ({"timesteps": Other(1)}, "timesteps: .* with Counter, and the config has Other"),
        ({"timesteps": None}, "timesteps: .* with Counter, and the config has none"),
        ({"more": Counter(1)}, "more: .* with none, and the config has Counter"),
        (
            {"lr_scheduler": ScheduleState(schedule, "my.linear")},
            "lr_scheduler: .* with cosine, and the config has linear",
        ),
        ({"lr_scheduler": None}, "lr_scheduler: .* with cosine, and the config has none"),
        ({"ema": None}, "ema: .* with EMA, and the config has none"),
    ):
        changed = {k: x for k, x in {**parts, **change}.items() if x is not None}
        with pytest.raises(UserError, match=words):
            checkpointer.load(a_run(model, optimizer, **changed), path, state)
    with pytest.raises(UserError, match=r"optimizer: .* with AdamW, and the config has SGD"):
        checkpointer.load(a_run(model, torch.optim.SGD(model.parameters()), **parts), path, state)
    # One that has learnt nothing yet is of the same kind.
    parts["timesteps"] = lazy = Counter(None)
    checkpointer.load(a_run(model, optimizer, **parts), path, state)
    assert lazy.count == 5
    # Parts without a state may come and go.
    checkpointer.load(a_run(model, optimizer, **parts, more=Counter(None)), path, state)


@pytest.mark.parametrize("state", [torch.ones(3), torch.tensor(1.0), (1, 2), {1: 2}])
def test_a_state_that_json_does_not_give_back_is_said_before_training(state):
    with pytest.raises(UserError, match="timesteps: the state_dict of Counter goes to a JSON file"):
        check_states({"timesteps": Counter(state)})
    check_states({"timesteps": Counter([1.5, {"a": None}])})


def test_a_checkpoint_of_an_earlier_version_is_one_line(trained, tmp_path):
    path = save(Checkpointer(str(tmp_path)), trained, 1)
    (path / "state.json").write_text('{"seed": 1, "step": 1}')
    with pytest.raises(UserError, match="an earlier version: start a new run"):
        Checkpointer.load_state(path)


def test_saving_holds_the_tensors_of_one_file_at_a_time(trained, tmp_path, monkeypatch):
    """Rank 0 never holds more than the largest file, while the next is gathered."""
    alive = []

    def files(self, run, directory, instead):
        for _ in range(3):
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            tensor = torch.ones(4)
            alive.append(weakref.ref(tensor))
            yield partial(torch.sum, tensor)
            del tensor

    monkeypatch.setattr(Checkpointer, "_model_files", files)
    save(Checkpointer(str(tmp_path)), trained, 1)
    assert len(alive) == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keep_last_n", [None, 1])
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(
    trained, tmp_path, monkeypatch, keep_last_n
):
    """Stop at each write, sync, rename and removal in turn; then look at what is there."""
    import shutil

    model, _ = trained
    calls = 0
    for stop_at in range(1, 200):
        directory = tmp_path / str(stop_at)
        checkpointer = Checkpointer(str(directory), keep_last_n=keep_last_n)
        save(checkpointer, trained, 1)
        calls = 0
        with monkeypatch.context() as patch:

            def killing(function, at=stop_at):
                def call(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == at:
                        raise Killed
                    return function(*args, **kwargs)

                return call

            for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
                patch.setattr(module, name, killing(getattr(module, name)))
            killed = False
            try:
                save(checkpointer, trained, 2)
            except BaseException:  # torch wraps what it meets
                killed = True
        cfg = OmegaConf.create({"resume_from_checkpoint": True})
        newest = find_checkpoint(cfg, Checkpointer(str(directory)), ALONE)
        checkpointer.load_weights(model, checkpoint=newest)
        assert checkpointer.load_state(newest)["step"] in (1, 2)
        if not killed:
            assert newest.name == "step_2"
            break
        # And the next attempt, in the same place, succeeds.
        assert save(checkpointer, trained, 2).is_dir()
        shutil.rmtree(directory)
    assert stop_at > 8  # it was stopped at many places, and once went through


def test_initial_weights_depend_on_seed_and_name_alone(tiny_model):
    initialize_parameters(tiny_model, seed=1)
    first = {n: p.clone() for n, p in tiny_model.named_parameters()}
    torch.manual_seed(99)
    initialize_parameters(tiny_model, seed=1)
    assert all(torch.equal(p, first[n]) for n, p in tiny_model.named_parameters())
    initialize_parameters(tiny_model, seed=2)
    assert not torch.equal(tiny_model.output.weight, first["output.weight"])
    assert tiny_model.output.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert (tiny_model.norm.scale == 1).all()
