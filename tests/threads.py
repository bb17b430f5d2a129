"""``python -m tests.threads module arguments``: the module, and gloo's threads left at its end."""

import atexit
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":

    @atexit.register  # before all others, so it runs after them
    def report() -> None:
        names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
        # One write, so that what another rank prints does not come between.
        os.write(1, f"\nleft: {[name for name in names if 'gloo' in name]}\n".encode())

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
