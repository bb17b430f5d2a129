"""Fixtures: the quickstart's real data and tokenizer, and a way to run recipes as users do."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mdm_plugin.models import ChatTokenizer, llada
from mdm_plugin.quickstart.data import prepare_data
from tests import forks

# Rows that tests tokenise are not kept among the user's own.
os.environ["MDM_PLUGIN_HOME"] = tempfile.mkdtemp(prefix="mdm_plugin_tests_")
atexit.register(shutil.rmtree, os.environ["MDM_PLUGIN_HOME"], ignore_errors=True)

BIN = Path(sys.executable).parent
TINY = Path(__file__).with_name("tiny.yaml")


LONGEST = ("tests/titan/", "tests/test_journey.py", "tests/test_launch.py")
PROCESSES = {"command", "tune", "torchtitan", "unbroken", "wheel"}


def pytest_collection_modifyitems(items):
    # The longest first, or one of the two workers waits for the other's at the end.
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:  # they start processes
        if PROCESSES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """The quickstart's data and tokenizer."""
    directory = tmp_path_factory.mktemp("quickstart")
    prepare_data(str(directory))
    return directory


@pytest.fixture(scope="session")
def tokenizer(data_dir) -> ChatTokenizer:
    return ChatTokenizer(str(data_dir))


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    return llada(
        vocab_size=320, num_layers=2, num_heads=2, embed_dim=32, intermediate_dim=64, max_seq_len=96
    ).eval()


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows (or raw lines) to a file; its path."""

    def write(*rows, name="rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def command(tmp_path, data_dir):
    """Run a command in an empty directory, as a user would; its CompletedProcess."""

    def run(*arguments, check=True, timeout=300, cwd=None, **environment):
        # One thread each: the models are tiny, and tests run side by side.
        env = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        env.pop("MDM_TRACEBACK", None)
        env |= environment
        words, where = [str(a) for a in arguments], cwd or tmp_path
        # PYTHONPATH is read when Python starts, so it needs a Python of its own.
        if words[0] in (*forks.COMMANDS, sys.executable) and "PYTHONPATH" not in environment:
            done = forks.command(words, where, env, timeout)
        else:
            done = subprocess.run(
                words, cwd=where, env=env, capture_output=True, text=True, timeout=timeout
            )
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.fixture
def tune(command, data_dir, tmp_path):
    """``tune run [launch] recipe --config tiny.yaml output_dir=… overrides``."""

    def run(*overrides, launch=(), out="out", recipe="mdm_full_finetune", **kwargs):
        return command(
            "tune",
            "run",
            *launch,
            recipe,
            "--config",
            TINY,
            f"data_dir={data_dir}",
            f"output_dir={tmp_path / out}",
            *overrides,
            **kwargs,
        )

    return run


@pytest.fixture
def torchtitan(tmp_path):
    """Run a module on some ranks, where torchtitan has been imported; what they print."""
    pytest.importorskip("torchtitan")

    def run(ranks, *arguments, home) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MDM_PLUGIN_HOME": str(home)}
        words = ["python", "-m", *(str(a) for a in arguments)]
        done = forks.TITAN.run(words, ranks, tmp_path, env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def scalars(output_dir: Path) -> dict[str, list[float]]:
    """All TensorBoard scalars under a run's directory, in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for directory in sorted({f.parent for f in output_dir.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                if event.tensor_proto.float_val:
                    found.setdefault(tag, {})[event.step] = event.tensor_proto.float_val[0]
    return {tag: [by_step[s] for s in sorted(by_step)] for tag, by_step in found.items()}
