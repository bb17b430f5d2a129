"""One process or many: the process group, and what this process is in it."""

import atexit
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune import training
from torchtune.utils import get_device

from mdm_plugin.errors import UserError


class World(NamedTuple):
    """This process among those that share the rows.

    mesh is None for a single process. group: theirs, None for all processes. averages: whether
    gradients are averaged over them (FSDP2's default) or summed.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    group: dist.ProcessGroup | None = None
    averages: bool = True

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, on the device."""
        x = x.to(self.device, copy=self.size > 1)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest ``x`` of the ranks, on the device."""
        x = x.to(self.device, copy=self.size > 1)
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Any) -> list[Any]:
        """What each rank has, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.group)
        return found

    def alone(self) -> "World":
        """This process for itself: what it computes is not shared with the others."""
        return World(0, 1, self.device, None)


def find_device(device: str) -> torch.device:
    """This rank's device of that kind.

    Raises:
        UserError: if it is not there; torchtune would take the CPU in place of a GPU.
    """
    try:
        place = get_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if "local rank" in reason:
            reason += ": --nproc_per_node is more than there are"
        raise UserError(f"device: {device}: {reason}") from error
    if place.type != torch.device(device).type:
        raise UserError(
            f"device: {device}: there is none here (mdm doctor says why); device=cpu is the CPU"
        )
    return place


@contextmanager
def distributed(
    device: str, shard_dim: int = -1, replicate_dim: int = 1, timeout_minutes: float = 30
) -> Iterator[World]:
    """The world that torchrun has made, or one process without it; its end is the group's end.

    Args:
        device: ``cpu``, ``cuda``, ….
        shard_dim: ranks that one copy of the model is sharded over (FSDP2); −1 for all that
            ``replicate_dim`` leaves.
        replicate_dim: copies of the model (HSDP); 1 for plain FSDP2, −1 for as many as
            ``shard_dim`` leaves.
        timeout_minutes: a collective that waits longer ends the run, with a line that says so.

    Raises:
        UserError: if the device is not there, or the sizes do not make up the world.
    """
    place = find_device(device)
    if not training.is_distributed():
        if replicate_dim not in (-1, 1) or shard_dim not in (-1, 1):
            raise UserError(
                "data_parallel_replicate_dim, data_parallel_shard_dim: this is a single process; "
                "start more with tune run --nproc_per_node"
            )
        try:
            yield World(0, 1, place, None)
        finally:
            if dist.is_initialized():  # by mesh_of_one
                dist.destroy_process_group()
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    shard, replicate = _dimensions(size, shard_dim, replicate_dim)
    dist.init_process_group(_backend(place), timeout=timedelta(minutes=timeout_minutes))
    end_groups_at_exit()
    try:
        if replicate > 1:
            mesh = init_device_mesh(
                place.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
            )
        else:
            mesh = init_device_mesh(place.type, (size,), mesh_dim_names=("dp_shard",))
        yield World(rank, size, place, mesh)
    except RuntimeError as error:  # gloo's and NCCL's errors are of this kind
        if re.search(r"gloo|nccl|connection|timed out", str(error), re.IGNORECASE):
            reason = str(error).strip().splitlines()[0][:200]
            print(
                f"error: rank {rank}: another rank has died, or has not come for "
                f"{timeout_minutes:g} minutes (timeout_minutes): {reason}",
                file=sys.stderr,
                flush=True,
            )
        raise
    finally:
        dist.destroy_process_group()


def _dimensions(size: int, shard: int, replicate: int) -> tuple[int, int]:
    """Ranks of a copy, and copies, of ``size`` ranks; −1 for what the other leaves."""
    if replicate == -1:
        if shard != -1 and (shard < 1 or size % shard):
            raise UserError(
                f"data_parallel_shard_dim: {size} ranks do not divide into groups of {shard}"
            )
        replicate = 1 if shard == -1 else size // shard
    if replicate < 1 or size % replicate:
        raise UserError(
            f"data_parallel_replicate_dim: {size} ranks do not divide into {replicate} copies"
        )
    shard = size // replicate if shard == -1 else shard
    if shard * replicate != size:
        raise UserError(
            f"data_parallel_shard_dim: {shard} × data_parallel_replicate_dim {replicate} is "
            f"not the number of ranks, {size}"
        )
    return shard, replicate


def _backend(device: torch.device) -> str:
    return training.get_distributed_backend(device.type, offload_ops_to_cpu=device.type != "cpu")


def mesh_of_one(device: torch.device) -> DeviceMesh:
    """A mesh of this process alone, for FSDP2's mixed precision where torchrun made no world."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
        end_groups_at_exit()
    return init_device_mesh(device.type, (1,), mesh_dim_names=("dp_shard",))


def end_groups_at_exit() -> None:
    """Have the process groups freed before Python ends; for who begins one."""
    atexit.unregister(_end_process_groups)
    atexit.register(_end_process_groups)


def _end_process_groups() -> None:
    """Free the groups that ``destroy_process_group`` has closed, and so end gloo's threads.

    Before Python 3.14, one that still lets go of a tensor while Python ends aborts the process
    ("terminate called without an active exception"), and torchrun calls the whole run failed.
    A group lives as long as its meshes, and DTensor's caches of shardings keep those.
    """
    if dist.is_initialized():
        return
    gc.collect()
    for mesh in [x for x in gc.get_objects() if type(x) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()
