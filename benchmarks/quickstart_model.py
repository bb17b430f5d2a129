"""The quickstart's rows, tokenizer and models, for the benchmarks that measure on them."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdm_plugin.checkpoint.checkpointer import Checkpointer
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.data import Rows, chat_dataset
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import World
from mdm_plugin.models import ChatTokenizer, MDMTransformer

WORLD = World(0, 1, torch.device("cpu"), None)


class Quickstart:
    """What `make demo` has made.

    home: its data and tokenizer. pretrained: weights. run: its fine-tuning's checkpoints.
    """

    def __init__(self) -> None:
        self.config = load_config("quickstart", [], Options)
        self.home, self.run = Path(self.config.tokenizer.path), Path(self.config.output_dir)
        self.pretrained = self.home / "pretrained"
        self.tokenizer = ChatTokenizer(str(self.home))

    def rows(self, split: str) -> Rows:
        """split: train, val or test."""
        return chat_dataset(self.tokenizer, source=str(self.home / f"{split}.jsonl"))

    def model(self, weights: Path) -> MDMTransformer:
        """The model with the weights of a directory, in eval mode."""
        model = build_model(lambda: instantiate(self.config, "model"), WORLD, torch.float32)
        Weights(weights).load(model)
        return model.eval()


def last_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run."""
    return Checkpointer(str(run)).steps()[-1]


def right_answers(run: Path) -> list[float]:
    """The share of right answers at each of a run's validations, in their order."""
    place = next((run / "tensorboard").rglob("events.*")).parent
    events = EventAccumulator(str(place), size_guidance={"tensors": 0})  # all of them
    events.Reload()
    found = {x.step: x.tensor_proto.float_val[0] for x in events.Tensors("val/exact_match")}
    return [found[step] for step in sorted(found)]
