"""Several runs of torchtitan in one process each rank: python -m tests.titan.runs SPEC.json.

SPEC.json: [{"module", "config", "arguments", "lr", "out"}, …]. Rank r writes out/rank_r.json: the
loss and the gradient's norm of each step, what was logged besides, or the error that it ended with.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch.distributed as dist

# At the end torchtitan's first rank sleeps for 2 seconds, until the others have ended.
WITHOUT_SLEEP = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


def train(run: dict) -> dict:
    module = importlib.import_module(run.get("module", "mdm_plugin.titan.llada"))
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import ConfigManager

    steps, logged, printed = [], {}, io.StringIO()
    try:
        arguments = ["--module", module.__name__, "--config", run["config"], *run["arguments"]]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            config = ConfigManager().parse_args([*arguments, "--dump_folder", run["out"]])
        if run.get("lr") is not None:
            config.optimizer = default_adamw(lr=run["lr"])
        if run.get("float8"):
            from torchtitan.components.quantization import Float8LinearConverter

            emulated = Float8LinearConverter.Config(emulate=True, filter_fqns=["lm_head"])
            config.model_spec = module.model_registry("debugmodel", [emulated])
        trainer = config.build()
        processor = trainer.metrics_processor
        log, more = processor.log, processor.logger.log
        processor.log = lambda step, loss, most, norm, **kw: (
            steps.append((loss, norm)),
            log(step, loss, most, norm, **kw),
        )
        processor.logger.log = lambda figures, step: (
            [logged.setdefault(k, []).append(v) for k, v in figures.items()],
            more(figures, step),
        )
        with patch("torchtitan.trainer.time", WITHOUT_SLEEP):
            trainer.train()
        dist.barrier()
        trainer.close()
    except (Exception, SystemExit) as error:
        return {"error": f"{error} {printed.getvalue()}"}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    mine = {k: v for k, v in logged.items() if k.startswith(("train/", "val/"))}
    return {"steps": steps, "logged": mine}


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        # A store of its own for each.
        os.environ["MASTER_PORT"] = str(run["port"])
        out = Path(run["out"])
        out.mkdir(parents=True, exist_ok=True)
        name = run.get("name", "rank")
        (out / f"{name}_{os.environ['RANK']}.json").write_text(json.dumps(train(run)))
