"""Training steps side by side with a plain loop, in time and memory: `make bench`.

    python benchmarks/training.py --output bench            # all; or name some:
    python benchmarks/training.py --output bench slice memory lengths recipe saving compile scale
    python benchmarks/training.py --output bench slice --device cuda --width 4096

The plain loop is what the field's public training scripts do, written out: transformers' Llama
without its causal mask, each batch padded to its longest row, logits of the whole vocabulary at
every position in fp32, the loss on the masked ones, not compiled. Optimizer, precision, rows and
masks are the same for both. Ratios are medians over pairs run in turn, with their range. A row of
512 tokens is half prompt and half response (and, as a second line, all response: pretraining).
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from mdm_plugin.contract import Estimator
from mdm_plugin.data import Batch, GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli
from mdm_plugin.models import MDMTransformer, llada
from mdm_plugin.models.transformer import ROTARY
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.corruption import Corrupted, corrupt, corrupted_step, pack
from mdm_plugin.training.in_backward import StepInBackward
from mdm_plugin.training.step import backward, global_normalizer

VOCABULARY, MASK, PAD = 126_464, 126_336, 0
GIB = 2**30
Step = Callable[[], Any]


class Size(NamedTuple):
    """Of a model: token ids, width, layers, heads, longest row, width of the MLP."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int
    mlp: int
    dtype: torch.dtype = torch.float32


def in_turn(
    ways: dict[str, Step],
    pairs: int,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way, once per round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(pairs + 1):
        for name, step in ways.items():
            start = clock()
            for _ in range(repeats):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((clock() - start) / repeats)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, other: str) -> dict[str, float]:
    """Median and range of ours / other over the rounds, and both medians in seconds."""
    each = [a / b for a, b in zip(seconds[ours], seconds[other], strict=True)]
    return {
        "ratio": median(each),
        "low": min(each),
        "high": max(each),
        "seconds": median(seconds[ours]),
        "seconds_other": median(seconds[other]),
    }


def a_batch(
    sizes: list[tuple[int, int]], vocabulary: int, chunk_size: int = 1024
) -> tuple[Batch, Corrupted, MDMLoss]:
    """Rows of (prompt, response) tokens, a micro-batch of all of them with its masks, the loss."""
    generator = torch.Generator().manual_seed(0)
    top = min(vocabulary, MASK)
    rows = Rows(
        (torch.randint(2, top, (p + n,), generator=generator).tolist(), [False] * p + [True] * n)
        for p, n in sizes
    )
    (batch,) = GlobalBatches(rows, Split(len(sizes)), Padding(PAD), seed=0).micro_batches(0)
    mask_id = min(MASK, vocabulary - 1)
    estimator = Estimator(Stratified(), Bernoulli(), MDMLoss(chunk_size=chunk_size), mask_id)
    times = estimator.timesteps(len(sizes), generator, estimator.w)
    return batch, corrupt(batch, times, estimator), estimator.loss


def our_model(size: Size) -> MDMTransformer:
    with torch.device("meta"):
        model = llada(size.vocabulary, size.layers, size.heads, size.width, size.length, size.mlp)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, ROTARY):
            module.rope_init()
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.to(size.dtype)


def plain_model(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        use_cache=False,
        dtype=size.dtype,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(size.dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.train()


def plain_loss(
    model: Any, tokens: Tensor, mask: Tensor, weight: Tensor, real: Tensor, mask_id: int
) -> Tensor:
    """Σ over masked positions of weight · CE, from all logits. tokens, mask, weight [B, L]."""
    attend = real[:, None].to(tokens.device)  # [B, 1, 1, L], all see all real positions
    logits = model(
        input_ids=torch.where(mask, mask_id, tokens),
        attention_mask=attend.expand(-1, -1, tokens.shape[1], -1),
    ).logits.float()
    ce = F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens.view(-1), reduction="none")
    return (ce.view_as(weight) * weight)[mask].sum()


def our_step(
    model: Any,
    noisy: Corrupted,
    loss: MDMLoss,
    optimizer: Any,
    device: str,
    in_backward: Any = None,
) -> Step:
    world = World(0, 1, torch.device(device), None)

    def step() -> None:
        if in_backward:
            with in_backward.active():
                backward(model, loss, noisy, global_normalizer([noisy], world), world)
            return
        backward(model, loss, noisy, global_normalizer([noisy], world), world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(
    model: Any, batch: Any, noisy: Corrupted, optimizer: Any, mask_id: int, device: str
) -> Step:
    weight = torch.zeros(batch.tokens.shape)
    weight.view(-1)[noisy.targets.positions] = noisy.targets.weights
    real = (
        torch.ones_like(batch.tokens, dtype=torch.bool)[:, None]
        if batch.attend is None
        else batch.attend
    )
    tokens, weight, real = (x.to(device) for x in (batch.tokens, weight, real))
    rows = len(tokens)

    def step() -> None:
        mask = weight > 0
        (plain_loss(model, tokens, mask, weight, real, mask_id) / rows).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)


def size_of_slice(given: Any) -> Size:
    heads, mlp = given.width // 128, 3 * given.width
    return Size(VOCABULARY, given.width, 2, heads, 512, mlp, torch.bfloat16)


def slice_(given: Any) -> dict[str, Any]:
    """Two layers of LLaDA-8B's shape with its vocabulary: time of a step."""
    found = {}
    for name, sizes in (
        ("half prompt", [(256, 256)] * given.rows),
        ("all response", [(0, 512)] * given.rows),
    ):
        size, ways = size_of_slice(given), {}
        batch, noisy, loss = a_batch(sizes, VOCABULARY)
        ours, plain = our_model(size).to(given.device), plain_model(size).to(given.device)
        ways["ours"] = our_step(ours, noisy, loss, adamw(ours), given.device)
        ways["plain"] = plain_step(plain, batch, noisy, adamw(plain), MASK, given.device)
        pairs = given.pairs if sizes[0][0] else min(3, given.pairs)  # the second is slow
        seconds = in_turn(ways, pairs)
        found[name] = ratio(seconds, "ours", "plain")
        del ours, plain, ways
        gc.collect()
    return found


def memory(given: Any) -> dict[str, Any]:
    """The same slice, layers checkpointed: peak memory above parameters and optimizer."""
    rows = ("--width", str(given.width), "--rows", str(given.memory_rows))
    ways = ("plain", "ours", "ours, optimizer_in_bwd")
    found = {
        way: in_a_process_alone(given, way, *rows, "--chunk", str(given.chunk)) for way in ways
    }
    for way in ways[1:]:
        found[way]["ratio"] = found[way]["gib"] / found["plain"]["gib"]
    return found


def in_a_process_alone(given: Any, way: str, *more: str) -> dict[str, float]:
    """What ``alone`` prints in a process of its own, whose allocator gives back what is freed."""
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--output", str(given.output), "--alone", way),
            *("--device", given.device, *more),
        ],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def alone(given: Any) -> None:
    """Print one way's peak above what rests, GiB, and its seconds, after a step that warms up."""
    if given.sizes:
        rows, vocabulary, layers, length = (int(x) for x in given.sizes.split(","))
        size = Size(vocabulary, width=256, layers=layers, heads=4, length=2048, mlp=768)
        sizes = [(length // 2, length // 2)] * rows
    else:
        size, sizes = size_of_slice(given), [(256, 256)] * given.rows
    batch, noisy, loss = a_batch(sizes, size.vocabulary, given.chunk)
    plain = given.alone == "plain"
    model = (plain_model if plain else our_model)(size).to(given.device)
    if plain:
        model.gradient_checkpointing_enable()
    elif not given.sizes:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    optimizer = adamw(model)
    if plain:
        step = plain_step(model, batch, noisy, optimizer, MASK, given.device)
    else:
        in_backward = StepInBackward(optimizer) if "in_bwd" in given.alone else None
        step = our_step(model, noisy, loss, optimizer, given.device, in_backward)
    step()
    gc.collect()
    start = time.perf_counter()
    peak = peak_gib(step, given.device)
    print(json.dumps({"gib": peak, "seconds": time.perf_counter() - start}))


def peak_gib(step: Step, device: str) -> float:
    """Peak memory of a step above what is there before it."""
    if device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - rest) / GIB
    import psutil

    process, peak, running = psutil.Process(), 0, True
    rest = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    running = False
    watcher.join()
    return (peak - rest) / GIB


def lengths(given: Any) -> dict[str, Any]:
    """Rows of mixed lengths (log-normal, mean 180, at most 1,024): masked tokens per second."""
    # 24 quantiles of exp(N(log 109, 1)), in a random order.
    normal = torch.special.ndtri((torch.arange(24) + 0.5) / 24)
    total = (normal + math.log(180) - 0.5).exp().clamp(8, 1024).long()
    total = total[torch.randperm(24, generator=torch.Generator().manual_seed(1))].tolist()
    sizes = [(n // 2, n - n // 2) for n in total]
    size = Size(vocabulary=32_000, width=256, layers=2, heads=4, length=1024, mlp=768)
    batch, noisy, loss = a_batch(sizes, size.vocabulary)
    ours, plain = our_model(size).to(given.device), plain_model(size).to(given.device)
    packed = pack(noisy, ours, torch.device(given.device))
    ways = {
        "packed": our_step(ours, packed, loss, adamw(ours), given.device),
        "padded": our_step(ours, noisy, loss, adamw(ours), given.device),
        "plain": plain_step(plain, batch, noisy, adamw(plain), size.vocabulary - 1, given.device),
    }
    seconds = in_turn(ways, given.pairs)
    found: dict[str, Any] = {
        f"{name}, tokens of loss per second": ratio(seconds, "plain", name)
        for name in ("packed", "padded")
    }
    found["rows"] = {"mean": sum(total) / len(total), "longest": max(total)}
    return found


def a_step(recipe: Any, step: int) -> Corrupted:
    """The recipe's micro-batch of a step, ready for the model, its weights normalised."""
    (noisy,) = corrupted_step(recipe.batches, step, recipe.estimator)
    weights = noisy.targets.weights / len(noisy.t)
    return noisy._replace(targets=noisy.targets._replace(weights=weights))


def bare_and_recipe(recipe: Any, rounds: int) -> dict[str, Step]:
    """The recipe's steps 0..rounds − 1, over and over, and the bare work of the same batches."""
    batches = [a_step(recipe, i) for i in range(rounds)]
    done = {"bare": 0, "recipe": 0}

    def bare() -> None:
        noisy = batches[done["bare"] % rounds]
        done["bare"] += 1
        total, _ = recipe.model(
            noisy.noisy,
            mask=noisy.attend,
            positions=noisy.targets.positions,
            head=lambda head, h: recipe.estimator.loss(head, h, noisy.targets),
        )
        total.backward()
        recipe.optimizer.step()
        recipe.optimizer.zero_grad(set_to_none=True)

    def whole() -> None:
        recipe.train_step(done["recipe"] % rounds)
        done["recipe"] += 1
        if done["recipe"] % recipe.cfg.log_every_n_steps == 0:
            recipe.metric_logger.log_dict(recipe.metrics.report(), done["recipe"])

    return {"recipe": whole, "bare": bare}


def a_recipe(given: Any, *overrides: str) -> Any:
    """The quickstart's recipe, set up, from random weights."""
    import mdm_full_finetune

    from mdm_plugin.config.loading import load_config
    from mdm_plugin.config.options import Options

    own = [
        *("timesteps=mdm_plugin.timesteps.Stratified", f"output_dir={given.output}/recipe"),
        *("questions=null", "verifier=null", "clip_grad_norm=null"),
        "checkpointer.checkpoint_dir=null",
    ]
    cfg = load_config("quickstart", [*own, *overrides], Options)
    recipe = mdm_full_finetune.MDMFinetune(cfg, World(0, 1, torch.device("cpu"), None))
    recipe.setup()
    recipe.model.train()
    return recipe


def saving(given: Any) -> dict[str, Any]:
    """40 steps of the quickstart, with an asynchronous checkpoint on the way, and without."""
    recipe = a_recipe(given, "enable_async_checkpointing=True", "keep_last_n=1")
    taken = 0

    def steps(save: bool) -> None:
        nonlocal taken
        for step in range(40):
            recipe.train_step(step)
            if save and step == 10:
                taken += 1
                recipe.save_checkpoint(taken)

    ways = {"saving": lambda: steps(True), "not saving": lambda: steps(False)}
    found = ratio(in_turn(ways, given.pairs), "saving", "not saving")
    recipe.checkpointer.wait(recipe.world)
    recipe.cleanup()
    return {"asynchronous checkpoint in 40 steps": found}


def recipe_(given: Any) -> dict[str, Any]:
    """The recipe's step, with its noise and figures, over a bare step of the same transformer."""
    found = {}
    wide = ["model.vocab_size=32000", "model.embed_dim=1024", "model.num_heads=8"]
    wide += ["model.intermediate_dim=3072", "model.num_layers=2", "batch_size=32"]
    for name, more in (("quickstart", []), ("2 layers of 1,024", wide)):
        recipe = a_recipe(given, *more)
        rounds = 20 if not more else 3
        ways = bare_and_recipe(recipe, rounds)
        seconds = in_turn(ways, given.pairs, rounds)
        found[name] = ratio(seconds, "recipe", "bare")
        recipe.cleanup()
    return found


def compiled(given: Any) -> dict[str, Any]:
    """Compiled layers and loss over eager ones, at the quickstart's size, packed and padded."""
    from mdm_plugin.distributed.build import Build, build_model
    from mdm_plugin.distributed.parameters import initialize_parameters

    world = World(0, 1, torch.device(given.device), None)
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(12, 24, (64, 2), generator=generator).tolist()
    found = {}
    for layout in ("padded", "packed"):
        ways = {}
        for name in ("eager", "compiled"):
            torch._dynamo.reset()
            _, noisy, loss = a_batch([tuple(x) for x in sizes], 320)
            how = Build(compile=name == "compiled")
            model = build_model(lambda: llada(320, 3, 4, 64, 64, 256), world, torch.float32, how)
            initialize_parameters(model, 0)
            if layout == "packed":
                noisy = pack(noisy, model, world.device)
            if name == "compiled":
                loss.compile_chunks()
            ways[name] = our_step(model, noisy, loss, adamw(model), given.device)
        found[layout] = ratio(in_turn(ways, given.pairs, 20), "eager", "compiled")
    return found


def scale(given: Any) -> dict[str, Any]:
    """Peak memory and seconds of a step as one size doubles three times, the others kept."""
    start = {"rows": 4, "vocabulary": 8_000, "layers": 2, "length": 256}
    found: dict[str, Any] = {}
    for name in start:
        for factor in (1, 2, 4, 8):
            size = {**start, name: start[name] * factor}
            sizes = ",".join(str(x) for x in size.values())
            found[f"{name} {size[name]}"] = in_a_process_alone(
                given, "ours", "--sizes", sizes, "--chunk", str(given.chunk)
            )
    return found


def roofline(given: Any) -> dict[str, float]:
    """What this machine does at best: matrix products and copies."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048, dtype=dtype, device=given.device) for _ in range(2))
        seconds = median(in_turn({"x": lambda a=a, b=b: a @ b}, 7, 3)["x"])
        found[f"{str(dtype)[6:]} products, TFLOP/s"] = 2 * 2048**3 / seconds / 1e12
    x = torch.randn(100_000_000, device=given.device)
    y = torch.empty_like(x)
    seconds = median(in_turn({"x": lambda: y.copy_(x)}, 7, 3)["x"])
    found["copies, read and written, GB/s"] = 2 * x.nbytes / seconds / 1e9
    return found


CASES = {
    "roofline": roofline,
    "slice": slice_,
    "memory": memory,
    "lengths": lengths,
    "recipe": recipe_,
    "saving": saving,
    "compile": compiled,
    "scale": scale,
}


def draw(results: dict[str, Any], file: Path) -> None:
    """The ratios, as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = {
        f"{case}: {name}": x
        for case, found in results.items()
        for name, x in found.items()
        if isinstance(x, dict) and "ratio" in x
    }
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(bars) + 1))
    for i, x in enumerate(bars.values()):
        low, high = x.get("low", x["ratio"]), x.get("high", x["ratio"])
        axes.barh(i, x["ratio"], color="tab:blue")
        axes.plot([low, high], [i, i], color="black")
        axes.text(max(high, x["ratio"]) + 0.05, i, f"{x['ratio']:.2f}", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("ratio: median, and range over pairs in turn")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the named cases, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--output", type=Path, required=True, help="directory")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--width", type=int, default=4096, help="of the slice")
    parser.add_argument("--rows", type=int, default=2, help="of the slice")
    parser.add_argument("--memory-rows", type=int, default=12, help="of the slice in memory")
    parser.add_argument("--chunk", type=int, default=256, help="loss.chunk_size in memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        return alone(given)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "training.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in given.cases or CASES:
        if name not in CASES:
            parser.error(f"{name} is none of {', '.join(CASES)}")
        print(f"\n{name}: {(CASES[name].__doc__ or '').strip()}", flush=True)
        results[name] = CASES[name](given)
        for key, value in results[name].items():
            text = (
                ", ".join(f"{k} {v:.3g}" for k, v in value.items())
                if isinstance(value, dict)
                else f"{value:.3g}"
            )
            print(f"  {key:40} {text}", flush=True)
        file.write_text(json.dumps(results, indent=1))
    draw(results, given.output / "training.png")


if __name__ == "__main__":
    main()
