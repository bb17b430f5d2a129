"""`make faults`: all of it. Under `make test`, a part: MDM_FAULTS=all chooses all."""

import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mdm_plugin.checkpoint.manifest import MANIFEST, verify
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.training import Checkpointer
from mdm_plugin.training.guard import Guard
from mdm_plugin.training.resume import find_checkpoint
from mdm_plugin.training.step import Result
from tests.conftest import BIN, scalars
from tests.faults.runs import TINY, Fault, arguments, run

pytestmark = pytest.mark.slow
ALL = os.environ.get("MDM_FAULTS") == "all"
ALONE = World(0, 1, torch.device("cpu"), None)
LAST = "step_20"
ONE = {"OMP_NUM_THREADS": "1"}


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / LAST / "model.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def found(directory: Path, asked: bool | str = True) -> Path | None:
    """The checkpoint of a run that is resumed."""
    cfg = OmegaConf.create({"resume_from_checkpoint": asked})
    return find_checkpoint(cfg, Checkpointer(str(directory)), ALONE)


@pytest.fixture(scope="module", params=[1, 2] if ALL else [1], ids=lambda n: f"{n} ranks")
def unbroken(request, data_dir, tmp_path_factory):
    """A run that nothing happens to: its directory, rank 0's events, and the number of ranks."""
    ranks = request.param
    directory = tmp_path_factory.mktemp(f"unbroken{ranks}")
    given = arguments(data_dir, directory, f"batch_size={8 // ranks}")
    codes, events = run(given, ranks)
    assert codes == [0] * ranks
    return directory, events, ranks


def places(events: list[str], count: int, saving: int) -> list[int]:
    """``count`` events to fail at, of which ``saving`` are while saving."""
    draw = random.Random(0)
    by_kind = {k: [i for i, e in enumerate(events, 1) if e == k] for k in ("step", "save")}
    return draw.sample(by_kind["save"], saving) + draw.sample(by_kind["step"], count - saving)


def test_killed_at_random_and_resumed_it_ends_bit_equal(unbroken, data_dir, tmp_path):
    directory, events, ranks = unbroken
    count, saving = ({1: (20, 10), 2: (10, 5)}[ranks]) if ALL else (3, 2)
    whole = parameters(directory)
    for number, at in enumerate(places(events, count, saving)):
        out = tmp_path / str(number)
        mode = "enable_async_checkpointing=True" if number % 2 else "epochs=1"
        given = arguments(data_dir, out, f"batch_size={8 // ranks}", mode)
        codes, _ = run(given, ranks, Fault("kill", at, rank=number % ranks))
        assert codes[number % ranks] == -9, (at, codes)
        codes, _ = run(given, ranks)  # the same command line
        assert codes == [0] * ranks, at
        assert same(parameters(out), whole), (at, events[at - 1])


def test_a_signal_ends_it_after_the_step_with_a_checkpoint(unbroken, data_dir, tmp_path):
    directory, _, ranks = unbroken
    given = arguments(data_dir, tmp_path, f"batch_size={8 // ranks}")
    codes, _ = run(given, ranks, Fault("term", 6, rank=ranks - 1))
    assert codes == [143] * ranks
    assert Checkpointer(str(tmp_path)).steps()[-1].name == "step_6"
    codes, _ = run(given, ranks)
    assert codes == [0] * ranks and same(parameters(tmp_path), parameters(directory))


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_whole(unbroken, data_dir, tmp_path):
    directory, _, ranks = unbroken
    log = tmp_path / "log"
    given = arguments(data_dir, tmp_path / "run", f"batch_size={8 // ranks}")
    codes, _ = run(given, ranks, Fault("full", 6), log)
    assert codes == [2] * ranks
    line = [x for x in Path(f"{log}.0").read_text().splitlines() if x.startswith("error: ")]
    assert len(line) == 1 and "step_8 could not be saved: " in line[0] and "whole" in line[0]
    newest = found(tmp_path / "run")
    assert newest and newest.name == "step_4"
    assert not list((tmp_path / "run").glob(".staging*"))
    codes, _ = run(given, ranks)
    assert codes == [0] * ranks and same(parameters(tmp_path / "run"), parameters(directory))


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(data_dir, tmp_path):
    ranks = 2
    given = arguments(data_dir, tmp_path / "run", "batch_size=4", "max_steps_per_epoch=8")
    codes, _ = run(given, ranks, Fault("nan", 5, rank=1), tmp_path / "log")
    assert codes == [0, 0]
    found = scalars(tmp_path / "run")
    assert found["train/skipped_steps"] == [0] * 5 + [1] * 3
    assert all(x == x for x in found["train/loss"])
    incident = json.loads((tmp_path / "run/incidents.jsonl").read_text())
    assert incident["step"] == 5 and incident["kind"] == "not finite"
    assert "step 5: loss " in Path(f"{tmp_path}/log.0").read_text()


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_when_a_rank_dies_or_hangs_the_other_says_so_and_ends(kind, data_dir, tmp_path):
    given = arguments(data_dir, tmp_path / "run", "batch_size=4", "timeout_minutes=0.1")
    codes, _ = run(given, 2, Fault(kind, 2, rank=1), tmp_path / "log")
    assert codes == [1, -9]
    lines = Path(f"{tmp_path}/log.0").read_text().splitlines()
    assert any(x.startswith("error: rank 0: another rank has died, or has not come") for x in lines)


@pytest.mark.skipif(not ALL, reason="a part of `make faults`")
def test_restarts_by_torchrun_go_on_alone(data_dir, tmp_path):
    """Two ranks; one is killed in the first start and in the second."""
    whole = tmp_path / "whole"
    codes, _ = run(arguments(data_dir, whole, "batch_size=4"), 2)
    assert codes == [0, 0]
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.faults.runs import Fault, arguments, inject
count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
inject(Fault("kill", 120) if count < 2 and os.environ["RANK"] == "1" else None)
sys.argv = arguments({str(data_dir)!r}, sys.argv[1], "batch_size=4")
import mdm_full_finetune
mdm_full_finetune.main()
""")
    launch = ("--nproc_per_node", "2", "--max-restarts", "3", "--rdzv_backend", "c10d")
    out, log = tmp_path / "run", tmp_path / "log"
    command = [BIN / "torchrun", *launch, "--rdzv_endpoint", "localhost:0", script, out]
    with log.open("w") as file:
        done = subprocess.run(
            [str(x) for x in command],
            stdout=file,
            stderr=file,
            env={**os.environ, **ONE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            timeout=180,
        )
    assert done.returncode == 0 and "resuming from" in log.read_text(), log.read_text()[-3000:]
    assert same(parameters(out), parameters(whole))


@pytest.mark.skipif(not ALL, reason="a part of `make faults`")
def test_two_ranks_then_one_then_four_are_the_same_run(data_dir, tmp_path):
    whole = tmp_path / "whole"
    codes, _ = run(arguments(data_dir, whole, "batch_size=8"), 1)
    assert codes == [0]
    out = tmp_path / "run"
    for ranks, more, signalled in (
        (2, ("batch_size=4",), 7),
        (1, ("batch_size=2", "gradient_accumulation_steps=4"), 6),
        (4, ("batch_size=2",), None),
    ):
        fault = Fault("term", signalled) if signalled else None
        given = arguments(data_dir, out, *more, "save_every_n_steps=100")
        codes, _ = run(given, ranks, fault)
        assert codes == [143 if signalled else 0] * ranks
    for name in ("train/loss", "train/grad_norm"):
        a, b = (torch.tensor(scalars(d)[name]) for d in (out, whole))
        assert a.shape == b.shape == (20,)
        assert ((a - b).abs() / b.abs()).max() < 1e-6


def test_each_flipped_byte_and_each_truncation_is_noticed(unbroken, tmp_path):
    """And the checkpoint before it is the one to resume from."""
    directory, _, _ = unbroken
    *_, before, last = Checkpointer(str(directory)).steps()
    files = [f for f in sorted(last.rglob("*")) if f.is_file()]
    draw = random.Random(1)
    for number in range(200):
        file = draw.choice(files)
        content = file.read_bytes()
        place = draw.randrange(len(content))
        if number % 4:
            flipped = bytes([content[place] ^ (1 << draw.randrange(8))])
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
        else:
            file.write_bytes(content[:place])
        try:
            newest = found(directory)
            # A manifest may be another text for the same list: JSON has spaces to spare.
            assert newest == before or (file.name == MANIFEST and newest == last), file
            if newest == last:
                verify(last)
        finally:
            file.write_bytes(content)
    assert found(directory) == last
    with pytest.raises(UserError, match=r"is damaged: .*model.safetensors: is missing"):
        (last / "model.safetensors").rename(tmp_path / "away")
        try:
            found(directory, str(last))
        finally:
            (tmp_path / "away").rename(last / "model.safetensors")


def test_the_best_checkpoints_are_kept_beside_the_last(tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep_last_n=1, keep_best_n=2)
    for step, value in enumerate((5.0, 1.0, None, 2.0, 3.0, 4.0), 1):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}/state.json").write_text(
            json.dumps({"val_nelbo": value, "parts": {}})
        )
    assert [d.name for d in checkpointer._superfluous(checkpointer.steps()[-1])] == [
        "step_1",
        "step_3",
        "step_5",
    ]


def a_guard(tmp_path, **options):
    cfg = {"output_dir": str(tmp_path), "max_skipped_steps": 3, "loss_spike_z": 6.0, **options}
    return Guard(ALONE, OmegaConf.create(cfg))


def a_result(*losses):
    class Batch:
        places = torch.arange(len(losses))
        t = torch.linspace(0.1, 0.9, len(losses))

    each = torch.tensor(losses)
    return [Result(Batch, each.mean(), each)]


def test_the_guard_names_rows_and_stops_after_several_in_a_row(tmp_path):
    guard, rows = a_guard(tmp_path), torch.tensor([70, 80, 90])
    bad = a_result(1.0, float("nan"), float("inf"))
    good, norm = a_result(1.0, 2.0, 3.0), torch.tensor(1.0)
    assert not guard.passes(0, bad, norm, rows) and not guard.passes(1, bad, norm, rows)
    assert guard.passes(2, good, norm, rows)  # no longer in a row
    assert not guard.passes(3, good, torch.tensor(float("inf")), rows)
    assert not guard.passes(4, bad, norm, rows)
    with pytest.raises(UserError, match="max_skipped_steps: 3 steps in a row, to step 5"):
        guard.passes(5, bad, norm, rows)
    lines = [json.loads(x) for x in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [x["row"] for x in lines[0]["rows"]] == [80, 90] and lines[2]["rows"] == []
    assert guard.skipped == 5
    assert a_guard(tmp_path, max_skipped_steps=None).passes(0, bad, norm, rows)
    with pytest.raises(UserError, match="optimizer_in_bwd: step 0"):
        a_guard(tmp_path).passes(0, bad, None, rows)


def test_a_spike_is_taken_and_reported_with_its_rows(tmp_path):
    guard, rows, norm = a_guard(tmp_path), torch.tensor([7, 8]), torch.tensor(1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        noise = 0.1 * float(torch.randn(1, generator=generator))
        assert guard.passes(step, a_result(1 + noise, 1.0), norm, rows)
    assert not (tmp_path / "incidents.jsonl").exists()
    assert guard.passes(200, a_result(1.0, 3.0), norm, rows)
    found = json.loads((tmp_path / "incidents.jsonl").read_text())
    assert found["kind"] == "spike" and found["rows"][0]["row"] == 8


@pytest.mark.skipif(not ALL, reason="a part of `make faults`")
def test_five_thousand_steps_in_flat_memory_and_open_files(data_dir, tmp_path):
    script = f"""
import os, sys
import psutil, torch
torch.set_num_threads(1)
import mdm_full_finetune as recipe
process, seen = psutil.Process(), []
step = recipe.MDMFinetune.train_step
def watched(self, number):
    step(self, number)
    if number % 25 == 0:
        seen.append((process.memory_info().rss / 2**20, process.num_fds()))
recipe.MDMFinetune.train_step = watched
sys.argv = {arguments(data_dir, tmp_path, "epochs=250", "save_every_n_epochs=50")!r}
sys.argv += ["save_every_n_steps=250", "enable_async_checkpointing=True", "keep_last_n=1"]
recipe.main()
print("SEEN", seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = eval(re.search(r"SEEN (.*)", done.stdout)[1])
    assert len(seen) == 200
    # A save has files open, and memory, for a moment: what matters is what there is without one.
    parts = [seen[start : start + 40] for start in range(0, 200, 40)]
    memory, files = ([min(x[i] for x in part) for part in parts] for i in range(2))
    print(memory, files)
    assert max(memory[1:]) < 1.02 * memory[1]
    assert len(set(files[1:])) == 1


def test_no_test_leaves_a_limit_behind():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert TINY.is_file()
