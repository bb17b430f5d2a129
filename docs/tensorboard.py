"""A picture of a run's page in TensorBoard: ``python docs/tensorboard.py RUN`` → tensorboard.png.

RUN is an output_dir. TensorBoard serves it to a headless Chromium, which takes the picture.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOWN = "train%2Fl%7Cval%7Cspeed%2F%28s%7Ct%29%7Cgrad"  # of the scalars, by a regular expression


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(address: str, seconds: float = 60) -> None:
    """Until a server answers."""
    for _ in range(int(seconds * 2)):
        try:
            with urllib.request.urlopen(address) as page:
                page.read()
            return
        except URLError:
            time.sleep(0.5)
    raise SystemExit(f"TensorBoard does not answer at {address}")


def main() -> None:
    """Serve, and take the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    run = given.run.expanduser().resolve()
    browser = next((x for x in BROWSERS if shutil.which(x)), None)
    if browser is None:
        raise SystemExit(f"no browser: install one of {', '.join(BROWSERS)}")
    port = free_port()
    # From its own place, so that the page names the run and not where it is.
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", run.name, "--port", str(port)]
    with subprocess.Popen(serve, cwd=run.parent, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"http://localhost:{port}/data/environment")
            scalars = f"scalars&_smoothingWeight=0&tagFilter={SHOWN}"
            page = f"http://localhost:{port}/?darkMode=false#{scalars}"
            options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
            size = ("--window-size=1400,1000", "--virtual-time-budget=40000")
            picture = f"--screenshot={HERE / 'tensorboard.png'}"
            subprocess.run([browser, *options, *size, picture, page], check=True, timeout=120)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
