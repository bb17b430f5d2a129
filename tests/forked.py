#!/usr/bin/env python3
"""Python, `forked.py -m module …`, or `forked.py tune …`, as a process of a fork server.

FORKS names the socket of the server (tests/forks.py). Signals go on to the process; it is killed
with this one, and its exit code is this one's.
"""

import contextlib
import json
import os
import signal
import socket
import sys


class Forked:
    """A process of a fork server, which kills it once this end of the socket is closed.

    Args:
        server: the server's socket.
        words: ``tune …``, ``mdm …``, ``python -m module …`` or ``python -c code …``.
        streams: descriptors of its stdin, stdout and stderr.
    """

    def __init__(self, server: str, words: list[str], cwd: str, env: dict, streams=(0, 1, 2)):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(server)
        socket.send_fds(self.socket, [b"\n"], streams)
        request = {"words": words, "cwd": cwd, "env": env}
        self.socket.sendall(json.dumps(request).encode() + b"\n")

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it has ended by itself
            self.socket.sendall(bytes([number]))

    def exit_code(self) -> int:
        """Wait for its end; negative: by a signal."""
        return int(self.socket.recv(16))


if __name__ == "__main__":
    words = sys.argv[1:] if sys.argv[1] == "tune" else ["python", *sys.argv[1:]]
    process = Forked(os.environ["FORKS"], words, os.getcwd(), dict(os.environ))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: process.signal(number))
    code = process.exit_code()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
