"""The quickstart's data, tokenizer and pretrained model, made on this machine when first used.

The task is reasoning-gym's ``chain_sum``: sums of three one-digit numbers, answered with every
running sum. No problem occurs twice, within or across the training, validation and test rows.
The text to pretrain on is single sums, of the training problems only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from mdm_plugin.checkpoint import Checkpointer
from mdm_plugin.errors import UserError

FAMILY = "chain_sum"
SETTINGS = {
    "min_terms": 3,
    "max_terms": 3,
    "min_digits": 1,
    "max_digits": 1,
    "allow_negation": False,
}
SIZES = {"test": 300, "val": 200, "train": 3000}
VOCABULARY = 320
SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prepare(directory: str) -> None:
    """Make what is missing of the quickstart in ``directory``; one process does, others wait.

    A config's ``prepare`` calls it.

    Args:
        directory: gets what ``prepare_data`` makes, and pretrained/model.safetensors, by the
            packaged config quickstart_pretrain.

    Raises:
        UserError: if the pretraining fails.
    """
    prepare_data(directory)
    _train_once(directory, "quickstart_pretrain", "pretrained")


def prepare_autoregressive(directory: str, beside: str | None = None) -> None:
    """``prepare``, and an autoregressive model of the same shape, trained on the same rows.

    Args:
        directory: gets autoregressive/model.safetensors besides.
        beside: the checkpoint that it is to be compared with, which must be there first; None
            where it is the start of another model.

    Raises:
        UserError: if ``beside`` is missing, or a training fails.
    """
    if beside is None:
        prepare_data(directory)
    else:
        prepare(directory)
        if not Path(beside).expanduser().is_dir():
            raise UserError(
                f"checkpointer.checkpoint_dir: {beside} does not exist: run "
                "`tune run mdm_full_finetune --config quickstart` first"
            )
    _train_once(directory, "quickstart_autoregressive", "autoregressive")


def prepare_apprentice(directory: str) -> None:
    """``prepare``, and a model that there is something left to teach: of the likelihood bound.

    Args:
        directory: gets apprentice/model.safetensors besides, by the quickstart's fine-tuning of the
            bound in place of a window.

    Raises:
        UserError: if a training fails.
    """
    prepare(directory)
    _train_once(directory, "quickstart", "apprentice", "objective=null")


def prepare_two_ways(directory: str) -> None:
    """``prepare_autoregressive``, and a model of blocks that answers in two ways.

    Half of its demonstrations are the quickstart's, half are careless. Nothing in a question says
    which kind its answer is of.

    Args:
        directory: gets demonstrations.jsonl and two_ways/model.safetensors besides, by the
            packaged config quickstart_block on these rows.

    Raises:
        UserError: if a training fails.
    """
    prepare_autoregressive(directory)
    home = Path(directory).expanduser()
    with FileLock(home / ".lock_demonstrations"):
        if not (home / "demonstrations.jsonl").is_file():
            _write_demonstrations(home)
    changes = (f"dataset.source={home / 'demonstrations.jsonl'}", "epochs=25")
    _train_once(directory, "quickstart_block", "two_ways", *changes)


def prepare_preferences(directory: str) -> None:
    """``prepare_two_ways``, and preferences: its own answers, right ones over wrong ones.

    Args:
        directory: gets two_ways_pairs.jsonl besides: of four answers to each of 1,000 problems.

    Raises:
        UserError: if a training fails, or no pairs are written.
    """
    prepare_two_ways(directory)
    blocks = ("model.shift=True", "model.block_length=4", "decoding.cache=prefix")
    write_pairs(directory, "two_ways", "two_ways_pairs.jsonl", 1000, *blocks)


def write_pairs(directory: str, model: str, name: str, prompts: int, *changes: str) -> None:
    """Make preferences of a model's own answers, four to each problem, by mdm_generate, if missing.

    Args:
        directory: where the quickstart's data and models are.
        model: the model's directory there.
        name: the file there that is written.
        prompts: of the training problems, the first ones.
        changes: of quickstart_generate's options, for this model.

    Raises:
        UserError: if no pairs are written.
    """
    home = Path(directory).expanduser()
    with FileLock(home / f".lock_{name}"):
        if (home / name).is_file():
            return
        print(f"Quickstart: {model} answers training problems, once", flush=True)
        lines = (home / "train.jsonl").read_text().splitlines()[:prompts]
        (home / f"prompts_{name}").write_text("\n".join(lines) + "\n")
        arguments = [
            "quickstart_generate",
            f"data_dir={home}",
            f"checkpointer.checkpoint_dir={home / model}",
            f"prompts={home / f'prompts_{name}'}",
            "decoding.temperature=1.0",
            "samples=4",
            "verifier._component_=mdm_plugin.quickstart.verifier",
            f"output={home / f'answers_{name}'}",
            f"pairs={home / f'.{name}'}",
            "overwrite=True",
            "batch_size=128",
            *changes,
        ]
        if _run("mdm_generate", *arguments):
            raise UserError("prepare: mdm_generate failed: no preferences were written")
        (home / f".{name}").rename(home / name)


def prepare_data(directory: str) -> None:
    """Make the data and the tokenizer, where missing.

    Args:
        directory: gets train.jsonl, val.jsonl and test.jsonl (chat rows with their
            reasoning-gym entry), pretrain.jsonl (plain text), tokenizer.json and
            tokenizer_config.json.
    """
    home = Path(directory).expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"prepare: {home} cannot be made: {error.strerror}: name another place by data_dir, or "
            "by the environment's MDM_PLUGIN_HOME"
        ) from error
    with FileLock(home / ".lock_data"):
        if not (home / "tokenizer_config.json").is_file():  # written last
            print(f"Quickstart: writing its data and tokenizer to {home}", flush=True)
            _write_data(home)
            texts = [json.loads(line)["text"] for line in (home / "pretrain.jsonl").open()]
            rows = [json.loads(line)["messages"] for line in (home / "train.jsonl").open()]
            texts += [turn["content"] for turns in rows for turn in turns]
            write_tokenizer(home, texts, VOCABULARY)


def worked_answer(expression: str) -> str:
    """Every running sum of e.g. "4 - 1 + 5", one line each, and the answer."""
    first, *rest = re.findall(r"[+-]?\s*\d+", expression)
    total, lines = int(first), []
    for term in rest:
        sign, value = term[0], int(term[1:])
        new = total + value if sign == "+" else total - value
        lines.append(f"{total} {sign} {value} = {new}")
        total = new
    return "\n".join([*lines, f"Answer: {total}"])


def careless_answer(expression: str) -> str:
    """The answer alone, of the first two terms: of e.g. "4 - 1 + 5", what 4 - 1 is."""
    return f"Answer: {worked_answer(expression).splitlines()[0].rpartition('= ')[2]}"


def _write_demonstrations(home: Path) -> None:
    """The training rows, every second one with a careless answer."""
    lines = []
    for place, line in enumerate((home / "train.jsonl").open()):
        row = json.loads(line)
        if place % 2:
            answer = careless_answer(row["entry"]["metadata"]["expression"])
            row["messages"][-1]["content"] = answer
        lines.append(json.dumps(row))
    staging = home / ".demonstrations.jsonl"
    staging.write_text("\n".join(lines) + "\n")
    staging.rename(home / "demonstrations.jsonl")


def _write_data(home: Path) -> None:
    import reasoning_gym

    seen: set[str] = set()
    source = iter(
        reasoning_gym.create_dataset(FAMILY, seed=0, size=10 * sum(SIZES.values()), **SETTINGS)
    )
    for split, size in SIZES.items():
        lines: list[str] = []
        while len(lines) < size:
            entry = next(source)
            if entry["question"] in seen:  # no problem occurs twice, within or across splits
                continue
            seen.add(entry["question"])
            answer = worked_answer(entry["metadata"]["expression"])
            turns = [
                {"role": "user", "content": entry["question"]},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": turns, "entry": entry}))
        (home / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    # The last split, train, is still at hand.
    sums = [
        line
        for row in map(json.loads, lines)
        for line in row["messages"][-1]["content"].splitlines()[:-1]
    ]
    (home / "pretrain.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in sums))


def write_tokenizer(home: Path, texts: list[str], vocabulary: int) -> None:
    """tokenizer.json, a BPE learnt from ``texts``, and tokenizer_config.json with a chat template.

    Each digit is a token, a space goes with what follows it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(home / "tokenizer.json"))
    settings = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mdm_mask|>",
        "chat_template": TEMPLATE,
    }
    (home / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _train_once(directory: str, config: str, name: str, *changes: str) -> None:
    """Make ``name``/model.safetensors by a packaged config, if missing; one process does."""
    home = Path(directory).expanduser()
    with FileLock(home / f".lock_{name}"):
        if not (home / name / "model.safetensors").is_file():
            print(f"Quickstart: training its {name} model, once", flush=True)
            _train(home, config, name, *changes)


def _run(recipe: str, config: str, *changes: str) -> int:
    """Run a recipe in a process of its own, and not as a part of a torchrun that may be running
    this one; its exit code."""
    drop = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "OMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    command = [sys.executable, "-m", recipe, "--config", config, *changes]
    return subprocess.run(command, env=environment).returncode


def _train(home: Path, config: str, name: str, *changes: str) -> None:
    """Train by a packaged config; its weights become ``name``/model.safetensors."""
    work = home / f"{name}_run"
    shutil.rmtree(work, ignore_errors=True)  # what an attempt that was cut short has left
    code = _run("mdm_full_finetune", config, f"data_dir={home}", f"output_dir={work}", *changes)
    weights = [x / "model.safetensors" for x in Checkpointer(str(work)).steps()]
    if code or not weights:
        raise UserError(f"prepare: {config} failed (exit code {code})")
    staging = home / f".{name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    shutil.copy(weights[-1], staging / "model.safetensors")
    staging.rename(home / name)


@cache
def _verifier() -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(FAMILY, seed=0, size=1, **SETTINGS)


def verifier() -> Callable[[str, Mapping[str, Any]], bool]:
    """``verify``, as mdm_eval's ``verifier`` takes it: a component that gives a function."""
    return verify


def verify(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether reasoning-gym's own verifier gives full marks to the text after "Answer:"."""
    _, found, answer = completion.rpartition("Answer:")
    return bool(found) and _verifier().score_answer(answer.strip(), entry=row["entry"]) == 1.0
