"""Between torchtitan 0.3.0 and what it runs on here.

Two functions that torchtitan takes from torch's nightly builds; and without an accelerator, for
tests and demos alone, a stand-in for the device module, whose figures ``torch.cpu`` does not have.
"""

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle


def apply() -> None:
    """Make both fit; called when ``mdm_plugin.titan`` is imported."""
    if not hasattr(dist, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout

        dist.set_timeout = _set_pg_timeout  # type: ignore[attr-defined]
    for schedule in (PipelineScheduleSingle, PipelineScheduleMulti):
        if "arg_mbs" not in inspect.signature(schedule.step).parameters:
            schedule.step = _step_of_microbatches  # type: ignore[method-assign, assignment]
    if not torch.accelerator.is_available():
        stand_in()


def _step_of_microbatches(self: Any, **given: Any) -> None:
    """A pipeline's step over micro-batches that have been made already: arg_mbs, kwarg_mbs, …"""
    for stage in [self._stage] if isinstance(self, PipelineScheduleSingle) else self._stages:
        stage.has_backward = True
        stage.clear_runtime_states()
    self._step_microbatches(**given)


def stand_in() -> None:
    """Give ``torch.cpu`` what torchtitan asks of a device module, and have it used."""
    answers: dict[str, Any] = {
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 40, name="CPU"),
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "set_device": lambda *_: None,
    }
    for name, answer in answers.items():
        setattr(torch.cpu, name, answer)
    # torchtitan takes CUDA for granted where it finds no accelerator; its modules copy the name.
    from torchtitan.tools import utils

    modules = [m for name, m in sys.modules.items() if name.startswith("torchtitan.")]
    for module in [utils, *modules]:
        for name, value in (("device_type", "cpu"), ("device_module", torch.cpu)):
            if hasattr(module, name):
                setattr(module, name, value)


def parallelize(model: Any, **given: Any) -> Any:
    """torchtitan's ``parallelize_llama``; gloo, of CPU ranks, cannot scale as it sums."""
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.models.llama3 import parallelize_llama

    model = parallelize_llama(model, **given)
    if not torch.accelerator.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
