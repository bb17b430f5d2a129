"""Runs of a recipe in processes of their own, with faults at chosen places.

A fault harness: what a run does is counted as events (a step, and each write, sync, rename and
removal of saving; of reinforcement also each step of writing answers, and what an update consists
of), and a fault happens at the event of a given number. Processes come from a fork server that has
already imported the recipes, so that twenty runs take seconds each.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.forks import context, free_port, torchruns

TINY = Path(__file__).parents[1] / "tiny.yaml"


class Fault(NamedTuple):
    """What happens to one rank.

    kind: "kill": SIGKILL at event ``at``. After ``at`` steps: "term", SIGTERM; "full", no file can
        grow beyond 64 KiB any more; "hang", sleep; "nan", the next gradient is not a number.
    """

    kind: str
    at: int
    rank: int = 0


def arguments(data_dir, output_dir, *more, recipe="mdm_full_finetune") -> list[str]:
    """A command line: the recipe and its arguments."""
    return [
        *(recipe, "--config", str(TINY), f"data_dir={data_dir}", f"output_dir={output_dir}"),
        *("save_every_n_steps=4", "keep_last_n=3", *more),
    ]


def run(given, ranks=1, fault=None, log=None, **more):
    """Exit codes of all ranks (negative: by a signal), and rank 0's events: "step" or "save"; of
    mdm_grpo "rollout" and "update" too.

    ``more`` goes into the environment; ``log``.RANK gets what a rank prints.
    """
    port = free_port()
    queue = context.SimpleQueue()
    children = [
        context.Process(target=_rank, args=(given, rank, ranks, port, fault, log, queue, more))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    if fault and fault.kind in ("kill", "hang") and ranks > 1:
        children[fault.rank if fault.kind == "kill" else 1 - fault.rank].join(240)
        for child in children:
            child.join(20 if fault.kind == "kill" else 1)  # torchrun ends all when one has ended
            if child.is_alive():
                child.kill()
    for child in children:
        child.join(240)
        if child.is_alive():
            child.kill()
            raise AssertionError("a run hangs")
    events = queue.get() if not queue.empty() else []
    return [child.exitcode for child in children], events


def _rank(given, rank, ranks, port, fault, log, queue, more):
    os.environ.update(more)
    if log is not None:
        out = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
    if ranks > 1:
        os.environ.update(torchruns(rank, ranks, port))
    import torch

    torch.set_num_threads(1)
    sys.argv = given
    recipe = importlib.import_module(given[0])
    here = fault if fault and fault.rank == rank else None
    inject(here, queue if rank == 0 else None, recipe=recipe)
    recipe.main()


def inject(fault: Fault | None, queue=None, recipe=None) -> None:
    """Count events of a recipe (None: mdm_full_finetune), and have the fault happen at its own."""
    import shutil

    import torch
    from torch.distributed.checkpoint import filesystem

    from mdm_plugin.checkpoint import files
    from mdm_plugin.generation.masked import MaskedRows

    recipe = recipe or importlib.import_module("mdm_full_finetune")
    events: list[str] = []

    def event(kind: str) -> None:
        events.append(kind)
        if fault is None:
            return
        reached = len(events) if fault.kind == "kill" else events.count("step")
        if reached != fault.at or (fault.kind != "kill" and kind != "step"):
            return
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "hang":
            time.sleep(1000)
        elif fault.kind == "full":
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))

    def counted(owner, name: str, kind: str, after: bool = False) -> None:
        function = getattr(owner, name)

        def call(*given, **named):
            if not after:
                event(kind)
            result = function(*given, **named)
            if after:
                event(kind)
            return result

        setattr(owner, name, call)

    if recipe.__name__ == "mdm_grpo":
        kind = recipe.MDMReinforcement
        counted(MaskedRows, "put", "rollout", after=True)
        counted(recipe, "add_gradient", "update", after=True)  # before the optimizer's step
        counted(kind, "policy_step", "update", after=True)
    else:
        kind = recipe.MDMFinetune
    counted(kind, "train_step", "step", after=True)
    counted(files, "save_file", "save", after=True)
    counted(filesystem, "_write_item", "save", after=True)
    for owner, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
        counted(owner, name, "save")

    if fault and fault.kind == "nan":
        backward = recipe.backward

        def broken(model, *rest):
            result = backward(model, *rest)
            if events.count("step") == fault.at:
                p = next(p for p in model.parameters() if p.grad is not None)
                p.grad.fill_(torch.nan)
            return result

        recipe.backward = broken
    if queue is not None:
        main = recipe.run

        def reported(*given, **named):
            try:
                main(*given, **named)
            finally:
                queue.put(events)

        recipe.run = reported
