"""Which checkpoint a run goes on from, and whether that is the run that the config describes."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.checkpoint.manifest import verify
from mdm_plugin.config.options import Options
from mdm_plugin.config.secrets import redacted
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError

# What may be another when the same command line goes on: where and how a run is executed, what it
# shows and keeps, and what ``check_identity`` compares by what it comes to (batches, rows).
_MAY_DIFFER = (
    "output_dir device dry_run prepare resume_from_checkpoint timeout_minutes batch_size "
    "gradient_accumulation_steps global_batch_size dataset tokenizer.path compile loss.chunk_size "
    "enable_activation_checkpointing enable_activation_offloading fsdp_cpu_offload "
    "fsdp_reshard_after_forward data_parallel_shard_dim data_parallel_replicate_dim "
    "checkpointer.output_dir checkpointer.save_adapter_weights_only metric_logger profiler "
    "log_every_n_steps save_every_n_epochs save_every_n_steps keep_last_n keep_best_n "
    "enable_async_checkpointing max_skipped_steps loss_spike_z dataset_val run_val_every_n_steps "
    "val_draws sample_rows sample_new_tokens sample_steps questions max_questions verifier "
    "optimizer.fused optimizer.foreach bound.chunk_size prompts reward_timeout max_failed_rewards"
)


def find_checkpoint(cfg: DictConfig, checkpointer: Checkpointer, world: World) -> Path | None:
    """The checkpoint that the run goes on from by ``cfg.resume_from_checkpoint``; None to start.

    ``auto``: the newest whole one in output_dir, if it is of this config; none where there is none.
    True: the newest whole one, also of a config that has changed. A directory: that one. False:
    none, and there must be none.

    Called on every rank; rank 0 compares all files with their manifest.

    Raises:
        UserError: if there is another run's, one that is asked for is not there, or none is whole.
    """
    found: list[Any] = [None, None]
    if world.rank == 0:
        try:
            found[0] = _find(cfg, checkpointer)
        except (UserError, OSError) as error:
            found[1] = str(error)
    if world.size > 1:
        dist.broadcast_object_list(found, 0)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def _find(cfg: DictConfig, checkpointer: Checkpointer) -> Path | None:
    asked, place, steps = cfg.resume_from_checkpoint, checkpointer.output_dir, checkpointer.steps()
    source = checkpointer.weights.directory if checkpointer.weights else None
    if source and source.resolve() in [step.resolve() for step in steps]:
        raise UserError(
            f"checkpointer.checkpoint_dir: {source} is a checkpoint of output_dir itself: for a "
            "new run from its weights name another output_dir"
        )
    if asked not in (True, False, "auto"):
        named = _named(Path(str(asked)).expanduser())
        if steps and named.resolve() not in [step.resolve() for step in steps]:
            raise UserError(
                f"output_dir: {place} holds checkpoints of its own, and {named} is none of them: "
                "name another output_dir"
            )
        return named
    if asked is False and steps:
        raise UserError(
            f"output_dir: {place} holds checkpoints of an earlier run: name another, or go on "
            "with that run: resume_from_checkpoint=auto"
        )
    if not steps:
        if asked is True:
            raise UserError(
                f"resume_from_checkpoint: {place} holds no checkpoint to resume from: "
                "resume_from_checkpoint=auto starts where there is none"
            )
        return None
    newest = _newest(steps, place)
    if asked == "auto":
        _check_config(cfg, newest)
    return newest


def _named(directory: Path) -> Path:
    if not (directory / "state.json").is_file():
        raise UserError(
            f"resume_from_checkpoint: {directory} is not a checkpoint (auto, True, False, or a "
            "step_N directory)"
        )
    try:
        verify(directory)
    except UserError as error:
        raise UserError(f"resume_from_checkpoint: {directory} is damaged: {error}") from error
    return directory


def _newest(steps: list[Path], place: Path) -> Path:
    """The newest whole one."""
    for step in reversed(steps):
        try:
            verify(step)
        except UserError as error:
            print(f"{step.name} is damaged and left out: {error}", file=sys.stderr)
        else:
            return step
    raise UserError(
        f"resume_from_checkpoint: no checkpoint in {place} is whole: name another output_dir, to "
        "start anew"
    )


def _check_config(cfg: DictConfig, checkpoint: Path) -> None:
    """Check that ``checkpoint`` was written by a run of this config.

    Raises:
        UserError: naming the first key that differs.
    """
    file = checkpoint / "config.yaml"
    try:
        loaded: Any = OmegaConf.load(file)
        if "master_dtype" not in loaded:  # of a release that trained in ``dtype`` itself
            loaded["master_dtype"] = loaded["dtype"]
        options = OmegaConf.get_type(cfg)
        known = options if is_dataclass(options) else Options
        stored = OmegaConf.merge(OmegaConf.structured(known), loaded)
    except Exception as error:  # damaged, or of another version: of many kinds
        raise UserError(
            f"resume_from_checkpoint: {file} cannot be read as a run's config: name another "
            "output_dir"
        ) from error
    may_differ = set(_MAY_DIFFER.split())
    then = dict(_flat(OmegaConf.to_container(stored)))
    now = dict(_flat(OmegaConf.to_container(redacted(cfg))))
    for key in sorted(then.keys() | now.keys()):
        parts = key.split(".")
        if any(".".join(parts[:n]) in may_differ for n in range(1, len(parts) + 1)):
            continue
        if then.get(key) != now.get(key):
            raise UserError(
                f"resume_from_checkpoint: {checkpoint.parent} holds another run: {key} is "
                f"{then.get(key)} there, and {now.get(key)} in this config: name another "
                "output_dir, or restore it (resume_from_checkpoint=True goes on all the same)"
            )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value, of nested dictionaries."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any], checkpoint: Path) -> None:
    """Check that a checkpoint belongs to a run of these rows, batches and this seed.

    Raises:
        UserError: naming what differs: going on would be another run.
    """
    for key, now in identity.items():
        if state[key] != now:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was written with {key} {state[key]}, and "
                f"the config gives {now}: restore it, or start a new run from its weights with "
                "checkpointer.checkpoint_dir and another output_dir"
            )
