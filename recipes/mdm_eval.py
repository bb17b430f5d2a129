"""How good is a masked diffusion model? Likelihood bound, right answers, with 95 % intervals.

    tune run mdm_eval --config quickstart_eval
    tune run --nproc_per_node 8 mdm_eval --config my.yaml tasks=[nelbo,exact_match]
    tune run mdm_eval --config my.yaml tasks=[reasoning_gym/chain_sum] reasoning_gym.size=200
    tune run mdm_eval --config my.yaml tasks=[gsm8k] lm_eval.num_fewshot=4  # needs lm-eval
    tune run --nproc_per_node 8 mdm_eval --config my.yaml data_parallel_shard_dim=-1
    python -m mdm_plugin.evaluation.compare before/ after/ --figure difference.png

Each row's result is written as it comes: the same command after a kill goes on where it was. Each
rank holds the model and takes its share of the rows; the figures do not depend on how many. A model
that one device cannot hold is sharded over data_parallel_shard_dim ranks: the same figures, slower.

Every option with its default: ``EvalOptions`` in ``mdm_plugin/config/options.py``.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import EvalOptions
from mdm_plugin.config.secrets import redacted
from mdm_plugin.data import Rows
from mdm_plugin.data.prompts import Prompt, read_prompts
from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World, distributed
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.exact_match import Questions, wilson
from mdm_plugin.evaluation.harness_tasks import check_harness_task, run_harness_task
from mdm_plugin.evaluation.inference import load_model, read_decoding
from mdm_plugin.evaluation.nelbo import Bound, BoundEstimator, summary
from mdm_plugin.evaluation.reasoning import reasoning_gym_task
from mdm_plugin.evaluation.results import Parts
from mdm_plugin.evaluation.sharing import share
from mdm_plugin.generation import generate


class MDMEval:
    """Set up, evaluate each task, report."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.output_dir = Path(cfg.output_dir).expanduser()

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        self.decoding = read_decoding(cfg)
        if cfg.draws < 2:
            raise UserError(f"draws: {cfg.draws}: use 2 or more: one gives no interval")
        self.tokenizer = instantiate(cfg, "tokenizer")
        self.rows: Rows | None = None
        self.questions: dict[str, Questions] = {}
        for task in cfg.tasks:
            self.read(task)
        prompts = [prompt for x in self.questions.values() for prompt in x.prompts]
        self.model, files = load_model(
            cfg, world, self.tokenizer, self.decoding, prompts, self.rows, purpose="evaluate"
        )
        # Each rank has rows of its own.
        self.estimator = BoundEstimator(
            self.tokenizer, world.alone(), cfg.batch_size, cfg.draws, cfg.seed
        )
        self.identity = {
            "checkpoint": str(files[0].parent),
            "checkpoint_sha256": _digest(files),
            "config": OmegaConf.to_container(redacted(cfg)),
        }
        self.begin()

    def read(self, task: str) -> None:
        """The data of a task."""
        cfg = self.cfg
        if task == "nelbo":
            if cfg.dataset is None:
                raise UserError("tasks: nelbo needs dataset")
            self.rows = instantiate(cfg, "dataset", self.tokenizer)
        elif task == "exact_match":
            if cfg.rows is None or cfg.verifier is None:
                raise UserError("tasks: exact_match needs rows, a file, and verifier")
            verify = instantiate(cfg, "verifier")
            prompts = read_prompts(self.tokenizer, prompts=cfg.rows)
            self.questions[task] = Questions(prompts, verify)
        elif task.startswith("reasoning_gym/"):
            rows, verify = reasoning_gym_task(task.partition("/")[2], dict(cfg.reasoning_gym or {}))
            prompts = [
                Prompt(f"{task}[{i}]", row, self.tokenizer.prompt(row["messages"]))
                for i, row in enumerate(rows)
            ]
            self.questions[task] = Questions(prompts, verify)
        else:
            check_harness_task(task, self.harness_settings())

    def harness_settings(self) -> dict[str, Any]:
        return dict(self.cfg.lm_eval or {})

    def begin(self) -> None:
        """Open the directory of results; one of another evaluation is not mixed with this one."""
        file = self.output_dir / "evaluation.json"
        if self.world.rank == 0:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_text(json.dumps(self.identity, indent=1))
        self.barrier()
        if json.loads(file.read_text()) != json.loads(json.dumps(self.identity)):
            raise UserError(
                f"output_dir: {self.output_dir} holds results of another config or checkpoint: "
                "name another directory, or remove it"
            )

    def run(self) -> None:
        start, results = time.perf_counter(), {}
        for task in self.cfg.tasks:
            if task == "nelbo":
                results[task] = _likelihood(self.records(task))
            elif task in self.questions:
                results[task] = _accuracy(self.records(task))
            else:
                results[task] = self.harness(task)
        if self.world.rank == 0:
            seconds = round(time.perf_counter() - start, 1)
            out = {**self.identity, "tasks": results, "seconds": seconds}
            (self.output_dir / "results.json").write_text(json.dumps(out, indent=1))
            for task, figures in results.items():
                for name, value in figures.items():
                    print(f"{task:24} {name:42} {value:.6g}")
            print(f"Written to {self.output_dir / 'results.json'}")

    def records(self, task: str) -> list[dict[str, Any]]:
        """The records of a task's rows, in their order: those that are not there yet are made."""
        if task == "nelbo":
            assert self.rows is not None
            lengths = self.rows.lengths_of(torch.arange(len(self.rows))).tolist()
            evaluate, size = self.likelihood, max(1, self.cfg.batch_size // 4)
        else:
            lengths = [len(prompt.ids) for prompt in self.questions[task].prompts]
            evaluate, size = self.answers, self.cfg.batch_size
        parts = Parts(self.output_dir, task, self.world.rank)
        done = parts.read()
        pending = [i for i in range(len(lengths)) if i not in done]
        self.barrier()  # all ranks have read before any writes
        batches = share([lengths[i] for i in pending], size, self.world)
        with uneven_forwards(self.model, self.world):
            for batch in tqdm(batches, desc=task, unit="batch", disable=self.world.rank != 0):
                parts.write(evaluate(task, [pending[i] for i in batch]))
        self.barrier()
        return [x for _, x in sorted(parts.read().items())]

    def likelihood(self, task: str, batch: list[int]) -> Iterator[dict[str, Any]]:
        """A record for each row: its bound, nats, and the variance of that."""
        assert self.rows is not None
        indices = torch.tensor(batch)
        values = self.estimator.bounds(self.model, self.rows, indices)
        tokens = self.rows.eligible_of(indices).tolist()
        nats, variances = values.nats.tolist(), values.variance.tolist()
        for i, bound, variance, count in zip(batch, nats, variances, tokens, strict=True):
            yield {"index": i, "nats": bound, "variance": variance, "tokens": count}

    def answers(self, task: str, batch: list[int]) -> Iterator[dict[str, Any]]:
        """A record for each prompt: the completion, and whether it is right."""
        prompts, verify = self.questions[task]
        written = generate(
            self.model,
            [prompts[i].ids for i in batch],
            self.decoding,
            special=self.tokenizer,
            max_new_tokens=self.cfg.max_new_tokens,
            seeds=[self.cfg.seed + i for i in batch],
        )
        for i, ids in zip(batch, written.tokens.tolist(), strict=True):
            text = self.tokenizer.decode(ids)
            yield {"index": i, "completion": text, "correct": bool(verify(text, prompts[i].row))}

    def harness(self, task: str) -> dict[str, float]:
        """The figures of one of lm-evaluation-harness's tasks, kept for a run that goes on."""
        file = self.output_dir / f"{task}.lm_eval.json"
        self.barrier()
        if not file.exists():
            from mdm_plugin.evaluation.harness import Harness  # lm-eval may not be there

            cfg = self.cfg
            model = Harness(
                self.model,
                self.tokenizer,
                self.decoding,
                self.world,
                batch_size=cfg.batch_size,
                draws=cfg.draws,
                seed=cfg.seed,
                max_new_tokens=cfg.max_new_tokens,
            )
            figures = run_harness_task(task, self.harness_settings(), model)
            self.barrier()  # all have seen that it was not there
            if self.world.rank == 0:
                file.write_text(json.dumps(figures, indent=1))
            self.barrier()
        return json.loads(file.read_text())

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()


def _likelihood(records: list[dict[str, Any]]) -> dict[str, float]:
    nats, variance = (
        torch.tensor([x[key] for x in records], dtype=torch.float64) for key in ("nats", "variance")
    )
    return summary(Bound(nats, variance), torch.tensor([x["tokens"] for x in records])).report()


def _accuracy(records: list[dict[str, Any]]) -> dict[str, float]:
    right = sum(x["correct"] for x in records)
    low, high = wilson(right, len(records))
    return {"accuracy": right / len(records), "low": low, "high": high, "rows": len(records)}


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


@parse(EvalOptions)
def main(cfg: DictConfig) -> None:
    """Evaluate a masked diffusion model."""
    with distributed(cfg.device, cfg.data_parallel_shard_dim, replicate_dim=-1) as world:
        recipe = MDMEval(cfg, world)
        recipe.setup()
        recipe.run()


if __name__ == "__main__":
    main()
