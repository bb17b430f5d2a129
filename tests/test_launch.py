"""The launch files for several nodes, with one node of two ranks; SLURM's with stand-ins for it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import BIN, TINY, torchrun
from tests.forks import free_port

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"
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
    assert "on 2 x cpu" in done.stdout + done.stderr
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
    done = torchrun(command, 2, "tests.threads", *module, home=tmp_path)
    assert done.stdout.count("left: []") == 2, done.stdout


@pytest.mark.parametrize("in_time", [True, False])
def test_slurm_job_requeues_itself_when_its_time_is_up(tmp_path, in_time):
    """srun runs the script here; a script that takes too long gets SIGTERM by way of USR1."""
    stand_ins = {
        "srun": 'shift; exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >> requeued; fi',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "work.sh"
    script.write_text(
        'echo "$HEAD $NODES $GPUS" > seen\n'
        + ("exit 0\n" if in_time else "trap 'echo saved > saved; exit 143' TERM\nsleep 30 & wait\n")
    )
    env = {
        "PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        **{"SLURM_NNODES": "3", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-9]"},
    }
    job = subprocess.Popen(["bash", LAUNCH / "mdm.sbatch", script], cwd=tmp_path, env=env)
    deadline = time.monotonic() + 20
    while not (tmp_path / "seen").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if not in_time:
        time.sleep(0.5)
        job.send_signal(signal.SIGUSR1)
    code = job.wait(20)
    assert (tmp_path / "seen").read_text() == "node7:20012 3 8\n"
    assert (code == 0) == in_time
    assert (tmp_path / "requeued").exists() != in_time
    assert (tmp_path / "saved").exists() != in_time
