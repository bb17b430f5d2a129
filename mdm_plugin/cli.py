"""``mdm``: torchtune's command line with this project's recipes and configs registered."""

import gc
import sys
from pathlib import Path

from mdm_plugin.config.loading import config_names, configs_directory
from mdm_plugin.torchtune_internals import Config, Recipe, command_line, get_all_recipes

RECIPES = ("mdm_full_finetune", "mdm_lora_finetune", "mdm_variance", "mdm_generate", "mdm_eval")


def recipe_of(config: str) -> str:
    """The recipe that a packaged config is for."""
    for ending in ("variance", "generate", "eval"):
        if config.endswith(ending):
            return f"mdm_{ending}"
    return "mdm_lora_finetune" if config.endswith("lora") else "mdm_full_finetune"


def recipe_file(name: str) -> Path:
    """The file of one of our recipes, which is a top-level module."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the recipe {name} is not installed")
    return Path(spec.origin)


def register() -> None:
    """Put our recipes and configs before torchtune's own in its registry.

    torchtune joins a recipe's path to its own directory, which leaves an absolute path as it is.
    """
    registry = get_all_recipes()
    known = {recipe.name for recipe in registry}
    for position, name in enumerate(RECIPES):
        if name in known:
            continue
        configs = [
            Config(name=config, file_path=f"{configs_directory() / config}.yaml")
            for config in config_names()
            if recipe_of(config) == name
        ]
        recipe = Recipe(
            name=name, file_path=str(recipe_file(name)), configs=configs, supports_distributed=True
        )
        registry.insert(position, recipe)


def main() -> None:
    """Run torchtune's CLI under the name ``mdm``."""
    register()
    parser = command_line("mdm")
    gc.freeze()  # as a recipe does: else Python takes a second, at the end, to take imports apart
    if sys.argv[1:2] == ["validate"] and len(sys.argv) > 2:
        # torchtune's own takes a path alone; the other subcommands take names.
        name = sys.argv[2]
        if not Path(name).exists() and name in config_names():
            sys.argv[2] = f"{configs_directory() / name}.yaml"
    parser.run(parser.parse_args())


if __name__ == "__main__":
    main()
