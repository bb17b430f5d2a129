"""``dry_run``: what a run will need and do, before any weight is loaded."""

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.dtypes import nf4tensor
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator
from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.data.batches import Batch
from mdm_plugin.data.prompts import read_prompts
from mdm_plugin.distributed.parameters import adapter_names, named_parameters
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer, MDMTransformer
from mdm_plugin.training.batches import read_datasets
from mdm_plugin.training.blocks import block_schedule
from mdm_plugin.training.checks import check_adapters
from mdm_plugin.training.estimators import (
    check_estimator,
    is_causal,
    read_estimator,
    read_objective,
)
from mdm_plugin.training.memory import Job, Memory, memory, nbytes, writing
from mdm_plugin.training.precision import check_precision

GIB = 2**30


def dry_run(cfg: DictConfig, adapters: bool | None, together: int = 1) -> None:
    """Print what the run of ``cfg`` will need on each rank, and do; on the first process alone.

    Raises:
        UserError: as ``plan``.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracker's, on what fake tensors lack
            print(plan(cfg, adapters, together))


def plan(cfg: DictConfig, adapters: bool | None, together: int = 1) -> str:
    """A table of what the run of ``cfg`` will need on each rank, and do.

    ``cfg.dry_run``: True, for as many ranks as were started; or {ranks, device_gib}.

    Args:
        adapters: whether the model is to have adapters; None for either.
        together: rows of one example, of which ``cfg.batch_size`` counts.

    Raises:
        UserError: if something in the config is wrong, or the run does not fit the device.
    """
    given = _given(cfg)
    ranks = int(given.get("ranks", os.environ.get("WORLD_SIZE", 1)))
    if ranks < 1 or ranks % cfg.data_parallel_replicate_dim:
        raise UserError(
            f"dry_run.ranks: {ranks}: use a multiple of data_parallel_replicate_dim, "
            f"{cfg.data_parallel_replicate_dim}"
        )
    accumulation = cfg.gradient_accumulation_steps
    if cfg.global_batch_size:
        accumulation = max(1, cfg.global_batch_size // (cfg.batch_size * ranks))
    mode = FakeTensorMode()
    model = _fake_model(cfg, adapters, mode)
    estimator, whole = _estimator(cfg, model)
    check_precision(cfg)
    count = cfg.batch_size * (cfg.group_size if "prompts" in cfg else together)
    size = count * ranks * accumulation
    length, lines = _data(cfg, model, size, estimator)
    multiple = math.lcm(cfg.pad_to_multiple_of, whole)
    length = -(-length // multiple) * multiple
    shards = ranks // cfg.data_parallel_replicate_dim
    masters = training.get_dtype(cfg.master_dtype, device=torch.device("cpu"))
    # A step's draws come one after another, as micro-batches do.
    parts = accumulation * _draws(cfg, estimator)
    job = Job(model, estimator, _rows(count, length), mode, shards, parts, masters)
    need = memory(cfg, job)
    if copy := _copy(cfg, model) / shards:
        need = need._replace(parameters=need.parameters + copy, peak=need.peak + copy)
        lines.append(f"Of the parameters, the reference's copy: {copy / GIB:.2f} GiB")
    written = 0.0
    if "prompts" in cfg:
        written, line = _written(cfg, job, need)
        lines.append(line)
        need = need._replace(peak=max(need.peak, written))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, learnt = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    out = [
        f"Dry run: {total:,} parameters, {learnt:,} of them trained in {cfg.master_dtype}, "
        f"computed with in {cfg.dtype}; {ranks} ranks, each copy of the model on {shards}",
        f"a micro-batch: {count} rows of {length} tokens, "
        f"{estimator.masking.views} view(s) each; a step: {size} rows",
        "",
        "On each rank, GiB",
        *(f"  {name:12} {size / GIB:9.3f}" for name, size in need._asdict().items()),
        "",
        *lines,
        f"A checkpoint: {_saved(cfg, job, need.optimizer * shards) / GIB:.2f} GiB",
    ]
    return "\n".join(out) + _fit(cfg, need, given, written)


def _estimator(cfg: DictConfig, model: MDMTransformer) -> tuple[Estimator, int]:
    """The config's, for the model, at the start of training; and tokens that are whole blocks."""
    estimator = read_estimator(cfg, mask_id=0)._replace(w=read_objective(cfg)(0.0))
    check_estimator(estimator, is_causal(model))
    blocks = block_schedule(cfg, model, estimator)
    return estimator._replace(blocks=blocks.shortest()), blocks.multiple


def _rows(count: int, length: int) -> Batch:
    """Rows of which all may be masked."""
    return Batch(
        torch.zeros(count, length, dtype=torch.long),
        torch.ones(count, length, dtype=torch.bool),
        None,
        torch.rand(count, length, dtype=torch.float64),
        torch.arange(count),
    )


def _draws(cfg: DictConfig, estimator: Estimator) -> int:
    """Draws of each row in a step: several where bounds are estimated."""
    return max(1, int(cfg.draws) // estimator.masking.views) if "draws" in cfg else 1


def _copy(cfg: DictConfig, model: MDMTransformer) -> int:
    """Bytes of a reference model beside the one that is trained, of all shards."""
    if "reference" not in cfg or cfg.reference != "model":
        return 0
    return sum(nbytes(p) for p in model.parameters())


def _given(cfg: DictConfig) -> dict[str, Any]:
    """``cfg.dry_run``'s ranks and device_gib, where they are given."""
    dictionary = isinstance(cfg.dry_run, DictConfig)
    given = {str(k): v for k, v in cfg.dry_run.items()} if dictionary else {}
    if unknown := given.keys() - {"ranks", "device_gib"}:
        raise UserError(f"dry_run.{sorted(unknown)[0]}: unknown: use ranks and device_gib, or True")
    return given


def _fake_model(cfg: DictConfig, adapters: bool | None, mode: FakeTensorMode) -> MDMTransformer:
    """The config's model on fake tensors, with what is to be trained marked so."""
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    with mode, training.set_default_dtype(dtype), _quantised_at_once():
        model: MDMTransformer = instantiate(cfg, "model")
    trained = adapter_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or name in trained)
    check_adapters(model, adapters)
    if cfg.enable_activation_checkpointing:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    return model


@contextmanager
def _quantised_at_once() -> Iterator[None]:
    """torchao quantises a weight by chunks, for their memory. Fake tensors take none, and a QLoRA
    model of them is there in a tenth of the time."""
    usual, nf4tensor.CHUNK_SIZE = nf4tensor.CHUNK_SIZE, sys.maxsize
    try:
        yield
    finally:
        nf4tensor.CHUNK_SIZE = usual


def _saved(cfg: DictConfig, job: Job, optimizer: float) -> float:
    """Bytes of a checkpoint."""
    trained = adapter_names(job.model)
    if not trained:
        return job.resting() + optimizer
    saved = job.widening * sum(p.nbytes for p in job.trained)
    if not cfg.checkpointer.get("save_adapter_weights_only"):
        names = named_parameters(job.model)
        saved += sum(p.nbytes for name, p in names.items() if name not in trained)
    return saved + optimizer


def _data(
    cfg: DictConfig, model: MDMTransformer, size: int, estimator: Estimator
) -> tuple[int, list[str]]:
    """The longest row, and lines on the run's length; from the data if they are there."""
    try:
        tokenizer = instantiate(cfg, "tokenizer")
        if "prompts" in cfg:
            return _of_prompts(cfg, tokenizer, size)
        rows, _ = read_datasets(cfg, tokenizer)
        batches = GlobalBatches(rows, Split(size), Padding(0), seed=cfg.seed)
    except UserError as error:
        longest = cfg.tokenizer.get("max_seq_len") or model.max_seq_len
        return longest, [f"Steps: unknown ({error}); rows taken to be {longest} tokens long"]
    per_epoch = min(batches.steps_per_epoch, cfg.max_steps_per_epoch or batches.steps_per_epoch)
    steps, views = cfg.epochs * per_epoch, estimator.masking.views
    views *= _draws(cfg, estimator)
    if "reference" in cfg:
        views *= 3  # the policy's without gradients and with, and the reference's
    probe, wanted = 0, estimator.timesteps.probe_plan(estimator.w)
    if wanted:
        probe = len(wanted.t) * wanted.rows * wanted.masks * estimator.masking.views
        if wanted.every_n_steps:
            probe *= -(-steps // wanted.every_n_steps)
    tokens = steps * size * rows.facts.tokens / len(rows)
    return rows.facts.longest, [
        f"Steps: {steps:,} ({cfg.epochs} epochs of {per_epoch:,}); forwards: "
        f"{steps * size * views + probe:,}, {probe:,} of them to probe the model; tokens without "
        f"filling: {tokens:,.0f}"
    ]


def _of_prompts(cfg: DictConfig, tokenizer: ChatTokenizer, size: int) -> tuple[int, list[str]]:
    """The longest row of a prompt and its answer, and a line on the run's length."""
    prompts = read_prompts(tokenizer, prompts=cfg.prompts)
    longest = max(len(x.ids) for x in prompts) + cfg.max_new_tokens
    per_epoch = len(prompts) // (size // cfg.group_size)
    steps = cfg.epochs * min(per_epoch, cfg.max_steps_per_epoch or per_epoch)
    written = cfg.decoding.get("steps") or cfg.max_new_tokens
    # Each update: bounds, and their gradients; those of the old policy, and the reference's.
    noise = 1 if cfg.updates_share_noise else cfg.updates
    passes = 2 * cfg.updates + noise - 1 + noise * (cfg.reference is not None)
    return longest, [
        f"Steps: {steps:,}, each of {size} answers and {cfg.updates} updates; forwards: "
        f"{steps * size * written:,} to write them, {steps * size * cfg.draws * passes:,} to learn "
        "from them"
    ]


def _smaller(cfg: DictConfig) -> str:
    return f"set batch_size={cfg.batch_size // 2}, and gradient_accumulation_steps to match"


def _written(cfg: DictConfig, job: Job, need: Memory) -> tuple[float, str]:
    """The peak while a micro-batch's answers are written, and a line on it."""
    rows, length = job.rows.tokens.shape
    found = writing(cfg, job.model, job.mode, rows, length)
    resting = 0 if cfg.fsdp_cpu_offload else need.parameters + need.optimizer
    line = (
        f"Writing {rows} answers at once: {found.peak / GIB:.2f} GiB: logits "
        f"{found.logits / GIB:.2f}, caches {found.caches / GIB:.2f}, activations "
        f"{found.activations / GIB:.2f}"
    )
    return resting + need.gathered + found.peak, line


def _fit(cfg: DictConfig, need: Memory, given: dict[str, Any], written: float) -> str:
    """A line on whether it fits the device. written: the peak while answers are written, if any.

    Raises:
        UserError: if it does not, with the line to change.
    """
    room = given.get("device_gib")
    if room is None and cfg.device.startswith("cuda"):
        if not torch.cuda.is_available():
            return "\nNo CUDA device here: dry_run.device_gib=80 checks the fit"
        room = torch.cuda.get_device_properties(0).total_memory / GIB
    elif room is None:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if need.peak / GIB <= room:
        return f"\nFits: {need.peak / GIB:.2f} of {room:.1f} GiB"
    passing = need.activations + need.logits
    if need.peak == written and cfg.batch_size == 1:
        advice = "set a smaller decoding.block_length, or group_size"
    elif need.peak == written:
        advice = _smaller(cfg)
    elif need.peak - passing > room * GIB:
        advice = "use more ranks (tune run --nproc_per_node), or a LoRA model"
        if need.optimizer > 1.5 * need.parameters and cfg.dtype == "bf16":
            advice += ", or master_dtype=bf16 optimizer=torchao.optim.AdamW8bit"
    elif not cfg.enable_activation_checkpointing:
        advice = "set enable_activation_checkpointing=True"
    elif cfg.batch_size > 1:
        advice = _smaller(cfg)
    else:
        key = "bound" if "bound" in cfg else "loss"
        advice = f"set a smaller tokenizer.max_seq_len, or {key}.chunk_size"
    raise UserError(
        f"dry_run: {need.peak / GIB:.1f} GiB on each rank do not fit {room:.1f} GiB: {advice}"
    )
