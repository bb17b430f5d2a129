"""What a run shows: TensorBoard scalars, figures of the step, memory."""

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training
from torchtune.training.metric_logging import TensorBoardLogger as _TensorBoardLogger
from tqdm import tqdm

from mdm_plugin.config.secrets import redacted
from mdm_plugin.contract import Estimator, Objective
from mdm_plugin.distributed.world import World
from mdm_plugin.torchtune_internals import summary_writer
from mdm_plugin.training.corruption import to_device
from mdm_plugin.training.probe import plot_fit, write_fit
from mdm_plugin.training.step import Result

T_BINS = 10


class TensorBoardLogger(_TensorBoardLogger):
    """torchtune's, which writes text too. Arguments as there: log_dir, organize_logs."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Markdown, on rank 0."""
        if writer := summary_writer(self):
            writer.add_text(name, text, global_step=step)

    def log_figure(self, name: str, figure: Any, step: int) -> None:
        """A matplotlib figure, on rank 0."""
        if writer := summary_writer(self):
            writer.add_figure(name, figure, global_step=step)

    def log_config(self, config: DictConfig) -> None:
        """The resolved config as text."""
        text = OmegaConf.to_yaml(redacted(config))
        self.log_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def flush(self) -> None:
        """Make what was logged visible to a reader now."""
        if writer := summary_writer(self):
            writer.flush()


class StepMetrics:
    """Sums over micro-batches and steps since the last ``report``, kept on the device.

    Nothing here waits for the device until ``report`` does.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._reset()

    def _reset(self) -> None:
        # loss, then rows' loss by t, rows by t, importance weights, rows, and masked, eligible and
        # all tokens.
        self._sums = torch.zeros(1 + 2 * T_BINS + 5, device=self.world.device)
        self._grad_norm: Any = torch.zeros((), device=self.world.device)
        self._steps = 0
        self._values: dict[str, list[float]] = {}
        self._norms = 0
        self._importance_max = 0.0
        self._start = time.perf_counter()

    def _micro_batch(self, result: Result) -> None:
        batch, loss, losses, _ = result
        bins = (batch.t * T_BINS).long().clamp(0, T_BINS - 1)
        bins = to_device(bins, losses.device)
        self._sums[0] += loss
        self._sums.index_add_(0, 1 + bins, losses)
        self._sums.index_add_(0, 1 + T_BINS + bins, torch.ones_like(losses))
        self._importance_max = max(self._importance_max, float(batch.importance.max()))
        counts = torch.tensor(
            [
                float(batch.importance.sum()),
                len(batch.t),
                len(batch.targets.labels),
                batch.eligible * batch.views,
                batch.noisy.numel(),
            ]
        )
        self._sums[-5:] += to_device(counts, losses.device)

    def step(
        self,
        results: Sequence[Result],
        grad_norm: Tensor | None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Add an optimizer step: of its micro-batches, and its gradient's norm, if known.

        values: what else is shown of it, the same on every rank.
        """
        self.show(values or {})
        for result in results:
            self._micro_batch(result)
        if grad_norm is not None:
            self._grad_norm = self._grad_norm + grad_norm.detach()
            self._norms += 1
        self._steps += 1

    def show(self, values: Mapping[str, float]) -> None:
        """Add figures of a step that ``step`` has counted, or will."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def report(self) -> dict[str, float]:
        """Means since the last report, over all ranks; called on every rank alike."""
        seconds = time.perf_counter() - self._start
        sums = self.world.sum(self._sums).tolist()
        most = float(self.world.max(torch.tensor(self._importance_max)))
        by_t, rows_by_t = sums[1 : 1 + T_BINS], sums[1 + T_BINS : 1 + 2 * T_BINS]
        importance, rows, masked, eligible, tokens = sums[-5:]
        if not self._steps:  # all were skipped
            self._reset()
            return {"speed/seconds_per_step": math.nan}
        figures = {
            "speed/tokens_per_second": tokens / seconds,
            "speed/masked_tokens_per_second": masked / seconds,
            "speed/seconds_per_step": seconds / self._steps,
        }
        if rows:
            figures |= {
                "train/loss": sums[0] / self._steps,
                "train/masked_fraction": masked / eligible,
                "train/importance_weight_mean": importance / rows,
                "train/importance_weight_max": most,
            }
        for i, (total, count) in enumerate(zip(by_t, rows_by_t, strict=True)):
            if count:
                figures[f"train_loss_by_t/{i / T_BINS:.1f}-{(i + 1) / T_BINS:.1f}"] = total / count
        if self._norms:
            figures["train/grad_norm"] = self._grad_norm.item() / self._norms
        figures.update({name: sum(x) / len(x) for name, x in self._values.items()})
        figures.update({f"memory/{k}": v for k, v in memory_gib(self.world.device).items()})
        self._reset()
        return figures


def first_line(cfg: DictConfig, world: World, estimator: Estimator, objective: Objective) -> str:
    """What a run trains on, in which precision, and by which estimator and optimizer."""
    device = world.device.type
    if device == "cuda":
        device += f" ({torch.cuda.get_device_name(world.device)})"
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    precision = str(cfg.dtype)
    if cfg.enable_fp8_training:
        precision += f" with float8 ({cfg.fp8_recipe_name})"
    if cfg.dtype != cfg.master_dtype:
        precision += f", masters in {cfg.master_dtype}"
    elif cfg.master_dtype == "bf16":
        rounded = "at random" if cfg.stochastic_rounding else "to the nearest"
        precision += f", masters too, rounded {rounded}"
    names = [type(x).__name__ for x in (estimator.timesteps, estimator.masking, objective)]
    optimizer = cfg.optimizer._component_.rsplit(".", 1)[-1]
    return (
        f"{ranks} on {device}; {precision}; timesteps {names[0]}, masking {names[1]}, objective "
        f"{names[2]}; optimizer {optimizer}"
    )


def show_fit(report: dict[str, Any], directory: Path, logger: Any, world: World, step: int) -> None:
    """What was fitted to a probe, on rank 0: JSON in ``directory``, and TensorBoard's figure."""
    if world.rank != 0:
        return
    write_fit(report, directory / f"timesteps_step_{step}.json")
    if isinstance(logger, TensorBoardLogger):
        logger.log_figure("timesteps", plot_fit(report), step)


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: the device's, or on CPU this process's resident set."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"peak_resident_gib": peak / 1024**3}
    stats = training.get_memory_stats(device, reset_stats=True)
    return {f"{name}_gib": value for name, value in stats.items()}


def progress_bar(world: World, total: int, initial: int) -> tqdm:
    """Steps with ETA, on rank 0; on a log file a line a minute instead of a moving bar."""
    moving = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit="step",
        disable=world.rank != 0,
        dynamic_ncols=moving,
        mininterval=0.2 if moving else 60,
    )
