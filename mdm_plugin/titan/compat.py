"""Between torchtitan 0.3.0 and what it runs on here.

On machines without an accelerator a stand-in for the device module, for tests and demos alone:
torchtitan asks it for names and memory figures that ``torch.cpu`` does not have. And one function
that torchtitan takes from torch's nightly builds.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist


def apply() -> None:
    """Make both fit; called when ``mdm_plugin.titan`` is imported."""
    if not hasattr(dist, "set_timeout"):
        from torch.distributed.distributed_c10d import _set_pg_timeout

        dist.set_timeout = _set_pg_timeout  # type: ignore[attr-defined]
    if not torch.accelerator.is_available():
        stand_in()


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
