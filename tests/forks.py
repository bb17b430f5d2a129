"""Fork servers that have imported the recipes, or torchtitan; and commands in processes from them.

What is imported takes longer than most of the tests' runs.
"""

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import torch
from torchtune._cli import tune as torchtune

from mdm_plugin import cli
from tests.forked import Forked

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        *("tests.forks", "tests.faults.runs"),
        *(
            "mdm_full_finetune",
            "mdm_lora_finetune",
            "mdm_dpo",
            "mdm_eval",
            "mdm_generate",
            "mdm_grpo",
            "mdm_variance",
        ),
        *("scipy.optimize", "matplotlib.figure", "torch.utils.tensorboard"),  # runs import these
    ]
)
COMMANDS = {"tune": torchtune.main, "mdm": cli.main}
PYTHON = Path(__file__).with_name("forked.py")  # in place of Python, where FORKS is set


class Server:
    """A process of ``context``, from which others are forked; it starts when first used.

    Args:
        modules: imported besides.
    """

    def __init__(self, *modules: str) -> None:
        self.modules, self._socket = modules, ""

    @property
    def socket(self) -> str:
        """What FORKS names."""
        if not self._socket:
            directory = tempfile.TemporaryDirectory()
            self._socket = f"{directory.name}/socket"
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._socket, theirs, self.modules))
            process.start()
            ours.recv()  # it listens

            @atexit.register  # before multiprocessing waits for it
            def end() -> None:
                ours.close()
                process.join()
                directory.cleanup()

        return self._socket

    def environment(self) -> dict[str, str]:
        """What has torchrun start its ranks here, and ``PYTHON`` the process that it stands for."""
        return {"PYTHON_EXEC": str(PYTHON), "FORKS": self.socket}

    def run(self, words, ranks: int | None, cwd, env: dict[str, str], timeout: float = 300):
        """What a command prints and its exit code, as of ``subprocess.run``.

        ranks: as many processes, with torchrun's environment; tests/test_launch.py runs torchrun
            itself. None: one process without.
        """
        port, codes = free_port(), {}
        with tempfile.TemporaryDirectory() as directory:
            out, err = Path(directory) / "out", Path(directory) / "err"
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            streams = [os.open(os.devnull, os.O_RDONLY), *(os.open(x, flags) for x in (out, err))]
            places = [torchruns(rank, ranks, port) for rank in range(ranks)] if ranks else [{}]
            children = [Forked(self.socket, words, str(cwd), env | x, streams) for x in places]
            for stream in streams:
                os.close(stream)
            running = {child.socket: child for child in children}
            end = time.monotonic() + timeout
            while running and time.monotonic() < end:
                for ended in select.select(running, [], [], 1)[0]:
                    codes[ended] = running.pop(ended).exit_code()
                    if codes[ended]:  # torchrun ends all when one has failed
                        end = min(end, time.monotonic() + 10)
            for child in children:
                child.socket.close()
            if running and not any(codes.values()):
                raise subprocess.TimeoutExpired(words, timeout, out.read_text())
            code = int(any(codes.values())) if ranks else next(iter(codes.values()))
            return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


RECIPES = Server()
TITAN = Server("mdm_plugin.titan.llada", "mdm_plugin.titan.dream", "tests.titan.runs")


def command(words: list[str], cwd, env: dict[str, str], timeout: float):
    """A command; ``tune run --nproc_per_node N …`` has as many processes from the server."""
    ranks = None
    if words[:3] == ["tune", "run", "--nproc_per_node"]:
        ranks = int(words[3])
        words = [*words[:2], *words[4:]]
    return RECIPES.run(words, ranks, cwd, env, timeout)


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
    """A port of this machine that nothing listens on. Below those that the kernel gives to
    connections: one of these could take it before it is used."""
    while True:
        port = 10000 + secrets.randbelow(20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def _serve(place: str, user, modules: tuple[str, ...]) -> None:
    """Fork for each connection to the socket, until the user's end of the pipe is closed."""
    for name in modules:
        importlib.import_module(name)
    fork, running = multiprocessing.get_context("fork"), {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        user.send(None)
        while True:
            ends = [child.sentinel for child in running.values()]
            ready = connection.wait([listener, user, *running, *ends])
            if user in ready:
                for child in running.values():
                    child.kill()
                return
            if listener in ready:
                asked = listener.accept()[0]
                streams = socket.recv_fds(asked, 1, 3)[1]
                with asked.makefile() as file:
                    request = file.readline()
                if request:  # else it was killed before it could ask
                    running[asked] = fork.Process(target=_command, args=(request, streams))
                    running[asked].start()
                for stream in streams:
                    os.close(stream)
            for asked, child in list(running.items()):
                if child.sentinel in ready:
                    child.join()
                    with contextlib.suppress(OSError):  # it may be closed
                        asked.sendall(str(child.exitcode).encode())
                    asked.close()
                    del running[asked]
                elif asked in ready:
                    _signal(child, asked.recv(1))


def _signal(child, number: bytes) -> None:
    if number:
        os.kill(child.pid, number[0])
    else:
        child.kill()


def _command(request: str, streams: list[int]) -> None:
    """As Python does with a command line."""
    given = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    torch.set_num_threads(int(given["env"]["OMP_NUM_THREADS"]))
    words = [x for x in given["words"] if x != "-u"]
    if words[0] in COMMANDS:
        sys.argv = words
        sys.exit(COMMANDS[words[0]]())
    sys.path.insert(0, os.getcwd())
    _, kind, what, *rest = words
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})
