"""The parts, and the cases of each: jobs at 8B with random weights, and the other benchmarks."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.data import MASK, mixed, write_rows, write_tokenizer

ROOT = Path(__file__).parents[2]


class Given(NamedTuple):
    """Where and how the cases run.

    output: the directory of the results. device: cuda or cpu. tiny: the same at sizes for a test.
    run: runs ``python`` with these words in a process of its own and gives what it prints.
    """

    output: Path
    device: str
    tiny: bool
    run: Callable[[list[str]], str]


class Case(NamedTuple):
    """What is measured on its own: its name, and what measures it."""

    name: str
    measure: Callable[[Given], dict[str, Any]]


# Builders of each family at any size, and what makes them tiny.
FAMILIES = {
    "llada": "mdm_plugin.models.{}llada",
    "dream": "mdm_plugin.models.{}dream",
    "sdar": "mdm_plugin.models.{}qwen3",
}
TINY = (
    *("model.vocab_size=640", "model.embed_dim=128", "model.intermediate_dim=256"),
    *("model.num_layers=1", "model.num_heads=4", "model.max_seq_len=128"),
)
TINY_GRPO = ("max_new_tokens=8", "decoding.block_length=8", "decoding.steps=4", "group_size=2")
PADDED = ("train_eos_padding=False",)
PACKED = (*PADDED, "batch_layout=packed")
EIGHT_BITS = ("master_dtype=bf16", "optimizer=torchao.optim.AdamW8bit", "~optimizer.fused")
SIZE = {"even": 16, "mixed": 64, "short": 64}  # rows of each kind


def data(given: Given, kind: str) -> Path:
    """The directory of a tokenizer and of rows: ``even`` are all as long as the model takes,
    ``mixed`` are log-normal, ``short`` of 256 tokens."""
    place = given.output / f"data-{'tiny-' if given.tiny else ''}{kind}"
    if not (place / "rows.jsonl").is_file():
        place.mkdir(parents=True, exist_ok=True)
        longest = 64 if given.tiny else 4096
        count = 8 if given.tiny else SIZE[kind]
        lengths = {
            "even": [longest] * count,
            "mixed": mixed(count, longest // 4, longest),
            "short": [min(256, longest)] * count,
        }[kind]
        words = 500 if given.tiny else 50_000
        write_tokenizer(place, words)
        write_rows(place, lengths, words)
    return place


def overrides(given: Given, recipe: str, config: str, place: Path) -> list[str]:
    """What makes a packaged config run on ``data``, from random weights; and tiny."""
    common = [
        *(f"tokenizer.path={place}", f"tokenizer.mask_token={MASK}", f"device={given.device}"),
        *("checkpointer.checkpoint_dir=null", "run_val_every_n_steps=null", "lr_scheduler=null"),
        *("resume_from_checkpoint=False", "save_every_n_epochs=1"),
    ]
    if recipe == "mdm_grpo":
        common += [f"prompts={place / 'prompts.jsonl'}", "~rewards.right.task"]
        common += ["rewards.right._component_=mdm_plugin.alignment.rewards.brevity"]
        common += ["rewards.right.characters=2000", "global_batch_size=1"]
        common += TINY_GRPO if given.tiny else ()
    else:
        file = "pairs" if recipe == "mdm_dpo" else "rows"
        common += [f"dataset.source={place / file}.jsonl", "dataset_val=null"]
        if recipe != "mdm_dpo":
            common += ["timesteps._component_=mdm_plugin.timesteps.Stratified"]
            common += [] if config.startswith("sdar") else ["~timesteps.grid"]
    if given.tiny:
        family = config.split("/")[0]
        kind = "qlora_" if "qlora" in config else "lora_" if "lora" in config else ""
        builder = FAMILIES[family].format(kind.removeprefix("q"))
        common += [f"model={builder}", *TINY, "tokenizer.max_seq_len=64"]
        common += ["model.num_kv_heads=4"] if family != "llada" else []
        common += ["model.head_dim=32"] if family == "sdar" else []
        common += ["model.quantize_base=True"] if kind == "qlora_" else []
    return common


def job(
    measure: str, recipe: str, config: str, *more: str, kind: str = "even", steps: int = 5
) -> Callable[[Given], dict[str, Any]]:
    """A recipe at random weights, measured by ``benchmarks.gpu.job`` on rows of that kind."""

    def run(given: Given) -> dict[str, Any]:
        place = data(given, kind)
        with tempfile.TemporaryDirectory(dir=given.output) as directory:
            words = ["-m", "benchmarks.gpu.job", measure, recipe, config]
            words += [f"output_dir={directory}", *overrides(given, recipe, config, place), *more]
            # Not compiled where it is tiny: that takes longer than all the rest.
            words += ["--steps", "1", "--eager"] if given.tiny else ["--steps", str(steps)]
            return last_line(given.run(words))

    return run


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def rows(count: int) -> tuple[str, str]:
    """So many rows in a micro-batch, which is the step."""
    return f"batch_size={count}", f"global_batch_size={count}"


def memory(family: str, tiny: bool) -> list[Case]:
    """Peaks beside those of the dry run; eager, as the dry run counts."""
    config, eager = {"llada": "llada/8B", "dream": "dream/7B"}[family], "compile=False"
    full, lora = f"{config}_full", f"{config}_lora"

    def case(name: str, recipe: str, config: str, count: int, *more: str) -> Case:
        return Case(
            f"{name}, {count} x 4,096",
            job("memory", f"mdm_{recipe}_finetune", config, eager, *rows(count), *more, steps=2),
        )

    wide = [
        case("full, 8-bit optimizer", "full", full, 4, *EIGHT_BITS),
        case("LoRA", "lora", lora, 4),
    ]
    return [
        case("full, fp32 masters", "full", full, 1),
        case("full, 8-bit optimizer", "full", full, 1, *EIGHT_BITS),
        case("LoRA", "lora", lora, 1),
        case("QLoRA", "lora", f"{config}_qlora", 1),
        *([] if tiny else wide),
    ]


def speed(tiny: bool) -> list[Case]:
    """LoRA 8B: rows of mixed lengths, padded and packed, compiled or not; 4,096 tokens; chunks."""

    def case(name: str, *more: str, kind: str = "mixed", count: int = 8) -> Case:
        return Case(
            name, job("step", "mdm_lora_finetune", "llada/8B_lora", *rows(count), *more, kind=kind)
        )

    even = {"kind": "even", "count": 4}
    return [
        case("4 x 4,096, packed, compiled, chunk 512", *PACKED, **even),
        *(
            case(f"4 x 4,096, packed, compiled, chunk {n}", *PACKED, f"loss.chunk_size={n}", **even)
            for n in ((256,) if tiny else (256, 1024, 4096))
        ),
        case("mixed lengths, padded", *PADDED, "compile=False"),
        case("mixed lengths, padded, compiled", *PADDED),
        case("mixed lengths, packed", *PACKED, "compile=False"),
        case("mixed lengths, packed, compiled", *PACKED),
        Case(
            "full, 8-bit optimizer, 4 x 4,096, packed, compiled",
            job(
                *("step", "mdm_full_finetune", "llada/8B_full"),
                *(*rows(4), *PACKED, *EIGHT_BITS),
            ),
        ),
    ]


def alignment() -> list[Case]:
    """A step of preferences, and one of rewards: answers and updates."""
    return [
        Case(
            "mdm_dpo, 4 preferences of 2 x 256",
            job(
                *("step", "mdm_dpo", "llada/8B_lora_dpo", "batch_size=4", "global_batch_size=4"),
                kind="short",
                steps=2,
            ),
        ),
        Case(
            "mdm_grpo, 8 answers of 256, 4 updates",
            job("step", "mdm_grpo", "llada/8B_lora_grpo", kind="short", steps=1),
        ),
    ]


def float8() -> list[Case]:
    """All parameters, compiled, in bf16 and in each of torchao's recipes."""
    common = ("step", "mdm_full_finetune", "llada/8B_full", *rows(4), *PACKED, *EIGHT_BITS)
    given = [("bf16", ())]
    for name in ("tensorwise", "rowwise"):
        given.append((name, ("enable_fp8_training=True", f"fp8_recipe_name={name}")))
    return [Case(name, job(*common, *more)) for name, more in given]


def checkpoints() -> list[Case]:
    """A LoRA's, with the merged weights and without, plain and asynchronous."""
    common = ("checkpoint", "mdm_lora_finetune", "llada/8B_lora", *rows(1), "compile=False")
    alone, later = "checkpointer.save_adapter_weights_only=True", "enable_async_checkpointing=True"
    return [
        Case("adapters and merged weights", job(*common, steps=1)),
        Case("the same, asynchronous", job(*common, later, steps=1)),
        Case("adapters alone", job(*common, alone, steps=1)),
    ]


def profiles() -> list[Case]:
    """What a step's time goes to, and who waits for the device."""
    common = ("profile", "mdm_lora_finetune", "llada/8B_lora", *rows(4), *PACKED)
    return [Case("LoRA 8B, 4 x 4,096, packed, compiled", job(*common))]


def blocks() -> list[Case]:
    """Block diffusion by flex attention: a step of SDAR 4B, views, and writing."""
    common = ("step", "mdm_lora_finetune", "sdar/4B_lora")

    def views(given: Given) -> dict[str, Any]:
        small = ["--pairs", "1", "--length", "32", "--block", "8", "--tokens", "16"]
        found = script(given, "blocks", *(small if given.tiny else []))
        times = {f"{x['views']} views, time of one": x["ratio"]["ratio"] for x in found["views"]}
        return times | {"writing, with the cache": found["writing"]["ratio"]}

    return [
        Case("SDAR 4B LoRA, 2 x 4,096", job(*common, *rows(2))),
        Case(
            "SDAR 4B LoRA, 8 of mixed lengths, packed",
            job(*common, *rows(8), *PACKED, kind="mixed"),
        ),
        Case("over a clean copy for each; over no cache", views),
    ]


def script(given: Given, name: str, *words: str) -> Any:
    """The JSON that one of the other benchmarks writes."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        given.run(["-m", name, "--output", str(file), "--device", given.device, *words])
        return json.loads(file.read_text())


SLICES = ("slice", "memory", "lengths", "compile", "roofline")


def slices(tiny: bool) -> list[Case]:
    """Two layers of the 8B shape beside the field's plain loop: ours over theirs."""

    def case(name: str) -> Case:
        def run(given: Given) -> dict[str, Any]:
            small = ["--pairs", "1", "--width", "128", "--rows", "1", "--memory-rows", "1"]
            with tempfile.TemporaryDirectory() as directory:
                words = ["-m", "training", "--output", directory, "--device", given.device, name]
                given.run([*words, *(small if given.tiny else [])])
                found = json.loads((Path(directory) / "training.json").read_text())[name]
            return {
                key: value["ratio"] if isinstance(value, dict) else value
                for key, value in found.items()
                if not isinstance(value, dict) or "ratio" in value
            }

        return Case(name, run)

    # What is measured here at one size only is not for a test.
    return [case(x) for x in (("slice",) if tiny else SLICES)]


def generation() -> list[Case]:
    """Tokens per second of a model of the 8B shape at random weights, by each way to write."""

    def run(given: Given) -> dict[str, Any]:
        shape = "640,2,4,64,128,160" if given.tiny else "126464,32,32,4096,4096,12288"
        words = ["--shape", shape, "--tokens", "8" if given.tiny else "256", "--rounds"]
        found = script(given, "generation", *words, "1" if given.tiny else "2")["shape"]
        return {f"{name}, tokens/s": x["tokens_per_second"] for name, x in found.items()}

    return [Case("8B, bf16, one answer of 256 tokens", run)]


def tests(tiny: bool) -> list[Case]:
    """The tests that need a device, in a few processes, so that each takes minutes at most."""
    files = ["tests/models", "tests/training", "tests/checkpoint", "tests/recipes", "tests/titan"]

    def case(place: str) -> Case:
        def run(given: Given) -> dict[str, Any]:
            text = given.run(["-m", "pytest", "-m", "gpu", "-n", "0", "-q", place])
            return {
                word: int(count)
                for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text)
            }

        return Case(place, run)

    return [case(x) for x in (files[:1] if tiny else files)]


def parts(tiny: bool) -> dict[str, list[Case]]:
    """Each part's cases."""
    return {
        "tests": tests(tiny),
        "memory-llada": memory("llada", tiny),
        "memory-dream": memory("dream", tiny),
        "speed": speed(tiny),
        "slice": slices(tiny),
        "generation": generation(),
        "alignment": alignment(),
        "float8": float8(),
        "checkpoint": checkpoints(),
        "profile": profiles(),
        "blocks": blocks(),
    }
