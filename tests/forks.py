"""The fork server that has imported the recipes, and torchtune's `tune` in processes from it.

What is imported takes longer than most of the tests' runs.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import torch
from torchtune._cli.tune import main

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("tests.forks", "tests.faults.runs"),
        *("mdm_full_finetune", "mdm_lora_finetune", "mdm_eval", "mdm_generate", "mdm_variance"),
        *("scipy.optimize", "matplotlib.figure", "torch.utils.tensorboard"),  # runs import these
    ]
)


def tune(arguments: list[str], cwd, env: dict[str, str], timeout: float):
    """What ``tune arguments`` prints and its exit code, as of ``subprocess.run``.

    ``tune run --nproc_per_node N …`` has as many processes from the server, with torchrun's
    environment; tests/test_launch.py runs torchrun itself.
    """
    ranks = 1
    if arguments[1:2] == ["--nproc_per_node"]:
        ranks = int(arguments[2])
        arguments = [arguments[0], *arguments[3:]]
    with tempfile.TemporaryDirectory() as directory:
        out, err = Path(directory) / "out", Path(directory) / "err"
        port = free_port()
        places = [torchruns(rank, ranks, port) if ranks > 1 else {} for rank in range(ranks)]
        children = [
            context.Process(
                target=_tune, args=(arguments, str(cwd), env | place, str(out), str(err))
            )
            for place in places
        ]
        for child in children:
            child.start()
        end = time.monotonic() + timeout
        while any(child.is_alive() for child in children) and time.monotonic() < end:
            connection.wait([child.sentinel for child in children if child.is_alive()], 1)
            if any(child.exitcode for child in children):  # torchrun ends all when one has failed
                for child in children:
                    child.join(10)
                    child.kill()
        if any(child.is_alive() for child in children):
            for child in children:
                child.kill()
            raise subprocess.TimeoutExpired(["tune", *arguments], timeout, out.read_text())
        for child in children:
            child.join()
        codes = [child.exitcode for child in children]
        code = codes[0] if ranks == 1 else int(any(codes))
        return subprocess.CompletedProcess(
            ["tune", *arguments], code, out.read_text(), err.read_text()
        )


def torchruns(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _tune(arguments, cwd, env, out, err):
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = ["tune", *arguments]
    sys.exit(main())
