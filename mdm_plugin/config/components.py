"""Components that a config names by dotted path: which may be, and what they are built with."""

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig
from torchtune import config as torchtune_config

from mdm_plugin.errors import UserError
from mdm_plugin.torchtune_internals import InstantiationError, component_from_path

# Where a config's ``_component_`` may lead: configs get shared, and a component is called.
ALLOWED = ("mdm_plugin", "torch.optim", "torchtune", "torchao", "bitsandbytes.optim")

_named_by_user: set[str] = set()


def allow(overrides: list[str]) -> list[str]:
    """Note whose components the user allows; the overrides without ``allow_components``.

    Those that the command line names itself, those of ``allow_components=[package, …]`` there, and
    those of ``MDM_ALLOW_COMPONENTS``, comma-separated. A config file cannot allow any.
    """
    names = os.environ.get("MDM_ALLOW_COMPONENTS", "").split(",")
    rest = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "allow_components":
            names += value.strip("[]").split(",")
            continue
        names += [value] if key.endswith("._component_") or "." in value else []
        rest.append(override)
    _named_by_user.clear()
    _named_by_user.update(name.strip() for name in names if name.strip())
    return rest


def is_allowed(path: str) -> bool:
    """Whether ``path`` is in a package of ``ALLOWED``, or of what the user allows."""
    return any(path == x or path.startswith(f"{x}.") for x in (*ALLOWED, *_named_by_user))


def instantiate(cfg: DictConfig, key: str, *args: Any, where: str = "", **kwargs: Any) -> Any:
    """What ``cfg[key]._component_`` builds, by torchtune's ``instantiate``; None for None.

    ``where`` precedes the key in a message, where ``cfg`` is a part of the config.

    Raises:
        UserError: if the component cannot be imported, called so, or refuses a value.
    """
    if cfg[key] is None:
        return None
    component = check_arguments(cfg, key, where)
    given = {k: v for k, v in cfg[key].items() if k != "_component_"}
    try:
        inspect.signature(component).bind(*args, **{**given, **kwargs})
    except TypeError as error:
        raise UserError(f"{where}{key}: {cfg[key]._component_}: {error}") from error
    try:
        return torchtune_config.instantiate(cfg[key], *args, **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{where}{key}: {first_line(error)}") from error


def find_component(cfg: DictConfig, key: str, where: str = "") -> Callable[..., Any]:
    path = cfg[key].get("_component_")
    if not isinstance(path, str):
        raise UserError(
            f"{where}{key}._component_: missing: name a class or function by its dotted path"
        )
    refusal = (
        f"{where}{key}._component_: {path}: not in {', '.join(ALLOWED)}: if it is code of "
        f"your own, allow it on the command line: allow_components=[{path.split('.')[0]}]"
    )
    if "." not in path:
        raise UserError(
            f"{where}{key}._component_: {path}: write its dotted path, such as "
            "mdm_plugin.timesteps.Uniform"
        )
    if not is_allowed(path):
        raise UserError(refusal)
    if os.getcwd() not in sys.path:  # as torchtune does: a user's own file may be the component
        sys.path.append(os.getcwd())
    try:
        component = component_from_path(path)
        inspect.signature(component)
        # An allowed package has others' modules among its names (torchtune.….os.system).
        inner = component.func if isinstance(component, functools.partial) else component
        home = f"{inner.__module__}.{getattr(inner, '__qualname__', '')}"
        if not (is_allowed(home) or path in _named_by_user):
            raise UserError(f"{refusal} (it is {home})")
    except (InstantiationError, ValueError, TypeError, ImportError, SyntaxError) as error:
        raise UserError(
            f"{where}{key}._component_: {path} cannot be imported: "
            f"{_reason(path) or last_cause(error)}"
        ) from error
    return component


def _reason(path: str) -> str:
    """Why the module of a path cannot be imported, or what it has in place of the last name."""
    module, _, name = path.rpartition(".")
    try:
        known = [x for x in vars(importlib.import_module(module)) if not x.startswith("_")]
    except SyntaxError as error:
        return f"{error.filename}:{error.lineno}: {error.msg}"
    except Exception as error:  # whatever that module does when it is imported
        return first_line(error)
    return "" if name in known else f"{module} has no {name}{suggest(name, known)}"


def check_arguments(cfg: DictConfig, key: str, where: str = "") -> Callable[..., Any]:
    component = find_component(cfg, key, where)
    parameters = inspect.signature(component).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in cfg[key]:
            if name != "_component_" and name not in parameters:
                raise UserError(
                    f"{where}{key}.{name}: {cfg[key]._component_} takes no such argument"
                    f"{suggest(name, parameters)}"
                )
    return component


def suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f" (known: {', '.join(known)})" if len(list(known)) <= 12 else ""


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        yield error
        error = error.__cause__
    yield error


def last_cause(error: BaseException) -> str:
    return first_line(Exception(str(list(_causes(error))[-1])))
