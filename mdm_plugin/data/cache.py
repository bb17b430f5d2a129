"""Rows tokenised once, into a file that all ranks of a machine, and later starts, share.

An entry is a directory of ``$MDM_PLUGIN_HOME/rows`` (``~/.cache/mdm_plugin/rows``), named by a hash
of all that its rows depend on: the source, the tokenizer, the options, and the code that reads
them. It holds rows.arrow (an Arrow stream: ``datasets.Dataset.from_file`` opens it too), bad.jsonl
(the rows that were left out) and facts.json, and exists under its name only when it is whole. An
entry can be removed at any time when no run uses it: the next start makes it again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from mdm_plugin import __version__
from mdm_plugin.data.rows import Facts, Rows, chunks
from mdm_plugin.errors import UserError

ROWS, BAD, FACTS = "rows.arrow", "bad.jsonl", "facts.json"
Tokens = tuple[list[int], list[bool]]  # ids, eligible


def home() -> Path:
    """Where this machine's entries are."""
    root = os.environ.get("MDM_PLUGIN_HOME") or "~/.cache/mdm_plugin"
    return Path(root).expanduser() / "rows"


def entry_name(identity: dict[str, Any]) -> str:
    """The name of the entry of rows that depend on ``identity``, JSON, and on the code here."""
    code = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    whole = {"version": __version__, "code": code.hexdigest(), **identity}
    return sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def cached(
    identity: dict[str, Any], read: Callable[[Path], tuple[Iterator[Tokens], Callable[[], str]]]
) -> tuple[Rows, Path]:
    """The rows of ``identity``, from their entry; made by one process of this machine if missing.

    Args:
        identity: all that the rows depend on, as JSON.
        read: reads the rows: given the file for bad rows, an iterator of them, and what gives the
            report on them when they have been read.

    Returns:
        The rows, and the file of those that were left out.

    Raises:
        UserError: if the entry cannot be written; and what ``read`` raises.
    """
    directory = home() / entry_name(identity)
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{directory}.lock"):
                if not directory.is_dir():
                    _write(directory, read)
        except OSError as error:
            raise UserError(
                f"dataset: its tokens cannot be written to {directory.parent}: {error.strerror}: "
                "make room, or name another place by the environment's MDM_PLUGIN_HOME"
            ) from error
    stored = json.loads((directory / FACTS).read_text())
    return Rows.open(directory / ROWS, Facts(**stored)), directory / BAD


def _write(
    directory: Path, read: Callable[[Path], tuple[Iterator[Tokens], Callable[[], str]]]
) -> None:
    import pyarrow

    staging = directory.with_suffix(".staging")  # of a process that was killed: the lock is ours
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
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
                whole = slice(0, int(chunk.ends[-1]))
                columns = [
                    pyarrow.ListArray.from_arrays(chunk.ends, pyarrow.array(values))
                    for values in (chunk.tokens[whole], chunk.eligible[whole].view("uint8"))
                ]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        line = report()
        facts = Rows.open(staging / ROWS, Facts(0, 0, 0, "")).find_facts(line)
        (staging / FACTS).write_text(json.dumps(facts._asdict()))
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
