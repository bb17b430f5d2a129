"""torchtune's configs, with packaged names, checked before anything runs."""

import argparse
import copy
import functools
import gc
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mdm_plugin.config.components import allow, check_arguments, find_component, first_line, suggest
from mdm_plugin.config.options import ALL_OPTIONS
from mdm_plugin.errors import UserError

SECONDS_FOR_THE_FIRST_RANK = 3


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
        f"{suggest(name, config_names())}"
    )


def load_config(name: str, overrides: list[str], options: type) -> DictConfig:
    """A config with overrides merged as torchtune does, resolved, and checked against ``options``.

    Top-level keys must be fields of ``options``, or be used by an interpolation.

    Args:
        name: path or packaged name.
        overrides: ``key=value`` and ``~key`` arguments; what follows the first "=" is the value.
            Where the option is a text (str), it stays as it is, but for null, None and nothing,
            which unset it; elsewhere it is read as YAML.
        options: a dataclass: the recipe's options with their types and defaults.

    Raises:
        UserError: on anything wrong, with the key.
    """
    path = find_config(name)
    overrides = allow(overrides)
    raw, plain, text = _merged(path, overrides, options)
    known = [field.name for field in fields(options)]
    used = set(re.findall(r"\$\{(\w+)", text + " ".join(overrides)))
    for key in [key for key in plain if key not in known]:
        if key not in used:
            where = "command line" if key not in raw else str(path)
            if key in raw and any(key == x.name for cls in ALL_OPTIONS for x in fields(cls)):
                raise UserError(f"{where}: {key}: is for another recipe: mdm ls says for which")
            raise UserError(f"{where}: {key}: unknown key{suggest(str(key), known)}")
        del plain[key]
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(options), plain)
        order = {key: i for i, key in enumerate(known)}
        missing = sorted(
            OmegaConf.missing_keys(cfg), key=lambda x: (order[re.split(r"\W", x)[0]], x)
        )
        if missing:
            raise UserError(f"{path}: {missing[0]}: missing: set it")
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {first_line(error)}") from error
    assert isinstance(cfg, DictConfig)
    _leave_out_arguments(cfg, raw, overrides)
    for key in known:
        if isinstance(cfg[key], DictConfig) and "_component_" in cfg[key]:
            check_arguments(cfg, key)
    return cfg


def _merged(
    path: Path, overrides: list[str], options: type
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A config's keys as the file has them, and merged with overrides and resolved; its text.

    Raises:
        UserError: if it cannot be read, is no mapping, or an override or a reference is wrong.
    """
    try:
        text = path.read_text()
        loaded = OmegaConf.create(text)  # its loader reads 2e-5 as a number, PyYAML's does not
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path}: a config is a mapping of keys to values")
        raw = cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))
        merged = _with_arguments(raw, overrides, options)
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except AssertionError as error:  # OmegaConf's, of a text that is a number
        raise UserError(f"{path}: a config is a mapping of keys to values") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        where = str(path)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            where += f":{error.problem_mark.line + 1}"
        raise UserError(f"{where}: not valid YAML: {_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or 'a key'}: {first_line(error)}") from error
    for key, value in plain.items():
        # torchtune reads key=null, where key is a component, as key._component_=null.
        if isinstance(value, dict) and value.get("_component_", "") is None:
            plain[key] = None
    return raw, plain, text


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, in a line."""
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return problem or first_line(error)


def _with_arguments(raw: dict[str, Any], arguments: list[str], options: type) -> DictConfig:
    """A file's keys with ``key=value`` and ``~key`` merged into them, by torchtune's rules.

    torchtune's own function splits at every "=", and makes a list of the prompt "[1, 2]".

    Raises:
        UserError: on an argument that is neither, or names a key that is not there.
    """
    rest = copy.deepcopy(raw)
    for argument in arguments:
        if argument.startswith("~"):
            with _named(argument):
                _remove(rest, argument[1:].split("=")[0])
    merged = OmegaConf.create(rest)
    for argument in arguments:
        if not argument.startswith("~"):
            with _named(argument):
                merged.merge_with(_read(argument, raw, options))
    return merged


def _read(argument: str, raw: dict[str, Any], options: type) -> DictConfig:
    """What ``key=value`` sets.

    Raises:
        UserError, YAMLError, OmegaConfBaseException: if it cannot be read.
    """
    key, found, value = argument.partition("=")
    if not (key and found):
        raise UserError("write overrides as key=value")
    hint = get_type_hints(options).get(key)
    if hint in (str, str | None):
        if any(field.name == key and "verbatim" in field.metadata for field in fields(options)):
            value = _literal(_literal(value))  # twice, as it will be resolved twice
        return OmegaConf.create({key: None if value in ("", "null", "None") else value})
    component = isinstance(raw.get(key), dict) and "_component_" in raw[key]
    if raw.get(key) is None and hint in (dict[str, Any], dict[str, Any] | None):
        component = not value.startswith("{") and value not in ("", "null", "None")
    place = f"{key}._component_" if component else key
    return OmegaConf.from_dotlist([f"{place}={'null' if value == 'None' else value}"])


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Whatever goes wrong with an argument is said with it."""
    try:
        yield
    except yaml.YAMLError as error:
        what = f"not valid YAML: {_problem(error)}"
        raise UserError(f"command line: {argument}: {what}") from error
    except (UserError, OmegaConfBaseException, TypeError) as error:
        raise UserError(f"command line: {argument}: {first_line(error)}") from error


def _remove(keys: dict[str, Any], path: str) -> None:
    """Take away a key, given by dots, and what that leaves empty.

    Raises:
        UserError: if there is none, or it is a component.
    """
    key, _, inner = path.partition(".")
    if not isinstance(keys, dict) or key not in keys:
        raise UserError("the config has no such key")
    if inner:
        _remove(keys[key], inner)
    elif key == "_component_" or (isinstance(keys[key], dict) and "_component_" in keys[key]):
        raise UserError("a component cannot be taken away, but be set to null: key=null")
    if not (inner and keys[key]):
        del keys[key]


def _literal(text: str) -> str:
    """What OmegaConf resolves to ``text``: to it, ${…} is a reference, and ??? a missing value."""
    if re.fullmatch(r"\\*\?\?\?", text):
        return "\\" + text
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _leave_out_arguments(cfg: DictConfig, raw: dict[str, Any], overrides: list[str]) -> None:
    """Where the command line names another component, the file's arguments that it does not take.

    So ``timesteps=mdm_plugin.timesteps.Uniform`` needs no ``~timesteps.grid`` beside it, and
    ``dataset_val._component_=…`` no ``~dataset_val.split``, which is no data set's argument there.
    """
    given = {argument.split("=")[0] for argument in overrides}
    for key, before in raw.items():
        if not isinstance(before, dict) or not given & {key, f"{key}._component_"}:
            continue
        if not isinstance(cfg.get(key), DictConfig) or "_component_" not in cfg[key]:
            continue
        takes = inspect.signature(find_component(cfg, key)).parameters
        others, why = before.keys() - {"_component_"}, "is in its place"
        if "_component_" in before:
            any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
            others, why = set() if any_name else others - takes.keys(), "does not take it"
        for name in sorted(others):
            if name in cfg[key] and f"{key}.{name}" not in given:
                del cfg[key][name]
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"{key}.{name}: left out: {cfg[key]._component_} {why}")


def parse(options: type) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make ``main(cfg)`` a command: ``--config NAME key=value …``, checked against ``options``.

    A ``UserError`` ends it with one line on stderr and exit code 2, of whichever rank it is;
    ``MDM_TRACEBACK=1`` in the environment shows where it was raised.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            parser = argparse.ArgumentParser(description=main.__doc__)
            parser.add_argument("--config", required=True, help="file or packaged name")
            # What the imports made lives as long as the process: half a million objects, which
            # each full collection, in training too, would look through for a quarter of a second,
            # and Python's end for longer.
            gc.freeze()
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
                local = os.environ.get("LOCAL_RANK", "0")
                rank = os.environ.get("RANK", local)
                if local != "0":
                    # torchrun ends all ranks of a node once one has ended: within this time, if
                    # the first one says so too. What only this one has met is said by it.
                    time.sleep(SECONDS_FOR_THE_FIRST_RANK)
                who = "" if rank == "0" else f"rank {rank}: "
                print(f"error: {who}{error}", file=sys.stderr, flush=True)
                sys.exit(2)

        return command

    return decorate
