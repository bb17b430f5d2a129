"""The launch files for several nodes, with one node of two ranks; SLURM's with stand-ins for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import BIN, TINY
from tests.forks import free_port
from tests.slurm import LAUNCH, Slurm, kill_a_rank, time_is_up

TITAN = ("--module", "mdm_plugin.titan.llada", "--config", "llada_debugmodel")


def test_tune_script_trains_on_a_node_of_two_ranks(command, data_dir, tmp_path):
    done = command(
        *("bash", LAUNCH / "tune.sh", "mdm_full_finetune", "--config", TINY),
        *(f"data_dir={data_dir}", f"output_dir={tmp_path / 'out'}", "max_steps_per_epoch=2"),
        HEAD=f"localhost:{free_port()}",
        NODES="1",
        GPUS="2",
        RESTARTS="0",
    )
    assert "2 ranks on cpu" in done.stdout + done.stderr and "torchao" not in done.stderr
    assert (tmp_path / "out" / "step_2").is_dir()


def test_titan_script_trains_on_a_node_of_two_ranks(command, data_dir, tmp_path):
    pytest.importorskip("torchtitan")
    (tmp_path / "quickstart").symlink_to(data_dir)
    done = command(
        *("bash", LAUNCH / "titan.sh", *TITAN),
        *("--training.steps", "2", "--dump_folder", tmp_path / "out"),
        HEAD=f"localhost:{free_port()}",
        NODES="1",
        GPUS="2",
        RESTARTS="0",
        MDM_PLUGIN_HOME=str(tmp_path),
    )
    assert "Training completed" in done.stdout + done.stderr
    assert (tmp_path / "out" / "checkpoint" / "step-2").is_dir()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are read from /proc")
@pytest.mark.parametrize("trainer", ["recipe", "torchtitan"])
def test_no_thread_of_gloo_outlives_the_run(command, data_dir, tmp_path, trainer):
    """Before Python 3.14 such a thread can abort a process that has done all its work."""
    if trainer == "recipe":
        module = ("mdm_full_finetune", "--config", TINY, f"data_dir={data_dir}")
        module += (f"output_dir={tmp_path / 'out'}", "max_steps_per_epoch=1")
    else:
        pytest.importorskip("torchtitan")
        (tmp_path / "quickstart").symlink_to(data_dir)
        module = ("torchtitan.train", *TITAN)
        module += ("--training.steps", "1", "--dump_folder", tmp_path / "out")
    done = command(
        *(BIN / "torchrun", "--nproc_per_node", 2, "--master_addr", "localhost"),
        *("--master_port", free_port(), "-m", "tests.threads", *module),
        MDM_PLUGIN_HOME=str(tmp_path),
        PYTHONPATH=str(Path(__file__).parents[1]),
    )
    assert done.stdout.count("left: []") == 2, done.stdout


def test_one_command_line_through_preemptions_and_a_killed_rank(tune, data_dir, tmp_path):
    """The real sbatch file, launch script and recipe: a rank is killed, the job's time is up three
    times, and it ends with the bits of the run that nothing happened to."""
    given = ["dtype=bf16", "batch_size=4", "epochs=4", "max_steps_per_epoch=15", "keep_last_n=2"]
    given += ["save_every_n_steps=4", "timeout_minutes=0.5"]
    tune(*given, launch=("--nproc_per_node", "2"), out="unbroken")
    out = tmp_path / "out"
    queue = Slurm(
        tmp_path,
        free_port(),
        *(LAUNCH / "tune.sh", "mdm_full_finetune", "--config", TINY, f"data_dir={data_dir}"),
        *(f"output_dir={out}", *given),
    )

    def after(step: int) -> Callable[[], bool]:
        return lambda: any(x >= step for x in steps(out))

    # torchrun starts all ranks again, and they go on; then the time is up.
    events = [(after(4), kill_a_rank), (after(12), time_is_up)]
    while queue.requeued < 3:  # a job that fails is started again by hand, with the same line
        queue.submit(*events)
        last = max(steps(out))
        assert last < 60 and queue.launches < 8, queue.log[-3000:]
        events = [(after(last + 4), time_is_up)]
    assert queue.submit() == 0 and queue.requeued == 3
    assert queue.log.count("resuming from") >= 4 and max(steps(out)) == 60
    one, other = (load_file(x / "step_60/model.safetensors") for x in (tmp_path / "unbroken", out))
    assert one.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in one.items())


def steps(out: Path) -> list[int]:
    return [int(x.name.removeprefix("step_")) for x in out.glob("step_*")]


def test_a_job_that_is_done_or_fails_does_not_requeue_itself(tmp_path):
    for body, code in (("exit 0", 0), ("exit 3", 3)):
        (tmp_path / "work.sh").write_text(f'echo "$HEAD $NODES $GPUS" > seen\n{body}\n')
        queue = Slurm(tmp_path, 12, "work.sh")
        assert queue.submit() == code
        assert (tmp_path / "seen").read_text() == "localhost:20012 1 2\n"
        assert not queue.requeued
