"""Rows tokenised once, into a file that all ranks of a machine, and later starts, share.

An entry is a directory of ``$MDM_PLUGIN_HOME/rows`` (``~/.cache/mdm_plugin/rows``), named by a hash
of all that its rows depend on: the source, the tokenizer, the options, and the code that reads
them. It holds rows.arrow (an Arrow stream: ``datasets.Dataset.from_file`` opens it too), bad.jsonl
(the rows that were left out) and facts.json. It gets its name when it is whole, what it holds is
compared with its facts when it is opened, and one that is not as it was written is made anew. An
entry can be removed at any time when no run uses it.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mdm_plugin import __version__
from mdm_plugin.data.rows import Facts, Rows, chunks
from mdm_plugin.errors import UserError

ROWS, BAD, FACTS = "rows.arrow", "bad.jsonl", "facts.json"
Tokens = tuple[list[int], list[bool]]  # ids, eligible
# Given the file for bad rows: the rows, and what gives the report on them when they have been read.
Read = Callable[[Path], tuple[Iterator[Tokens], Callable[[], str]]]


def home() -> Path:
    """Where this machine keeps what the package makes."""
    return Path(os.environ.get("MDM_PLUGIN_HOME") or "~/.cache/mdm_plugin").expanduser()


def entry_name(identity: dict[str, Any]) -> str:
    """The name of the entry of rows that depend on ``identity``, JSON, and on the code here."""
    code = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    whole = {"version": __version__, "code": code.hexdigest(), **identity}
    return sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def cached(identity: dict[str, Any], read: Read, together: int = 1) -> tuple[Rows, Path]:
    """The rows of ``identity``, from their entry; made by one process of this machine if missing.

    Under torchrun that is the machine's first rank, whose errors are the ones that are shown.

    Args:
        identity: all that the rows depend on, as JSON.
        read: reads them.
        together: rows of one example (``Facts``).

    Returns:
        The rows, and the file of those that were left out.

    Raises:
        UserError: if the entry cannot be written; and what ``read`` raises.
    """
    directory = home() / "rows" / entry_name(identity)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return _wait(directory), directory / BAD
    failure = _failure(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        rows = _opened(directory)
        if rows is None:
            with FileLock(f"{directory}.lock"):
                rows = _opened(directory)  # another's, who had the lock before
                rows = _write(directory, read, together) if rows is None else rows
        return rows, directory / BAD
    except OSError as error:
        line = (
            f"dataset: its tokens cannot be written to {directory.parent}: {error.strerror}: make "
            "room, or name another place by the environment's MDM_PLUGIN_HOME"
        )
        _tell(failure, line)
        raise UserError(line) from error
    except UserError as error:
        _tell(failure, str(error))
        raise


def _failure(directory: Path) -> Path:
    """Where the first rank of this launch says that it failed."""
    names = ("TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    launch = "-".join([str(os.getppid()), *(os.environ.get(name, "") for name in names)])
    return directory.with_suffix(f".failed-{launch}")


def _tell(failure: Path, line: str) -> None:
    """Tell the other ranks, of which there may be none."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and failure.parent.is_dir():
        failure.write_text(line)


def _wait(directory: Path) -> Rows:
    """The rows, when the machine's first rank has them; or its error."""
    failure = _failure(directory)
    while True:
        if failure.is_file():
            raise UserError(failure.read_text())
        if (rows := _opened(directory)) is not None:
            return rows
        time.sleep(0.1)


def _opened(directory: Path) -> Rows | None:
    """The rows of an entry; None if there is none, or it is not as it was written."""
    if not (directory / FACTS).is_file():
        return None
    try:
        stored = json.loads((directory / FACTS).read_text())
        if (directory / ROWS).stat().st_size != stored["bytes"] or not (directory / BAD).is_file():
            return None
        rows = Rows.open(directory / ROWS, Facts(**stored["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = int(rows.lengths_of(torch.arange(len(rows))).sum()) == rows.facts.tokens
    return rows if known and len(rows) == stored["rows"] else None


def _sweep(parent: Path) -> None:
    """Remove what starts that were killed, or failed, left a day ago."""
    for old in [*parent.glob("*.staging"), *parent.glob("*.failed-*")]:
        with suppress(OSError):  # another start sweeps too
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def _write(directory: Path, read: Read, together: int) -> Rows:
    import pyarrow

    _sweep(directory.parent)
    staging = Path(
        tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".staging", dir=directory.parent)
    )
    try:
        rows, report = read(staging / BAD)
        schema = pyarrow.schema(
            {"tokens": pyarrow.list_(pyarrow.int32()), "eligible": pyarrow.list_(pyarrow.uint8())}
        )
        with (
            pyarrow.OSFile(str(staging / ROWS), "wb") as file,
            pyarrow.ipc.new_stream(file, schema) as writer,
        ):
            for chunk in chunks(rows):
                columns = [
                    pyarrow.ListArray.from_arrays(chunk.ends, pyarrow.array(values))
                    for values in (chunk.tokens, chunk.eligible.view("uint8"))
                ]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        found = Rows.open(staging / ROWS, Facts(0, 0, 0, ""))
        found.facts = found.find_facts(report(), together)
        size = (staging / ROWS).stat().st_size
        facts = {"rows": len(found), "bytes": size, "facts": found.facts._asdict()}
        (staging / FACTS).write_text(json.dumps(facts))
        for name in (ROWS, BAD, FACTS):
            with (staging / name).open("rb+") as written:
                os.fsync(written.fileno())
        if directory.is_dir():
            if (other := _opened(directory)) is not None:  # another machine's, on a shared disk
                return other
            shutil.rmtree(directory)
        staging.rename(directory)
        return found
    finally:
        shutil.rmtree(staging, ignore_errors=True)
