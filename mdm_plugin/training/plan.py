"""``dry_run``: what a run will need and do, before any weight is loaded.

A training step runs on fake tensors (torch's FakeTensorMode), which have shapes and no storage,
and torch.distributed's ``MemTracker`` sees each of its allocations: so adapters, checkpointing,
pairs of masks and the optimizer count as they are. What FSDP2 shards is divided by the ranks, and
what it gathers is added.
"""

import os
import warnings
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from mdm_plugin.data import GlobalBatches
from mdm_plugin.data.batches import Batch
from mdm_plugin.errors import UserError
from mdm_plugin.models import MDMTransformer
from mdm_plugin.timesteps import ParetoOptimal
from mdm_plugin.training.checks import check_adapters, check_estimator
from mdm_plugin.training.config import instantiate
from mdm_plugin.training.distributed import adapter_names, named_parameters
from mdm_plugin.training.step import corrupt, forward_loss

GIB = 2**30
# Bytes of state per parameter of optimizers that do not run on fake tensors.
_STATE_BYTES = {"AdamW8bit": 2.03, "Adam8bit": 2.03, "AdamW4bit": 1.06, "Adam4bit": 1.06}


class Memory(NamedTuple):
    """Bytes of one rank.

    parameters, gradients, optimizer: what rests, sharded.
    gathered: of a layer and of what is outside the layers, whole while FSDP2 runs them.
    activations: at the peak of forward and backward, without the logits.
    logits: of one chunk of the head, in fp32, and in the head's dtype if that is another.
    peak: the largest of forward and backward, and of the optimizer's step.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    peak: float


def memory(
    cfg: DictConfig,
    model: MDMTransformer,
    loss: Any,
    masking: Any,
    rows: Batch,
    mode: FakeTensorMode,
    *,
    shards: int,
    accumulation: int,
) -> Memory:
    """The memory of a rank that trains ``model``, of fake tensors, on micro-batches like ``rows``.

    Layers are alike: two and four of them are measured, and what one adds is counted for the rest.
    """
    t = torch.full((len(rows.tokens),), 0.999, dtype=torch.float64)  # all masked: it happens
    noisy = corrupt(rows, t, torch.ones_like(t), masking, loss, 0)
    layers = model.layers
    few = [min(2, len(layers)), min(4, len(layers))]
    measured = []
    for count in few:
        model.layers = layers[:count]
        measured.append(_step(cfg, model, loss, noisy, mode))
    model.layers = layers
    more = (len(layers) - few[0]) / max(1, few[1] - few[0])
    step = Step(*(a + (b - a) * more for a, b in zip(*measured, strict=True)))

    parameters = sum(_nbytes(p) for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = 0 if cfg.optimizer_in_bwd else sum(p.nbytes for p in trained)
    masked = min(loss.chunk_size, len(noisy.targets.labels))
    vocabulary = model.tok_embeddings.num_embeddings
    size = trained[0].element_size()
    logits = masked * vocabulary * (4 if size == 4 else size + 4)
    gathered = _gathered(model) if shards > 1 else 0
    backward = max(step.passing, step.late + step.late_gradients / shards)
    if cfg.optimizer_in_bwd:
        backward = step.passing
    elif accumulation > 1:  # the gradient of the micro-batches before is there all the time
        backward = step.passing + gradients / shards
    stepping = (gradients + step.stepping) / shards
    return Memory(
        parameters / shards,
        gradients / shards,
        step.state / shards,
        gathered,
        max(0, step.passing - logits),
        logits,
        (parameters + step.state) / shards + max(gathered + backward, stepping),
    )


class Step(NamedTuple):
    """Bytes beyond the parameters, in a step of which nothing is sharded.

    passing: the most that forward and backward hold, if gradients went as they came.
    late, late_gradients: the most that they hold with the gradients, and the gradients of it.
    state, stepping: of the optimizer, and what its step allocates for the moment.
    """

    passing: float
    late: float
    late_gradients: float
    state: float
    stepping: float


def _step(cfg: DictConfig, model: MDMTransformer, loss: Any, noisy: Any, mode: Any) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = _forward_backward(model, loss, noisy, mode)
    for p in trained:
        p.grad = None
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
    dropped = _forward_backward(model, loss, noisy, mode)
    for hook in hooks:
        hook.remove()
    with mode:
        state, stepping = _optimizer_bytes(cfg, trained)
    rest = kept["PARAM"] + kept.get("GRAD", 0)
    passing = sum(dropped.values()) - dropped["PARAM"]
    return Step(passing, sum(kept.values()) - rest, kept.get("GRAD", 0), state, stepping)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _forward_backward(model: MDMTransformer, loss: Any, noisy: Any, mode: Any) -> dict[str, int]:
    """Bytes by kind at the peak of a forward and backward pass."""
    tracker = MemTracker()
    # It hooks the gradient of every parameter, also of those that have none: these are taken.
    none = torch.zeros((), requires_grad=True).register_hook(lambda grad: None)
    for p in model.parameters():
        if not p.requires_grad:
            tracker._param_to_grad_hook_handles[p] = (none, none)
    with mode:
        tracker.track_external(model)
        with tracker:
            fake = noisy._replace(
                noisy=mode.from_tensor(noisy.noisy),
                attend=None if noisy.attend is None else mode.from_tensor(noisy.attend),
                targets=type(noisy.targets)(*(mode.from_tensor(x) for x in noisy.targets)),
            )
            forward_loss(model, loss, fake)[0].backward()
    return _peak(tracker)


def _peak(tracker: MemTracker) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for device in tracker.get_tracker_snapshot("peak").values():
        for kind, count in device.items():
            name = str(getattr(kind, "name", kind))
            if name != "Total":
                kinds[name] = kinds.get(name, 0) + count
    return kinds


def _optimizer_bytes(cfg: DictConfig, trained: list[nn.Parameter]) -> tuple[float, float]:
    """Bytes of an optimizer's state, and of what its step allocates for the moment."""
    optimizer = instantiate(cfg, "optimizer", trained)
    name = type(optimizer).__name__
    if name in _STATE_BYTES:
        return _STATE_BYTES[name] * sum(p.numel() for p in trained), 0.0
    for p in trained:
        p.grad = torch.empty_like(p)
    tracker = MemTracker()
    tracker.track_external(*trained)
    with tracker:
        optimizer.step()
    for p in trained:
        p.grad = None
    state = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    total = sum(x.nbytes for x in state)
    parameters = sum(p.nbytes for p in trained)
    return total, max(0.0, sum(_peak(tracker).values()) - total - parameters)


def _nbytes(parameter: Tensor) -> int:
    """Bytes of its storage; NF4 has half a byte per value, and scales."""
    data = parameter.data
    if not isinstance(data, NF4Tensor):
        return data.nbytes
    return sum(getattr(data, name).nbytes for name in data.__tensor_flatten__()[0])


def _gathered(model: MDMTransformer) -> int:
    """Whole parameters while FSDP2 runs a layer and fetches the next, and their gradients."""
    layer = max(sum(_nbytes(p) for p in layer.parameters()) for layer in model.layers)
    inner = {id(p) for layer in model.layers for p in layer.parameters()}
    outer = [p for p in model.parameters() if id(p) not in inner]
    learnt = sum(p.nbytes for p in model.layers[0].parameters() if p.requires_grad)
    learnt += sum(p.nbytes for p in outer if p.requires_grad)
    return 2 * layer + sum(p.nbytes for p in outer) + learnt


def dry_run(cfg: DictConfig, adapters: bool) -> None:
    """Print what the run of ``cfg`` will need on each rank, and do; on the first process alone.

    Raises:
        UserError: as ``plan``.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracker's, on what fake tensors lack
            print(plan(cfg, adapters))


def plan(cfg: DictConfig, adapters: bool) -> str:
    """A table of what the run of ``cfg`` will need on each rank, and do.

    ``cfg.dry_run``: True, for as many ranks as were started; or {ranks, device_gib}.

    Raises:
        UserError: if something in the config is wrong, or the run does not fit the device.
    """
    dictionary = isinstance(cfg.dry_run, DictConfig)
    given = {str(k): v for k, v in cfg.dry_run.items()} if dictionary else {}
    if unknown := given.keys() - {"ranks", "device_gib"}:
        raise UserError(f"dry_run.{sorted(unknown)[0]}: unknown: use ranks and device_gib, or True")
    ranks = int(given.get("ranks", os.environ.get("WORLD_SIZE", 1)))
    if ranks < 1 or ranks % cfg.data_parallel_replicate_dim:
        raise UserError(
            f"dry_run.ranks: {ranks}: use a multiple of data_parallel_replicate_dim, "
            f"{cfg.data_parallel_replicate_dim}"
        )
    shards = ranks // cfg.data_parallel_replicate_dim
    accumulation = cfg.gradient_accumulation_steps
    if cfg.global_batch_size:
        accumulation = max(1, cfg.global_batch_size // (cfg.batch_size * ranks))
    loss = instantiate(cfg, "loss")
    timesteps, masking = instantiate(cfg, "timesteps"), instantiate(cfg, "masking")
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    mode = FakeTensorMode()
    with mode, training.set_default_dtype(dtype):
        model = instantiate(cfg, "model")
    trained = adapter_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or name in trained)
    check_adapters(model, adapters)
    check_estimator(timesteps, masking, loss, model)
    if cfg.enable_activation_checkpointing:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )

    size = cfg.batch_size * ranks * accumulation
    views = masking(torch.full((1,), 0.5), torch.rand(1, 8), torch.ones(1, 8) > 0).mask.shape[0]
    length, lines = _data(cfg, model, size, views, timesteps)
    length = -(-length // cfg.pad_to_multiple_of) * cfg.pad_to_multiple_of
    rows = Batch(
        torch.zeros(cfg.batch_size, length, dtype=torch.long),
        torch.ones(cfg.batch_size, length, dtype=torch.bool),
        None,
        torch.rand(cfg.batch_size, length, dtype=torch.float64),
        torch.arange(cfg.batch_size),
    )
    need = memory(
        *(cfg, model, loss, masking, rows, mode), shards=shards, accumulation=accumulation
    )
    total = sum(p.numel() for p in model.parameters())
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = sum(p.nbytes for p in model.parameters() if p.requires_grad) if trained else 0
    if not (trained and cfg.checkpointer.get("save_adapter_weights_only")):
        names = named_parameters(model)
        saved += sum(p.nbytes for name, p in names.items() if name not in trained)
    saved += need.optimizer * shards
    out = [
        f"Dry run: {total:,} parameters, {learnt:,} of them trained, {cfg.dtype}; {ranks} ranks, "
        f"each copy of the model on {shards}",
        f"a micro-batch: {cfg.batch_size} rows of {length} tokens, {views} view(s) each; a step: "
        f"{size} rows",
        "",
        "On each rank, GiB",
        *(f"  {name:12} {getattr(need, name) / GIB:9.3f}" for name in Memory._fields),
        "",
        *lines,
        f"A checkpoint: {saved / GIB:.2f} GiB",
    ]
    return "\n".join(out) + _fit(cfg, need, given)


def _data(
    cfg: DictConfig, model: MDMTransformer, size: int, views: int, timesteps: Any
) -> tuple[int, list[str]]:
    """The longest row, and lines on the run's length; from the data if they are there."""
    try:
        tokenizer = instantiate(cfg, "tokenizer")
        rows = instantiate(cfg, "dataset", tokenizer)
        batches = GlobalBatches(rows, batch_size=size, seed=cfg.seed, pad_id=0)
    except UserError as error:
        longest = cfg.tokenizer.get("max_seq_len") or model.max_seq_len
        return longest, [f"Steps: unknown ({error}); rows taken to be {longest} tokens long"]
    per_epoch = min(batches.steps_per_epoch, cfg.max_steps_per_epoch or batches.steps_per_epoch)
    steps = cfg.epochs * per_epoch
    probe = 0
    if isinstance(timesteps, ParetoOptimal):
        probe = timesteps.grid * timesteps.rows * timesteps.masks * views
        if timesteps.refit_every_n_steps:
            probe *= -(-steps // timesteps.refit_every_n_steps)
    tokens = steps * size * float(rows.lengths.double().mean())
    return int(rows.lengths.max()), [
        f"Steps: {steps:,} ({cfg.epochs} epochs of {per_epoch:,}); forwards: "
        f"{steps * size * views + probe:,}, {probe:,} of them P-POTS's probe; tokens without "
        f"filling: {tokens:,.0f}"
    ]


def _fit(cfg: DictConfig, need: Memory, given: dict[str, Any]) -> str:
    """A line on whether it fits the device.

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
    if need.peak - passing > room * GIB:
        advice = "use more ranks (tune run --nproc_per_node), a LoRA model, or an 8-bit optimizer"
        if need.optimizer > need.parameters:
            advice += " (optimizer._component_=torchao.optim.AdamW8bit)"
    elif not cfg.enable_activation_checkpointing:
        advice = "set enable_activation_checkpointing=True"
    elif cfg.batch_size > 1:
        advice = f"set batch_size={cfg.batch_size // 2}, and gradient_accumulation_steps to match"
    else:
        advice = "set a smaller tokenizer.max_seq_len, or loss.chunk_size"
    raise UserError(
        f"dry_run: {need.peak / GIB:.1f} GiB on each rank do not fit {room:.1f} GiB: {advice}"
    )
