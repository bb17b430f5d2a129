"""The memory of a training step, on fake tensors.

A step runs in torch's FakeTensorMode, where tensors have shapes and no storage, and
torch.distributed's ``MemTracker`` sees each of its allocations: so adapters, checkpointing, pairs
of masks and the optimizer count as they are. What FSDP2 shards is divided by the ranks, and what
it gathers is added.
"""

from collections import Counter
from enum import Enum
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.weak import WeakIdKeyDictionary
from torchao.dtypes.nf4tensor import NF4Tensor

from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator, Times
from mdm_plugin.data.batches import Batch
from mdm_plugin.distributed.parameters import adapter_names, named_parameters
from mdm_plugin.models import MDMTransformer
from mdm_plugin.models.blocks import BlockAttention, PackedBlocks
from mdm_plugin.training.corruption import Corrupted, corrupt
from mdm_plugin.training.step import forward_loss

# Bytes of state per parameter of optimizers that do not run on fake tensors.
_STATE_BYTES = {"AdamW8bit": 2.03, "Adam8bit": 2.03, "AdamW4bit": 1.06, "Adam4bit": 1.06}


class Memory(NamedTuple):
    """Bytes of one rank.

    parameters, gradients, optimizer: what rests, sharded.
    gathered: of a layer and of what is outside the layers, whole while FSDP2 runs them.
    activations: at the peak of forward and backward, without the logits.
    logits: of one chunk of the head, in fp32, and in the head's dtype if that is another.
    peak: the largest of forward and backward, and of the optimizer's step.
    host: in CPU memory, under ``fsdp_cpu_offload``: what rests, and the optimizer's step; then
        ``peak`` is without them.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    peak: float
    host: float


class Job(NamedTuple):
    """What a rank is to do in a micro-batch.

    model: of fake tensors, in the dtype that it computes in. estimator, rows: what it trains on.
    mode: of the fake tensors. shards: ranks that share a copy of the model. accumulation:
    micro-batches of a step. masters: dtype of what is trained, at rest.
    """

    model: MDMTransformer
    estimator: Estimator
    rows: Batch
    mode: FakeTensorMode
    shards: int
    accumulation: int
    masters: torch.dtype

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def widening(self) -> float:
        """Bytes of what is trained at rest, for each byte that is computed with."""
        return self.masters.itemsize / self.trained[0].element_size()

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 runs the model, as ``build_model`` decides."""
        return self.shards > 1 or (self.widening > 1 and not adapter_names(self.model))

    def resting(self) -> float:
        """Bytes of all parameters at rest, of all shards."""
        frozen = sum(nbytes(p) for p in self.model.parameters() if not p.requires_grad)
        return frozen + self.widening * sum(p.nbytes for p in self.trained)


def memory(cfg: DictConfig, job: Job) -> Memory:
    """The memory of a rank that does ``job``.

    Layers are alike: two and three of them are measured, and what one adds is counted for the rest.
    """
    model, shards, loss = job.model, job.shards, job.estimator.loss
    # All are masked: it happens.
    t = torch.full((len(job.rows.tokens),), 0.999, dtype=torch.float64)
    noisy = corrupt(job.rows, Times(t, torch.ones_like(t)), job.estimator)
    if cfg.device.startswith("cuda") and isinstance(noisy.attend, BlockAttention):
        # Flex attention keeps what attention of all to all does, and no keys of each call.
        noisy = noisy._replace(attend=None)
    layers = model.layers
    few = [min(2, len(layers)), min(3, len(layers))]
    measured = []
    for count in few:
        model.layers = layers[:count]
        measured.append(_step(cfg, job, noisy))
    model.layers = layers
    more = (len(layers) - few[0]) / max(1, few[1] - few[0])
    first, second = measured
    step = StepBytes._make(a + (b - a) * more for a, b in zip(first, second, strict=True))

    parameters, trained, wider = job.resting(), job.trained, job.widening
    gradients = 0 if cfg.optimizer_in_bwd else wider * sum(p.nbytes for p in trained)
    masked = min(loss.chunk_size, len(noisy.targets.labels))
    vocabulary = model.tok_embeddings.num_embeddings
    size = trained[0].element_size()
    logits = masked * vocabulary * (4 if size == 4 else size + 4)
    gathers = job.gathers or cfg.fsdp_cpu_offload
    gathered = _gathered(model, cfg.fsdp_reshard_after_forward) if gathers else 0
    backward = max(step.passing, step.late + wider * step.late_gradients / shards)
    if cfg.optimizer_in_bwd:
        backward = step.passing
    elif job.accumulation > 1:  # the gradient of the micro-batches before is there all the time
        backward = step.passing + gradients / shards
    stepping = (gradients + step.stepping) / shards
    resting, host = (parameters + step.state) / shards, 0.0
    peak = resting + max(gathered + backward, stepping)
    if cfg.fsdp_cpu_offload:  # gradients go there as they come, and are stepped with there
        peak, host = gathered + step.passing, resting + stepping
    return Memory(
        parameters / shards,
        gradients / shards,
        step.state / shards,
        gathered,
        max(0, step.passing - logits),
        logits,
        peak,
        host,
    )


class Writing(NamedTuple):
    """Bytes of a rank beyond the parameters, while two answers or more are written together.

    logits: of a block's places, with all that is computed from them to sample. caches: keys and
    values. activations: of a forward over whole rows, before its logits.
    """

    logits: float
    caches: float
    activations: float

    @property
    def peak(self) -> float:
        return self.caches + max(self.logits, self.activations)


def writing(cfg: DictConfig, model: MDMTransformer, mode: Any, rows: int, length: int) -> Writing:
    """The memory of writing ``rows`` answers, 2 or more, of ``cfg.max_new_tokens`` together.

    Args:
        cfg: with ``decoding`` and ``sampler``.
        model: of fake tensors, of ``mode``.
        length: of a prompt with its answer, in tokens.
    """
    decoding, sampler = cfg.decoding, cfg.sampler
    views = 2 if decoding.get("cfg_scale") else 1
    width = decoding.get("block_length") or cfg.max_new_tokens
    # Logits as they are and by temperature, the probabilities of both, in fp32; a row's fp64 sums.
    # To sort them takes more, and so do samplers that compare distributions.
    each = 40 if (decoding.get("top_p") or 1) < 1 else 20 if decoding.get("top_k") else 16
    each += 16 if sampler._component_.endswith(".Stable") else 0
    each += 4 if sampler.get("order") == "entropy" else 0
    logits = max(each * rows, 8 * rows + 24) * width * model.tok_embeddings.num_embeddings
    attention, layers = model.layers[0].attn, model.layers
    size = next(model.parameters()).element_size()
    heads = attention.num_kv_heads * attention.head_dim
    caches = 2 * len(layers) * views * rows * length * heads * size if decoding.get("cache") else 0
    model.layers = layers[:2]
    tracker = _Peaks(model)
    with mode, torch.no_grad():
        tokens = torch.zeros(views * rows, length, dtype=torch.long)
        mask = torch.ones(views * rows, 1, length, dtype=torch.bool)
        places = torch.arange(views * rows * width)
        with tracker:
            model(tokens, mask=mask, positions=places, head=lambda head, hidden: hidden)
    model.layers = layers
    return Writing(logits, caches, tracker.passing)


class StepBytes(NamedTuple):
    """Bytes beyond the parameters, in a step of which nothing is sharded.

    passing: the most that forward and backward hold, if gradients went as they came.
    late, late_gradients: the most that they hold with the gradients, and the gradients of it; 0
        where these do not come to be together.
    state, stepping: of the optimizer, and what its step allocates for the moment.
    """

    passing: float
    late: float
    late_gradients: float
    state: float
    stepping: float


def _step(cfg: DictConfig, job: Job, noisy: Corrupted) -> StepBytes:
    """The bytes of a step of ``job`` with the layers that its model has now."""
    model, mode = job.model, job.mode
    tracker = _forward_backward(model, job.estimator.loss, noisy, mode)
    late = gradients = 0
    # Else gradients go as they come, or are there from the micro-batches before.
    if job.accumulation == 1 and not cfg.optimizer_in_bwd:
        kept = _peak(tracker)
        gradients = kept["GRAD"]
        late = sum(kept.values()) - kept["PARAM"] - gradients
    for p in job.trained:
        p.grad = None
    with mode:
        masters = {
            name: nn.Parameter(torch.empty_like(p, dtype=job.masters))
            for name, p in named_parameters(model).items()
            if p.requires_grad
        }
        state, stepping = _optimizer_bytes(cfg, masters)
    return StepBytes(tracker.passing, late, gradients, state, stepping)


def _fake(attend: Any, mode: FakeTensorMode) -> Any:
    if isinstance(attend, BlockAttention | PackedBlocks):
        return attend.with_masks(mode.from_tensor)
    return None if attend is None else mode.from_tensor(attend)


class _Peaks(MemTracker):
    """A tracker of a model of which some may be frozen, and of its peaks alone."""

    def __init__(self, model: MDMTransformer) -> None:
        super().__init__()
        self.passing = 0  # the peak of all but parameters, and gradients that have come
        # It hooks the gradient of every parameter, also of those that have none: these are taken.
        none = torch.zeros((), requires_grad=True).register_hook(lambda grad: None)
        for p in model.parameters():
            if not p.requires_grad:
                self._param_to_grad_hook_handles[p] = (none, none)
        self.track_external(model)

    def _update_peak_stats(self, peak_state: Any) -> None:
        # After each operation. Each module's, for which nothing asks, take half of the time.
        modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules
        now = _kinds(self._curr_mem_snap)
        rest = sum(now.values()) - now["PARAM"] - now["GRAD"]
        self.passing = max(self.passing, rest)


def _forward_backward(model: MDMTransformer, loss: Any, noisy: Any, mode: Any) -> _Peaks:
    """The peaks of a forward and backward pass."""
    tracker, attend = _Peaks(model), _fake(noisy.attend, mode)
    with mode, tracker:
        fake = noisy._replace(
            noisy=mode.from_tensor(noisy.noisy),
            attend=attend,
            input_pos=None if noisy.input_pos is None else mode.from_tensor(noisy.input_pos),
            targets=type(noisy.targets)(*(mode.from_tensor(x) for x in noisy.targets)),
        )
        forward_loss(model, loss, fake)[0].backward()
    return tracker


def _peak(tracker: MemTracker) -> Counter[str]:
    """Bytes by kind."""
    return _kinds(tracker.get_tracker_snapshot("peak"))


def _kinds(snapshot: dict[torch.device, dict[Any, int]]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for device in snapshot.values():
        for kind, count in device.items():
            name = kind.name if isinstance(kind, Enum) else str(kind)
            if name != "Total":
                kinds[name] += count
    return kinds


def _optimizer_bytes(cfg: DictConfig, named: dict[str, nn.Parameter]) -> tuple[float, float]:
    """Bytes of an optimizer's state, and of what its step allocates for the moment."""
    optimizer, trained = instantiate(cfg, "optimizer", [*named.items()]), [*named.values()]
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


def nbytes(parameter: Tensor) -> int:
    """Bytes of its storage; NF4 has half a byte per value, and scales."""
    data = parameter.data
    if not isinstance(data, NF4Tensor):
        return data.nbytes
    return sum(getattr(data, name).nbytes for name in data.__tensor_flatten__()[0])


def _gathered(model: MDMTransformer, reshard: bool) -> int:
    """What FSDP2 has whole while it runs a layer and fetches the next: parameters in the dtype that
    is computed in, their gradients, and those of a layer in fp32 for the sum over the ranks. All
    layers' parameters where they stay after the forward pass, which is not to ``reshard`` them."""
    sizes = [sum(nbytes(p) for p in layer.parameters()) for layer in model.layers]
    layers = 2 * max(sizes) if reshard else sum(sizes)
    inner = {id(p) for layer in model.layers for p in layer.parameters()}
    outer = [p for p in model.parameters() if id(p) not in inner]
    learnt = [p for p in model.layers[0].parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in learnt) + sum(p.nbytes for p in outer if p.requires_grad)
    summed = sum(4 * p.numel() for p in learnt if p.element_size() < 4)
    return layers + sum(p.nbytes for p in outer) + gradients + summed
