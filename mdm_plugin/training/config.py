"""torchtune's configs, with packaged names, checked before anything runs."""

import argparse
import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config as torchtune_config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args

from mdm_plugin.errors import UserError

# Where a config's ``_component_`` may lead: configs get shared, and a component is called.
ALLOWED = ("mdm_plugin", "torch.optim", "torchtune", "torchao", "bitsandbytes.optim")
_named_by_user: set[str] = set()


def configs_directory() -> Path:
    """Where the packaged configs are: in a wheel within the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the packaged configs, e.g. ``quickstart``."""
    root = configs_directory()
    return sorted(str(f.relative_to(root).with_suffix("")) for f in root.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file of a config given by path or packaged name.

    Raises:
        UserError: if there is none.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = configs_directory() / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    raise UserError(
        f"--config {name}: no such file, and no packaged config of that name"
        f"{_suggest(name, config_names())}"
    )


def load_config(name: str, overrides: list[str], options: type) -> DictConfig:
    """A config with overrides merged as torchtune does, resolved, and checked against ``options``.

    Top-level keys must be fields of ``options``, or be used by an interpolation.

    Args:
        name: path or packaged name.
        overrides: ``key=value`` and ``~key`` arguments.
        options: a dataclass: the recipe's options with their types and defaults.

    Raises:
        UserError: on anything wrong, with the key.
    """
    path = find_config(name)
    overrides = _allow(overrides)
    try:
        text = path.read_text()
        loaded = OmegaConf.create(text)  # its loader reads 2e-5 as a number, PyYAML's does not
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path}: a config is a mapping of keys to values")
        raw = cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))
        merged = _merge_yaml_and_cli_args(argparse.Namespace(**raw), overrides)
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except AssertionError as error:  # OmegaConf's, of a text that is a number
        raise UserError(f"{path}: a config is a mapping of keys to values") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from (
            error
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or 'a key'}: {_first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"command line: {_first_line(error)}") from error
    for key, value in plain.items():
        # torchtune reads key=null, where key is a component, as key._component_=null.
        if isinstance(value, dict) and value.get("_component_", "") is None:
            plain[key] = None
    known = [field.name for field in fields(options)]
    used = set(re.findall(r"\$\{(\w+)", text + " ".join(overrides)))
    for key in [key for key in plain if key not in known]:
        if key not in used:
            where = "command line" if key not in raw else str(path)
            raise UserError(f"{where}: {key}: unknown key{_suggest(str(key), known)}")
        del plain[key]
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(options), plain)
        for key in known:
            if OmegaConf.is_missing(cfg, key):
                raise UserError(f"{path}: {key}: missing: set it")
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {_first_line(error)}") from error
    assert isinstance(cfg, DictConfig)
    _leave_out_arguments(cfg, raw, overrides)
    for key in known:
        if isinstance(cfg[key], DictConfig) and "_component_" in cfg[key]:
            _check_arguments(cfg, key)
    return cfg


def _allow(overrides: list[str]) -> list[str]:
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


def _is_allowed(path: str) -> bool:
    """Whether ``path`` is in a package of ``ALLOWED``, or of what the user allows."""
    return any(path == x or path.startswith(f"{x}.") for x in (*ALLOWED, *_named_by_user))


def _leave_out_arguments(cfg: DictConfig, raw: dict[str, Any], overrides: list[str]) -> None:
    """Where the command line names another component, the file's arguments that it does not take.

    So ``timesteps=mdm_plugin.timesteps.Uniform`` needs no ``~timesteps.grid`` beside it.
    """
    given = {argument.split("=")[0] for argument in overrides}
    for key, before in raw.items():
        if not isinstance(before, dict) or not given & {key, f"{key}._component_"}:
            continue
        if not isinstance(cfg.get(key), DictConfig):
            continue
        takes = inspect.signature(_component(cfg, key)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            continue
        for name in before.keys() - takes.keys() - {"_component_"}:
            if name in cfg[key] and f"{key}.{name}" not in given:
                del cfg[key][name]
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"{key}.{name}: left out: {cfg[key]._component_} does not take it")


def instantiate(cfg: DictConfig, key: str, *args: Any, where: str = "", **kwargs: Any) -> Any:
    """What ``cfg[key]._component_`` builds, by torchtune's ``instantiate``; None for None.

    ``where`` precedes the key in a message, where ``cfg`` is a part of the config.

    Raises:
        UserError: if the component cannot be imported, called so, or refuses a value.
    """
    if cfg[key] is None:
        return None
    component = _check_arguments(cfg, key, where)
    given = {k: v for k, v in cfg[key].items() if k != "_component_"}
    try:
        inspect.signature(component).bind(*args, **{**given, **kwargs})
    except TypeError as error:
        raise UserError(f"{where}{key}: {cfg[key]._component_}: {error}") from error
    try:
        return torchtune_config.instantiate(cfg[key], *args, **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"{where}{key}: {_first_line(error)}") from error


def parse(options: type) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``main(cfg)`` a command: ``--config NAME key=value …``, checked against ``options``.

    A ``UserError`` ends it with one line on stderr and exit code 2; ``MDM_TRACEBACK=1`` in the
    environment shows where it was raised.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            parser = argparse.ArgumentParser(description=main.__doc__)
            parser.add_argument("--config", required=True, help="file or packaged name")
            try:
                known, overrides = parser.parse_known_args()
                for argument in overrides:
                    if argument.startswith("--"):
                        raise UserError(
                            f"command line: {argument}: write overrides as key=value, no dashes"
                        )
                main(load_config(known.config, overrides, options))
            except UserError as error:
                if os.environ.get("MDM_TRACEBACK") == "1":
                    raise
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"error: {error}", file=sys.stderr, flush=True)
                sys.exit(2)

        return command

    return decorate


def _component(cfg: DictConfig, key: str, where: str = "") -> Callable[..., Any]:
    path = cfg[key].get("_component_")
    if not isinstance(path, str):
        raise UserError(
            f"{where}{key}._component_: missing: name a class or function by its dotted path"
        )
    refusal = (
        f"{where}{key}._component_: {path}: not in {', '.join(ALLOWED)}: if it is code of "
        f"your own, allow it on the command line: allow_components=[{path.split('.')[0]}]"
    )
    if not _is_allowed(path):
        raise UserError(refusal)
    if os.getcwd() not in sys.path:  # as torchtune does: a user's own file may be the component
        sys.path.append(os.getcwd())
    try:
        component = _get_component_from_path(path)
        inspect.signature(component)
        # An allowed package has others' modules among its names (torchtune.….os.system).
        inner = component.func if isinstance(component, functools.partial) else component
        home = f"{inner.__module__}.{getattr(inner, '__qualname__', '')}"
        if not (_is_allowed(home) or path in _named_by_user):
            raise UserError(f"{refusal} (it is {home})")
    except (InstantiationError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"{where}{key}._component_: {path} cannot be imported: {_last_cause(error)}"
        ) from error
    return component


def _check_arguments(cfg: DictConfig, key: str, where: str = "") -> Callable[..., Any]:
    component = _component(cfg, key, where)
    parameters = inspect.signature(component).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in cfg[key]:
            if name != "_component_" and name not in parameters:
                raise UserError(
                    f"{where}{key}.{name}: {cfg[key]._component_} takes no such argument"
                    f"{_suggest(name, parameters)}"
                )
    return component


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f" (known: {', '.join(known)})" if len(list(known)) <= 12 else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    while error.__cause__ is not None:
        yield error
        error = error.__cause__
    yield error


def _last_cause(error: BaseException) -> str:
    return _first_line(Exception(str(list(_causes(error))[-1])))
