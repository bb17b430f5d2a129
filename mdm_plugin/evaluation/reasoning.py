"""Tasks of reasoning-gym, each with its own verifier."""

from collections.abc import Callable, Mapping
from typing import Any

from mdm_plugin.errors import UserError


def reasoning_gym_task(
    name: str, settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], Callable[[str, Mapping[str, Any]], bool]]:
    """Rows ({messages, entry}) of a task, and its verifier.

    The answer is what comes after the last "Answer:" of a completion, else the whole of it; it is
    right when the task's own verifier gives it full marks.

    Args:
        name: of the task, e.g. ``chain_sum``.
        settings: of the task: ``size``, ``seed``, and its own.

    Raises:
        UserError: if there is no such task, or it does not take the settings.
    """
    import reasoning_gym

    try:
        data = reasoning_gym.create_dataset(name, **{"size": 100, "seed": 0, **settings})
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"tasks: reasoning_gym/{name}: {' '.join(str(error).split())}") from error
    rows = [
        {"messages": [{"role": "user", "content": entry["question"]}], "entry": dict(entry)}
        for entry in data
    ]

    def verify(completion: str, row: Mapping[str, Any]) -> bool:
        answer = completion.rpartition("Answer:")[2].strip()
        return data.score_answer(answer, entry=row["entry"]) == 1.0

    return rows, verify
