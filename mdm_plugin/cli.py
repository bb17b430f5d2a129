"""``mdm``: torchtune's command line with this project's recipes and configs registered; a doctor.

Imports are where they are used: ``mdm --help`` needs none of them, and ``mdm doctor`` says what
is wrong where they fail.
"""

import argparse
import gc
import sys
from pathlib import Path

RECIPES = (
    *("mdm_full_finetune", "mdm_lora_finetune", "mdm_dpo", "mdm_grpo"),
    *("mdm_variance", "mdm_generate", "mdm_eval"),
)

HELP = """\
usage: mdm COMMAND …        (mdm COMMAND --help has a command's options)

Fine-tune masked diffusion language models. It is torchtune's command line, tune, which takes
our recipes and configs by name too; mdm lists them.

commands, with an example of each:
  doctor      what is installed, whether it goes together, what this machine can do
                mdm doctor
  download    a model from the Hugging Face hub
                mdm download GSAI-ML/LLaDA-8B-Instruct --output-dir /tmp/LLaDA-8B-Instruct
  ls          recipes and their configs
                mdm ls
  cat         show a config
                mdm cat quickstart
  cp          copy a config, or a recipe, to change it
                mdm cp quickstart my.yaml
  validate    check a config
                mdm validate my.yaml
  run         run a recipe on a config; key=value changes it; on several GPUs, with --nproc_per_node
                mdm run --nproc_per_node 8 mdm_full_finetune --config llada/8B_full batch_size=2

recipes, with an example of each:
  mdm_full_finetune    train all parameters
                         mdm run mdm_full_finetune --config quickstart
  mdm_lora_finetune    train adapters
                         mdm run mdm_lora_finetune --config dream/7B_lora dataset.source=my.jsonl
  mdm_dpo              learn from preferences: all parameters, or adapters
                         mdm run mdm_dpo --config llada/8B_lora_dpo dataset.source=pairs.jsonl
  mdm_grpo             learn from rewards: all parameters, or adapters
                         mdm run mdm_grpo --config quickstart_grpo
  mdm_variance         how noisy are the estimators, and by what
                         mdm run mdm_variance --config quickstart_variance
  mdm_generate         write text
                         mdm run mdm_generate --config quickstart_generate prompts=my.jsonl
  mdm_eval             bounds, right answers, tasks of lm-eval
                         mdm run mdm_eval --config quickstart_eval
"""
COMMANDS = ("doctor", "download", "ls", "cat", "cp", "validate", "run")


def recipe_of(config: str) -> str:
    """The recipe that a packaged config is for."""
    for ending in ("dpo", "grpo", "variance", "generate", "eval"):
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
    from mdm_plugin.config.loading import config_names, configs_directory
    from mdm_plugin.torchtune_internals import Config, Recipe, get_all_recipes

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


def check_recipe(name: str) -> None:
    """End with one line where ``mdm run`` is given a recipe that is neither known nor a module."""
    from importlib.util import find_spec

    from mdm_plugin.config.components import suggest
    from mdm_plugin.torchtune_internals import get_all_recipes

    known = [recipe.name for recipe in get_all_recipes()]
    if name in known or Path(name).is_file() or find_spec(name.split(".")[0]) is not None:
        return
    print(f"error: mdm run {name}: no such recipe{suggest(name, known)}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run torchtune's CLI under the name ``mdm``; help, and the doctor, are our own."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if word == "doctor":
        from mdm_plugin import doctor

        description = "What is installed, whether it goes together, what this machine can do."
        argparse.ArgumentParser("mdm doctor", description=description).parse_args(sys.argv[2:])
        sys.exit(doctor.main(RECIPES))
    if word not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: mdm {word}: no such command (known: {known})", file=sys.stderr)
        sys.exit(2)
    from mdm_plugin.config.loading import config_names, configs_directory
    from mdm_plugin.torchtune_internals import command_line

    register()
    parser = command_line("mdm")
    gc.freeze()  # as a recipe does: else Python takes a second, at the end, to take imports apart
    if sys.argv[1:2] == ["validate"] and len(sys.argv) > 2:
        # torchtune's own takes a path alone; the other subcommands take names.
        name = sys.argv[2]
        if not Path(name).exists() and name in config_names():
            sys.argv[2] = f"{configs_directory() / name}.yaml"
    given = parser.parse_args()
    if word == "run":
        check_recipe(given.recipe)
    parser.run(given)


if __name__ == "__main__":
    main()
