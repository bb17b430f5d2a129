"""The study's runs: each is a fine-tuning by the recipe and an evaluation, kept as one small JSON.

Processes come from a fork server that has imported the recipes, each with one thread.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from benchmarks.study.methods import (
    CAUSAL,
    CAUSES,
    METHODS,
    MOMENTA,
    SEEDS,
    STEPS,
    TUNED_ON,
    TUNING_SEEDS,
    find,
    overrides,
    rates,
)
from benchmarks.study.tasks import LONGEST
from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.contract import Estimator
from mdm_plugin.data import GlobalBatches, Padding, Split, chat_dataset
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import NextToken
from mdm_plugin.timesteps import Uniform
from mdm_plugin.training.batches import global_batches
from mdm_plugin.training.corruption import corrupted_step
from mdm_plugin.training.estimators import read_estimator
from mdm_plugin.training.step import backward, forward_loss, global_normalizer

HERE = Path(__file__).parent
CONFIGS = HERE / "configs"
PRETRAINED: dict[str, list[str]] = {"pretrained": [], "autoregressive": [*CAUSAL]}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["benchmarks.study.runs", "mdm_full_finetune", "mdm_eval", "mdm_variance"]
)


class Run(NamedTuple):
    """A fine-tuning and its evaluation.

    split: "val" to tune the learning rate, "test" for the study itself.
    """

    task: str
    method: str
    seed: int
    rate: str
    split: str = "test"

    def file(self, results: Path) -> Path:
        """Where its result is kept."""
        if self.split == "val":
            return results / "tuning" / self.task / f"{self.method}_{self.rate}_{self.seed}.json"
        return folder(results, self.task, self.method) / f"{self.seed}.json"


def folder(results: Path, task: str, method: str) -> Path:
    """Where a method's runs on the test rows are kept, one file for each seed."""
    return results / ("causes" if method in CAUSES else "runs") / task / method


def missing(runs: list[Run], results: Path) -> list[Run]:
    """Those without a result, or with one of another learning rate."""
    return [run for run in runs if (read(run.file(results)) or {}).get("rate") != run.rate]


def tuning(tasks: Iterable[str], methods: Iterable[str]) -> list[Run]:
    """The runs that the learning rates are chosen by."""
    families = dict.fromkeys(METHODS[m].family for m in methods)
    return [
        Run(task, TUNED_ON[family], seed, rate, "val")
        for seed in TUNING_SEEDS
        for task in tasks
        for family in families
        for rate in rates(family)
    ]


def validated(results: Path, task: str, method: str, rate: str) -> list[float]:
    """The right answers on validation rows, in percent, of each tuning seed that is stored."""
    runs = [Run(task, method, seed, rate, "val") for seed in TUNING_SEEDS]
    return [100 * x["accuracy"] for run in runs if (x := read(run.file(results)))]


def best_rate(results: Path, task: str, family: str) -> str:
    """That of the highest mean accuracy over the tuning seeds; of equal ones the lower rate."""
    method = TUNED_ON[family]
    return max(rates(family), key=lambda rate: sum(validated(results, task, method, rate)))


def tried(results: Path, tasks: Iterable[str], methods: Iterable[str]) -> list[Run]:
    """The runs that momenta are chosen by, each at the rate of the family that was chosen."""
    return [
        Run(task, name, seed, best_rate(results, task, METHODS[chosen].family), "val")
        for chosen, momenta in MOMENTA.items()
        if chosen in methods
        for name in momenta.values()
        for seed in TUNING_SEEDS
        for task in tasks
    ]


def final(results: Path, tasks: Iterable[str], methods: Iterable[str], seeds: int) -> list[Run]:
    """The runs of the study, the first seed of every method first."""
    return [
        Run(task, method, seed, best_rate(results, task, METHODS[method].family))
        for seed in SEEDS[:seeds]
        for method in methods
        for task in tasks
    ]


def causes(results: Path, tasks: Iterable[str], methods: Iterable[str], seeds: int) -> list[Run]:
    """The runs with one thing changed, the first seed of each first."""
    return [
        Run(task, name, seed, cause.rate or best_rate(results, task, cause.method.family))
        for seed in SEEDS[:seeds]
        for name, cause in CAUSES.items()
        if cause.like in methods
        for task in cause.tasks
        if task in tasks
    ]


def read(file: Path) -> dict[str, Any] | None:
    """A stored result, if there is one."""
    return json.loads(file.read_text()) if file.is_file() else None


def execute(run: Run, home: Path, results: Path, stored: str | None = None) -> None:
    """Fine-tune, evaluate, keep the result; called in a process of its own.

    stored: the config to fine-tune by, from an earlier result; None for the method's.
    """
    start = time.time()
    causal = "model.causal=True" in find(run.method).overrides
    work = home / "runs" / "_".join(map(str, run)).replace(" ", "_")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with _output_to(work / "log.txt"):
        name = "autoregressive" if causal else "pretrained"
        given = [
            *(f"home={home}", f"task={run.task}", f"output_dir={work}"),
            *overrides(run.method, run.task),
            f"seed={run.seed}",
            f"optimizer.lr={run.rate}",
            f"checkpointer.checkpoint_dir={home / name}",
        ]
        file = CONFIGS / "finetune.yaml"
        if stored is not None:
            file, given = work / "stored.yaml", []
            file.write_text(stored.replace("OUTPUT", str(work)).replace("HOME", str(home)))
        _recipe("mdm_full_finetune", file, given)
        trained = time.time() - start
        (checkpoint,) = work.glob("step_*")
        weights = checkpoint / "ema" if (checkpoint / "ema").is_dir() else checkpoint
        asked = [
            *(f"home={home}", f"task={run.task}", f"output_dir={work / 'eval'}"),
            *(f"checkpoint={weights}", f"split={run.split}"),
            f"max_new_tokens={LONGEST[run.task]}",
        ]
        if causal:  # left to right; its likelihood is no bound
            asked += ["model.causal=True", "decoding.block_length=1"]
            asked += ["tasks=[exact_match]", "dataset=null"]
        _recipe("mdm_eval", CONFIGS / "evaluate.yaml", asked)
        answers = sorted(
            (json.loads(x) for x in (work / "eval" / "exact_match.0.jsonl").open()),
            key=lambda x: x["index"],
        )
        parallel = {} if causal or run.split == "val" else in_fewer_forwards(asked, work, run.task)
        measured = json.loads((work / "eval" / "results.json").read_text())["tasks"]
        config = load_config(str(file), given, Options)
        rows = home / run.task / f"{run.split}.jsonl"
        nats = autoregressive_nats(config, weights, rows) if causal else None
        found = {
            **run._asdict(),
            "accuracy": measured["exact_match"]["accuracy"],
            "correct": "".join(str(int(x["correct"])) for x in answers),
            "nats_per_token": measured["nelbo"]["nats_per_token"] if nats is None else nats,
            **({"parallel": parallel} if parallel else {}),
            **gradient_noise(config, checkpoint),
            "curves": curves(work / "tensorboard"),
            "config": _config(checkpoint, home, work),
            "pretrained_sha256": digest(home / name / "model.safetensors"),
            "revision": _revision(),
            "train_seconds": round(trained, 1),
            "seconds": round(time.time() - start, 1),
        }
    file = run.file(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.rename(file)
    shutil.rmtree(work)


def in_fewer_forwards(asked: list[str], work: Path, task: str) -> dict[str, float]:
    """The share of right answers by ways to write more than a token in a forward.

    asked: what evaluate.yaml was given to write one a forward.
    """
    ways = {
        "two": (f"decoding.steps={(LONGEST[task] + 1) // 2}",),
        "threshold": ("sampler._component_=mdm_plugin.generation.Threshold",),  # of 0.9
        "stable": ("sampler._component_=mdm_plugin.generation.Stable", "~sampler.order"),
    }
    found = {}
    for name, way in ways.items():
        more = [*way, "tasks=[exact_match]", "dataset=null", f"output_dir={work / name}"]
        _recipe("mdm_eval", CONFIGS / "evaluate.yaml", asked + more)
        results = json.loads((work / name / "results.json").read_text())["tasks"]
        found[name] = results["exact_match"]["accuracy"]
    return found


def variance(task: str, rate: str, home: Path, results: Path) -> None:
    """The variance of each method's gradient, of equal rows, on a model that Standard has trained
    for half of its steps with a tuning seed."""
    work = home / "runs" / f"variance_{task}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with _output_to(work / "log.txt"):
        given = [f"home={home}", f"task={task}", f"output_dir={work}"]
        given += [*overrides("standard", task), f"seed={TUNING_SEEDS[0]}", f"optimizer.lr={rate}"]
        given += [f"save_every_n_steps={STEPS[task] // 2}", "run_val_every_n_steps=null"]
        given += ["keep_last_n=2"]
        _recipe("mdm_full_finetune", CONFIGS / "finetune.yaml", given)
        asked = [f"home={home}", f"task={task}", f"output_dir={work / 'variance'}"]
        asked += [f"checkpoint={work / f'step_{STEPS[task] // 2}'}"]
        _recipe("mdm_variance", CONFIGS / "variance.yaml", asked)
        found = json.loads((work / "variance" / "variance.json").read_text())
    kept = {x["name"]: x["gradient_ratio"]["equal_rows"] for x in found["estimators"]}
    file = results / "variance" / f"{task}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rate": rate, "equal_rows": kept}, indent=1) + "\n")
    shutil.rmtree(work)


def pretrain(name: str, home: Path) -> None:
    """``name``/model.safetensors in ``home``, by configs/pretrain.yaml."""
    work = home / f"{name}_run"
    home.mkdir(exist_ok=True)
    with _output_to(home / f"{name}.log"):
        given = [f"home={home}", f"output_dir={work}", *PRETRAINED[name]]
        _recipe("mdm_full_finetune", CONFIGS / "pretrain.yaml", given)
        (weights,) = work.glob("step_*/model.safetensors")
        (home / name).mkdir(exist_ok=True)
        weights.rename(home / name / "model.safetensors")
    shutil.rmtree(work)


def autoregressive_nats(config: DictConfig, checkpoint: Path, source: Path) -> float:
    """Nats per token of the answers in ``source``, exact: a causal model has a likelihood."""
    tokenizer, model = instantiate(config, "tokenizer"), instantiate(config, "model")
    Weights(checkpoint).load(model)
    rows = chat_dataset(tokenizer, source=str(source))
    batches = GlobalBatches(
        rows, Split(len(rows)), Padding(tokenizer.pad_id), seed=0, shuffle=False
    )
    loss = MDMLoss(normalize="tokens")
    estimator = Estimator(Uniform(), NextToken(), loss, tokenizer.mask_id)
    (batch,) = corrupted_step(batches, 0, estimator)
    with torch.no_grad():
        total, _ = forward_loss(model.eval(), loss, batch)
    return float(total / batch.normalizer)


def gradient_noise(config: DictConfig, checkpoint: Path, batches: int = 32) -> dict[str, Any]:
    """tr(Σ), the variance of a batch's gradient at a checkpoint, and tr(Σ) / |G|², how many batches
    it takes until the noise of their mean equals the gradient (McCandlish et al. 2018).

    From fresh batches of the run's own method, by the unbiased estimators of both; the second is
    None where |G|² is not seen above its own noise.
    """
    world = World(0, 1, torch.device("cpu"), None)
    tokenizer, model = instantiate(config, "tokenizer"), instantiate(config, "model")
    Weights(checkpoint).load(model)
    rows = instantiate(config, "dataset", tokenizer)
    estimator = read_estimator(config, tokenizer.mask_id)
    state = Checkpointer.load_state(checkpoint)
    estimator.timesteps.load_state_dict(state["parts"]["timesteps"]["state"])
    own = global_batches(config, rows, tokenizer, world, 1)
    found = []
    for step in range(state["step"], state["step"] + batches):
        (batch,) = corrupted_step(own, step, estimator)
        backward(model, estimator.loss, batch, global_normalizer([batch], world), world)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    gradients = torch.stack(found).double()
    variance = float(gradients.var(0).sum())
    signal = float(gradients.mean(0).square().sum()) - variance / batches
    return {
        "gradient_variance": float(f"{variance:.5g}"),
        "gradient_noise_scale": float(f"{variance / signal:.4g}") if signal > 0 else None,
    }


def curves(directory: Path) -> dict[str, list[list[float]]]:
    """[[step, value], …] of some of a run's TensorBoard scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    wanted = {"train/loss": 3, "train/grad_norm": 3, "val/nelbo_nats_per_token": 1}
    found = {}
    for tag in events.Tags()["tensors"]:
        if tag in wanted:
            points = events.Tensors(tag)[wanted[tag] - 1 :: wanted[tag]]
            found[tag] = [
                [x.step, float(f"{float(make_ndarray(x.tensor_proto)):.5g}")] for x in points
            ]
    return found


def in_parallel(
    jobs: list[tuple[Callable[..., None], tuple[Any, ...]]], workers: int, title: str
) -> None:
    """Call each job in a process of its own, ``workers`` at a time; the first failure is raised at
    the end, when the others have been done."""
    failed: list[BaseException] = []
    with ProcessPoolExecutor(workers, mp_context=_context, max_tasks_per_child=1) as pool:
        pending = [pool.submit(function, *given) for function, given in jobs]
        for done in tqdm(as_completed(pending), total=len(jobs), desc=title, unit="run"):
            if error := done.exception():
                failed.append(error)
                tqdm.write(f"failed: {error}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} failed: see the logs")


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _recipe(name: str, config: Path, given: list[str]) -> None:
    """Run a recipe's own main, as ``tune run`` does."""
    torch.set_num_threads(1)
    allowed = "allow_components=[benchmarks.study]"
    sys.argv = [name, "--config", str(config), allowed, *given]
    try:
        __import__(name).main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{name} ended with {end.code}: {config} {given}") from end


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """What this process prints goes to ``file``."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    yield
    sys.stdout.flush()


def _config(checkpoint: Path, home: Path, work: Path) -> str:
    """The resolved config that the checkpoint holds, without this machine's paths."""
    text = (checkpoint / "config.yaml").read_text()
    return text.replace(str(work), "OUTPUT").replace(str(home), "HOME")


def _revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return done.stdout.strip()
