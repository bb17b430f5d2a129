"""One recipe at random weights, measured in a process of its own, which prints JSON last.

    python -m benchmarks.gpu.job step mdm_lora_finetune llada/8B_lora output_dir=… key=value …

Weights are drawn on the device. ``step`` times steps and gives the peak of memory; ``memory`` has
beside it what the dry run plans; ``checkpoint`` times a checkpoint; ``profile`` says what a step's
time goes to, and where the device is waited for.
"""

import argparse
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import mdm_dpo
import mdm_full_finetune
import mdm_grpo
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.training import GIB
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import DPOOptions, GRPOOptions, Options
from mdm_plugin.distributed.parameters import fill, named_parameters
from mdm_plugin.distributed.world import distributed
from mdm_plugin.errors import UserError
from mdm_plugin.training.corruption import Corrupted, corrupted_step
from mdm_plugin.training.plan import plan

# The recipe's class, its options, and whether its model is to have adapters (None: either).
RECIPES: dict[str, tuple[type[mdm_full_finetune.MDMFinetune], type, bool | None]] = {
    "mdm_full_finetune": (mdm_full_finetune.MDMFinetune, Options, False),
    "mdm_lora_finetune": (mdm_full_finetune.MDMFinetune, Options, True),
    "mdm_dpo": (mdm_dpo.MDMPreferences, DPOOptions, None),
    "mdm_grpo": (mdm_grpo.MDMReinforcement, GRPOOptions, None),
}
# Dense bf16 products of a device, TFLOP/s, as its maker states them.
PEAKS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
WARM_UP = 2


def draw_weights(model: nn.Module, device: torch.device) -> None:
    """N(0, 1/D) for matrices [*, D], 1 for vectors, 0 for LoRA's B; drawn on the device."""

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, p in named_parameters(model).items():
            if name.endswith("lora_b.weight"):
                yield name, torch.zeros(p.shape, device=device)
            elif p.ndim >= 2:
                yield name, torch.randn(p.shape, device=device) * p.shape[-1] ** -0.5
            else:
                yield name, torch.ones(p.shape, device=device)

    fill(model, values())


def start(kind: type[Any], cfg: DictConfig, world: Any, adapters: bool | None) -> Any:
    """The recipe, set up, from random weights."""

    class FromRandom(kind):
        def _setup_checkpointer(self) -> Path | None:
            found = super()._setup_checkpointer()
            self.checkpointer.load_weights = lambda model, *_: draw_weights(model, world.device)
            return found

    recipe = FromRandom(cfg, world, adapters)
    recipe.setup()
    recipe.model.train()
    return recipe


class Peak:
    """GiB at the peak: of the device since ``restart``, or on a CPU above what this process had."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, self._kib("VmRSS")

    def restart(self) -> None:
        """Forget what the weights took while they were drawn."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @staticmethod
    def _kib(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1])

    def gib(self) -> dict[str, float]:
        """Of tensors, and of what the allocator holds for them."""
        if self.device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self.device)
            held = torch.cuda.max_memory_reserved(self.device)
            return {"peak, GiB": found / GIB, "held, GiB": held / GIB}
        return {"peak, GiB": (self._kib("VmHWM") - self.before) / 2**20}


def planned(cfg: DictConfig, adapters: bool | None, together: int, room: float | None) -> float:
    """GiB of the dry run's peak.

    Raises:
        UserError: if that is more than ``room``, or the config is wrong.
    """
    given = {"ranks": 1} if room is None else {"ranks": 1, "device_gib": room}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = plan(OmegaConf.merge(cfg, {"dry_run": given}), adapters, together)
    found = re.search(r"^  peak +([\d.]+)$", text, re.M)
    assert found, text
    return float(found[1])


def real_tokens(batch: Corrupted) -> Tensor:
    """Tokens of each row of a micro-batch that are no padding. [R]"""
    if isinstance(batch.attend, Tensor):
        return batch.attend.flatten(1).sum(1)
    return torch.full((len(batch.noisy),), batch.noisy.shape[1])


def flops(model: Any, batches: list[Corrupted]) -> float:
    """Of a step, by the cost model of docs/performance.md: what is needed, once.

    Padding and what checkpointing computes again do not count. A frozen matrix has no gradient:
    four FLOPs for each of its numbers and tokens in place of six.
    """

    def each(part: nn.Module) -> int:
        return sum(
            p.numel() * (6 if p.requires_grad else 4) for p in part.parameters() if p.ndim > 1
        )

    lengths = torch.cat([real_tokens(x) for x in batches]).double()
    masked = sum(len(x.targets.labels) for x in batches)
    attention, layers = model.layers[0].attn, len(model.layers)
    width = attention.num_heads * attention.head_dim
    last = each(model.layers[-1].mlp)  # which runs on masked positions, as the head does
    everywhere = float(lengths.sum()) * (each(model.layers) - last)
    attended = 12 * layers * width * float(lengths.square().sum())
    return everywhere + masked * (last + each(model.output)) + attended


class LossTime:
    """Seconds within the loss, on the device's clock, of the calls since it was made."""

    def __init__(self, loss: nn.Module, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []
        loss.register_forward_pre_hook(lambda *_: self.mark())
        loss.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append(now)

    def seconds(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs)


def step(recipe: Any, steps: int) -> dict[str, Any]:
    """Seconds of a step, tokens per second, the share of the device's peak and of the loss."""
    device, seconds, work, tokens = recipe.world.device, [], 0.0, 0.0
    loss, share = LossTime(recipe.estimator.loss, device), 0.0
    for number in range(WARM_UP + steps):
        loss.marks.clear()
        begun = clock(device)
        recipe.train_step(number)
        seconds.append(clock(device) - begun)
        share = loss.seconds() / seconds[-1]
    found: dict[str, Any] = {"first step, s": seconds[0], "step, s": median(seconds[WARM_UP:])}
    fine_tunes = not isinstance(recipe, mdm_dpo.MDMPreferences | mdm_grpo.MDMReinforcement)
    if fine_tunes and recipe.estimator.blocks is None:  # the cost model's
        for number in range(WARM_UP, WARM_UP + steps):
            batches = corrupted_step(recipe.batches, recipe.place(number), recipe.estimator)
            work += flops(recipe.model, batches) / steps
            tokens += sum(float(real_tokens(x).sum()) for x in batches) / steps
        found["tokens/s"] = tokens / found["step, s"]
        found["TFLOP/s"] = work / found["step, s"] / 1e12
        peak = next((x for name, x in PEAKS.items() if name in device_name(device)), None)
        if peak:
            found["MFU"] = found["TFLOP/s"] / peak
    if fine_tunes:
        found["loss, share"] = share
    return found


def checkpoint(recipe: Any, steps: int) -> dict[str, Any]:
    """Seconds that saving keeps training waiting, and until the checkpoint is whole."""
    for number in range(steps):
        recipe.train_step(number)
    begun = clock(recipe.world.device)
    recipe.save_checkpoint(1)
    waited = time.perf_counter() - begun
    recipe.train_step(steps)
    recipe.checkpointer.wait(recipe.world)
    whole = time.perf_counter() - begun
    files = (recipe.checkpointer.steps()[-1]).rglob("*")
    size = sum(x.stat().st_size for x in files if x.is_file())
    return {"training waits, s": waited, "whole after, s": whole, "GiB": size / GIB}


def profiled(recipe: Any, steps: int) -> dict[str, Any]:
    """The ten kinds of work that take most of a step, and the places that wait for the device."""
    device = recipe.world.device
    for number in range(WARM_UP):
        recipe.train_step(number)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        recipe.train_step(WARM_UP)
        clock(device)
    cuda = device.type == "cuda"
    spent = {
        x.key: (x.self_device_time_total if cuda else x.self_cpu_time_total) / 1e6
        for x in found.key_averages()
    }
    total = sum(spent.values())
    most = sorted(spent, key=lambda x: -spent[x])[:10]
    rows = {f"{name[:60]}, share": spent[name] / total for name in most}
    counts = Counter({x.key: x.count for x in found.key_averages()})
    for name in ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize"):
        rows[f"calls of {name}"] = counts[name]
    return rows | (waits(recipe, WARM_UP + 1) if cuda else {})


def waits(recipe: Any, number: int) -> dict[str, int]:
    """Lines that have the CPU wait for the device in a step, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recipe.train_step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(x.filename).name}:{x.lineno}" for x in caught if "synchroniz" in str(x.message)
    )
    return {f"waits at {place}": count for place, count in places.items()}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


MEASURES: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "memory": step,
    "step": step,
    "checkpoint": checkpoint,
    "profile": profiled,
}


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """What is found; ``refused`` is the line of a job that the device cannot take."""
    kind, options, adapters = RECIPES[given.recipe]
    try:
        cfg = load_config(given.config, given.overrides, options)
        with distributed(cfg.device, 1, 1, cfg.timeout_minutes) as world:
            room = None
            if world.device.type == "cuda":
                room = torch.cuda.get_device_properties(world.device).total_memory / GIB
            found: dict[str, Any] = {"device": device_name(world.device)}
            if given.measure == "memory":
                found["planned, GiB"] = planned(cfg, adapters, kind.together, room)
            peak = Peak(world.device)
            recipe = start(kind, cfg, world, adapters)
            peak.restart()
            found |= MEASURES[given.measure](recipe, given.steps)
            recipe.cleanup()
            return found | peak.gib()
    except UserError as error:
        return {"refused": str(error)}


def main() -> None:
    """Print what is found as JSON, after what the recipe prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5, help="that are timed")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    given = parser.parse_args()
    if given.eager:
        torch.compiler.set_stance("force_eager")
    print(json.dumps(measured(given)))


if __name__ == "__main__":
    main()
