"""lm-evaluation-harness's tasks in mdm_eval, where the harness is installed."""

from functools import cache
from importlib.util import find_spec
from typing import Any

from mdm_plugin.errors import UserError

OURS = "nelbo, exact_match, reasoning_gym/NAME"


def check_harness_task(task: str, settings: dict[str, Any]) -> None:
    """Check that the harness is there and has the task.

    Args:
        task: its name.
        settings: ``include_path``, a directory of task files besides the harness's own, and
            arguments of ``lm_eval.simple_evaluate`` (num_fewshot, limit, …).

    Raises:
        UserError: if not.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            f"tasks: {task} is not one of {OURS}; for lm-evaluation-harness's tasks install lm-eval"
        )
    if task not in _manager(settings).all_tasks:
        raise UserError(
            f"tasks: {task} is not one of {OURS}, nor of lm-evaluation-harness's tasks "
            "(lm_eval.include_path: a directory with task files of your own)"
        )


def run_harness_task(task: str, settings: dict[str, Any], model: Any) -> dict[str, float]:
    """Evaluate one task, called on every rank; the figures, for the harness's first process.

    Args:
        task, settings: as in ``check_harness_task``.
        model: a ``mdm_plugin.evaluation.harness.Harness``.

    Raises:
        UserError: if the harness refuses the settings.
    """
    import lm_eval

    given = {key: value for key, value in settings.items() if key != "include_path"}
    try:
        result = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=_manager(settings),
            bootstrap_iters=1000,
            **given,
        )
    except TypeError as error:
        raise UserError(f"lm_eval: {error}") from error
    figures = result["results"][task] if result else {}
    return {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float)
    }


def _manager(settings: dict[str, Any]) -> Any:
    path = settings.get("include_path") or ()
    return _tasks(*((path,) if isinstance(path, str) else path))


@cache  # it reads thousands of files
def _tasks(*include_path: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path))
