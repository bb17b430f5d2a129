"""Jobs by the real docs/launch/mdm.sbatch, with stand-ins for SLURM's own commands.

`tune` and the ranks that it starts are processes of the fork server (tests/forks.py), which spares
their imports, and `torchrun --help` is printed without; tests/test_launch.py has a run of
docs/launch/tune.sh with nothing in their place.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from torch.distributed.run import get_args_parser

from tests import forks
from tests.conftest import BIN

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"
# srun runs its command here, and kills it when it gets SIGTERM itself, as SLURM's does; scancel
# signals all processes of the step; scontrol names this node, and notes what is to be requeued.
# Processes of the step are known by their command lines, which name the directory.
STAND_INS = {
    "srun": """
shift
"$@" &
echo $! > step
trap 'kill -KILL $(cat step)' TERM
wait $!""",
    "scancel": """
[ "$1" = --signal=TERM ] || exit 1
kill -TERM $(pgrep -f "^[^ ]*python.*/forked.py .*$PWD/")""",
    "torchrun": '[ "$*" = --help ] && cat torchrun.txt',
    "tune": f'exec "{forks.PYTHON}" tune "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi',
}


class Slurm:
    """A queue of one job on a node of two ranks: one command line, submitted again and again.

    Args:
        directory: where it runs.
        job: its number, of which its port is made.
        command: what follows ``sbatch mdm.sbatch``.
    """

    def __init__(self, directory: Path, job: int, *command: str | Path) -> None:
        self.directory, self.command, self.launches = directory, [str(x) for x in command], 0
        (directory / "torchrun.txt").write_text(get_args_parser().format_help())
        for name, body in STAND_INS.items():
            (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (directory / name).chmod(0o755)
        self.env = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            **{"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(job)},
            **{"SLURM_JOB_NODELIST": "localhost", "TORCH_COMPILE_BACKEND": "eager"},
            **forks.RECIPES.environment(),
            "PATH": f"{directory}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def requeued(self) -> int:
        """How often the job has put itself into the queue again."""
        file = self.directory / "requeued"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def submit(self, *events: tuple[Callable[[], bool], Callable[[int], None]]) -> int:
        """Run the job to its end, with what happens to it. Its exit status.

        events: (when, what), one after another: ``time_is_up`` or ``kill_a_rank``.
        """
        self.launches += 1
        with (self.directory / "log").open("a") as log:
            job = subprocess.Popen(
                ["bash", LAUNCH / "mdm.sbatch", *self.command],
                **{"cwd": self.directory, "env": self.env, "stdout": log, "stderr": log},
            )
            family = psutil.Process(job.pid)
            try:
                for when, what in events:
                    deadline = time.monotonic() + 200
                    while job.poll() is None and not when():
                        assert time.monotonic() < deadline, self.log[-3000:]
                        time.sleep(0.02)
                    if job.poll() is None:
                        what(job.pid)
                return job.wait(200)
            except BaseException:
                for process in family.children(recursive=True):
                    process.kill()
                raise


def time_is_up(job: int) -> None:
    """SLURM's signal some minutes before the end of a job."""
    os.kill(job, signal.SIGUSR1)


def kill_a_rank(job: int) -> None:
    """SIGKILL to a rank of the job, as where a machine is short of memory."""
    name = psutil.Process(job).environ()["SLURM_JOB_ID"]
    for process in psutil.process_iter(["environ"]):
        given = process.info["environ"] or {}
        if (given.get("SLURM_JOB_ID"), given.get("LOCAL_RANK")) == (name, "1"):
            process.kill()
            return
