"""A checkpoint in the making, and attempts on which ranks agree before they stop."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch.distributed.checkpoint import CheckpointException

from mdm_plugin.checkpoint.manifest import sync, write_manifest
from mdm_plugin.checkpoint.parts import OPTIMIZER, Run
from mdm_plugin.config.secrets import redacted


class Staging:
    """A checkpoint in the making: it has its name only when it is whole.

    Args:
        output_dir: where it will be.
        step: of step_N.
    """

    def __init__(self, output_dir: Path, step: int) -> None:
        self.directory = output_dir / f".staging_step_{step}"
        self.final = output_dir / f"step_{step}"

    def begin(self) -> None:
        """Make an empty directory."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)

    def write_state(self, state: str, cfg: DictConfig) -> None:
        """Write state.json and config.yaml."""
        (self.directory / "state.json").write_text(state)
        OmegaConf.save(redacted(cfg), self.directory / "config.yaml")

    def finish(self) -> None:
        """Write the manifest, and give the checkpoint its name."""
        write_manifest(self.directory)
        if self.final.exists():  # a resumed run comes by the same step again
            remove(self.final)
        self.directory.rename(self.final)
        sync(self.final.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. A kill halfway leaves no half one under a checkpoint's name."""
    doomed = checkpoint.with_name(f".removed_{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save_optimizer(
    run: Run, staging: Staging, group: Any = None, asynchronous: bool = False
) -> Any:
    state = {OPTIMIZER: run.parts[OPTIMIZER].state_dict()}
    place = staging.directory / OPTIMIZER
    alone = run.world.size == 1
    if asynchronous:
        return dcp.async_save(state, checkpoint_id=place, process_group=group, no_dist=alone)
    return dcp.save(state, checkpoint_id=place, no_dist=alone)


def load_optimizer(run: Run, checkpoint: Path) -> None:
    optimizer = run.parts[OPTIMIZER]
    state = {OPTIMIZER: optimizer.state_dict()}
    with without_notice_of_one_process():
        dcp.load(state, checkpoint_id=checkpoint / OPTIMIZER, no_dist=run.world.size == 1)
    optimizer.load_state_dict(state[OPTIMIZER])


@contextmanager
def without_notice_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class Attempts:
    """Calls functions, and keeps the first error until all ranks can stop together.

    After an error, only what all ranks do together is still called. If a rank stopped at once, the
    others would wait for it in their next collective.
    """

    def __init__(self, here: bool) -> None:
        self.here = here
        self.error: BaseException | None = None

    def call(self, function: Callable[[], Any], everywhere: bool = False) -> None:
        """Call on this rank if it is the one to, or on all; not after an error of its own."""
        # What all ranks do together is done after an error too: the others wait for it.
        if everywhere or (self.here and self.error is None):
            try:
                function()
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                self.error = self.error or error


def reason_of(error: BaseException) -> str:
    """The system's word for it if there is one, with the file; else the first line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return f"{seen.strerror} ({seen.filename})" if seen.filename else seen.strerror
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
