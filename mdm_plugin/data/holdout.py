"""Rows that are held out of a data set: for validation, never trained on."""

import torch

from mdm_plugin.data.rows import Rows
from mdm_plugin.errors import UserError
from mdm_plugin.noise import keyed_generator


def hold_out(rows: Rows, share: float, seed: int, max_rows: int | None = None) -> tuple[Rows, Rows]:
    """The rows to train on, and those held out, which stay in the order that they have.

    Each row has a number of U(0, 1), a function of (seed, its place in the data set); those of the
    smallest are held out. So a larger share, or a larger ``max_rows``, holds out the same rows and
    more. At least one row is held out, and one is left. Of packed text a row is held out, not a
    document, which may go on in the next. Rows of one example (``Facts.together``) are as one row.

    Args:
        rows: the data set.
        share: of its rows, in (0, 1), to the nearest row.
        seed: another one holds out others.
        max_rows: hold out no more than so many.

    Raises:
        UserError: if there are fewer than two rows.
    """
    each = rows.facts.together
    examples = len(rows) // each
    if examples < 2:
        raise UserError(
            f"dataset_val.split: dataset has {examples} row: none can be held out of it"
        )
    count = max(1, min(round(share * examples), max_rows or examples, examples - 1))
    u = torch.rand(examples, generator=keyed_generator(seed, "held out"), dtype=torch.float64)
    held = torch.zeros(examples, dtype=torch.bool)
    held[u.topk(count, largest=False).indices] = True
    held = held.repeat_interleave(each)
    return (
        rows.choose((~held).nonzero()[:, 0], rows.facts.report),
        rows.choose(held.nonzero()[:, 0], f"held out of dataset's {examples}"),
    )
