"""What a whole checkpoint consists of: sizes and SHA-256 of its files, written last."""

import hashlib
import json
import os
from pathlib import Path

from mdm_plugin.errors import UserError

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """List all files of ``directory``, and sync them and the list to disk."""
    files = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            files[str(file.relative_to(directory))] = {
                "size": file.stat().st_size,
                "sha256": digest(file),
            }
        sync(file)
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    sync(directory / MANIFEST)
    sync(directory)


def verify(directory: Path, only: tuple[str, ...] = ()) -> None:
    """Compare a checkpoint's files with its manifest: all, or those that end so.

    Raises:
        UserError: naming the first file that is not as it was written, and how.
    """
    try:
        listed = json.loads((directory / MANIFEST).read_text())["files"]
        expected = [(name, int(x["size"]), str(x["sha256"])) for name, x in listed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / MANIFEST}: cannot be read: {error}") from error
    for name, size, sha256 in expected:
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            raise UserError(f"{directory / MANIFEST}: lists {name!r}, outside of its directory")
        if only and not name.endswith(only):
            continue
        if not file.is_file():
            raise UserError(f"{file}: is missing")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, and was written with {size}")
        if digest(file) != sha256:
            raise UserError(f"{file}: its content is not what was written (SHA-256)")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file's or a directory's content on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
