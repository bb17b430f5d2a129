"""torchtune's configs, with packaged names, checked before anything runs."""

import argparse
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mdm_plugin.config.components import allow, check_arguments, find_component, first_line, suggest
from mdm_plugin.errors import UserError
from mdm_plugin.torchtune_internals import merge_yaml_and_arguments


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
        overrides: ``key=value`` and ``~key`` arguments.
        options: a dataclass: the recipe's options with their types and defaults.

    Raises:
        UserError: on anything wrong, with the key.
    """
    path = find_config(name)
    overrides = allow(overrides)
    raw, plain, text = _merged(path, overrides)
    known = [field.name for field in fields(options)]
    used = set(re.findall(r"\$\{(\w+)", text + " ".join(overrides)))
    for key in [key for key in plain if key not in known]:
        if key not in used:
            where = "command line" if key not in raw else str(path)
            raise UserError(f"{where}: {key}: unknown key{suggest(str(key), known)}")
        del plain[key]
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(options), plain)
        for key in known:
            if OmegaConf.is_missing(cfg, key):
                raise UserError(f"{path}: {key}: missing: set it")
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {first_line(error)}") from error
    assert isinstance(cfg, DictConfig)
    _leave_out_arguments(cfg, raw, overrides)
    for key in known:
        if isinstance(cfg[key], DictConfig) and "_component_" in cfg[key]:
            check_arguments(cfg, key)
    return cfg


def _merged(path: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
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
        merged = merge_yaml_and_arguments(argparse.Namespace(**raw), overrides)
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except AssertionError as error:  # OmegaConf's, of a text that is a number
        raise UserError(f"{path}: a config is a mapping of keys to values") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        where, what = str(path), str(error)
        if isinstance(error, yaml.MarkedYAMLError):
            where += f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            what = error.problem or what
        raise UserError(f"{where}: not valid YAML: {what}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or 'a key'}: {first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"command line: {first_line(error)}") from error
    for key, value in plain.items():
        # torchtune reads key=null, where key is a component, as key._component_=null.
        if isinstance(value, dict) and value.get("_component_", "") is None:
            plain[key] = None
    return raw, plain, text


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
        takes = inspect.signature(find_component(cfg, key)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            continue
        for name in before.keys() - takes.keys() - {"_component_"}:
            if name in cfg[key] and f"{key}.{name}" not in given:
                del cfg[key][name]
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"{key}.{name}: left out: {cfg[key]._component_} does not take it")


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
