"""The fork server that has imported the recipes, and torchtune's `tune` in processes from it.

What is imported takes longer than most of the tests' runs.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torchtune._cli.tune import main

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("tests.forks", "tests.faults.runs"),
        *("mdm_full_finetune", "mdm_lora_finetune", "mdm_eval", "mdm_generate", "mdm_variance"),
    ]
)


def tune(arguments: list[str], cwd, env: dict[str, str], timeout: float):
    """What ``tune arguments`` prints and its exit code, as of ``subprocess.run``."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory) / "out", Path(directory) / "err"
        child = context.Process(target=_tune, args=(arguments, str(cwd), env, str(out), str(err)))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            raise subprocess.TimeoutExpired(["tune", *arguments], timeout, out.read_text())
        return subprocess.CompletedProcess(
            ["tune", *arguments], child.exitcode, out.read_text(), err.read_text()
        )


def _tune(arguments, cwd, env, out, err):
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = ["tune", *arguments]
    sys.exit(main())
