"""Raw rows from files, local directories and the Hugging Face hub, each with its place."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mdm_plugin.errors import UserError


class Invalid(NamedTuple):
    """In the place of a row: a line that could not be read, and why."""

    reason: str


LONGEST_LINE = 64 << 20  # bytes; one line without an end must not fill the memory
_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}


class Source(NamedTuple):
    """Raw rows that can be read, and what another reading of them can be told by.

    identity: JSON. Of files: paths, sizes and times of change; of a data set, its fingerprint.
    rows: (place, row) for each row; the place is "file:line" or "name[split], row i". A line of a
        .jsonl file that is not JSON comes as ``Invalid``, for the caller's policy. It raises a
        UserError if a file is empty or not of its format.
    """

    identity: Any
    rows: Callable[[], Iterator[tuple[str, Any]]]


def find_source(
    source: str, data_files: str | Sequence[str] | None = None, split: str = "train", **load: Any
) -> Source:
    """Where rows are to be read from.

    Args:
        source: a .jsonl, .json or .parquet file; or ``"json"`` or ``"parquet"`` with
            ``data_files``; or a directory or hub name for ``datasets.load_dataset``.
        data_files: the files, in torchtune's manner of calling.
        split: split of a directory or hub data set; a slice as in ``"train[:1000]"`` too.
        load: further arguments of ``datasets.load_dataset``.

    Raises:
        UserError: if a file is missing, a data set cannot be loaded, or ``split`` is a number.
    """
    if not isinstance(split, str):
        raise UserError(
            f"split: {split}: a data set's split is a name, such as train; a share of dataset's "
            "rows is dataset_val.split without a _component_"
        )
    suffix = Path(source).suffix
    if source in ("json", "parquet"):
        if not data_files:
            raise UserError(f'data_files: not given, and source is "{source}": name the files')
        names, kind = [data_files] if isinstance(data_files, str) else list(data_files), source
    elif suffix in _FORMATS:
        names, kind = [source], _FORMATS[suffix]
    else:
        return _hub(source, data_files, split, load)
    if split != "train" or load:
        given = ", ".join(["split"] * (split != "train") + sorted(load))
        raise UserError(f"{given}: applies to a hub or local data set, not to the file {names[0]}")
    files = [Path(name).expanduser() for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist")
    stats = [(file.resolve(), file.stat()) for file in files]
    identity = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    return Source(
        [kind, identity], partial(_of_files, files, _json if kind == "json" else _parquet)
    )


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a source; see ``Source``."""
    return find_source(source).rows()


def _of_files(
    files: list[Path], read: Callable[[Path], Iterator[tuple[str, Any]]]
) -> Iterator[tuple[str, Any]]:
    for file in files:
        empty = True
        for place, row in read(file):
            empty = False
            yield place, row
        if empty:
            raise UserError(f"{file} has no rows")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        first = lines.readline().strip()
        while first == b"" and (line := lines.readline()):
            first = line.strip()
    if first.startswith(b"["):
        try:
            rows = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            number = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            raise UserError(f"{file}:{number}: not valid JSON: {error}") from error
        for i, element in enumerate(rows, 1):
            yield f"{file}, row {i}", element
        return
    with file.open("rb") as lines:
        for number, line in enumerate(_lines(lines), 1):
            if not line.strip():
                continue
            if len(line) > LONGEST_LINE:
                yield f"{file}:{number}", Invalid(f"longer than {LONGEST_LINE >> 20} MiB")
                continue
            try:
                yield f"{file}:{number}", json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield f"{file}:{number}", Invalid(f"not valid UTF-8: {error.reason}")
            except RecursionError:
                yield f"{file}:{number}", Invalid("not valid JSON: too deeply nested")
            except ValueError as error:
                yield f"{file}:{number}", Invalid(f"not valid JSON: {error}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is longer than ``LONGEST_LINE``, a beginning that is longer than that."""
    while line := file.readline(LONGEST_LINE + 1):
        rest = line
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield line


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for i, row in enumerate(rows, 1):
            yield f"{file}, row {i}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: not a valid Parquet file: {error}") from error


def _hub(source: str, data_files: Any, split: str, load: dict[str, Any]) -> Source:
    import datasets

    try:
        if (
            Path(source, "dataset_info.json").is_file()
            or Path(source, "dataset_dict.json").exists()
        ):
            data = datasets.load_from_disk(source)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source, data_files=data_files, split=split, **load)
    except Exception as error:  # datasets raises many kinds: all are about the name or the network
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"source: the data set {source!r} cannot be loaded: {reason}") from error

    if isinstance(data, datasets.IterableDataset):
        raise UserError(
            f"source: {source!r} with streaming: all rows are read before training, once, into a "
            "file: leave streaming out"
        )

    def rows() -> Iterator[tuple[str, Any]]:
        for i, row in enumerate(data, 1):
            yield f"{source}[{split}], row {i}", row

    return Source(["dataset", source, split, data._fingerprint], rows)
