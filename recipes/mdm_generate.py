"""Write text with a masked diffusion model.

    tune run mdm_generate --config quickstart_generate prompt="…"
    tune run mdm_generate --config my.yaml prompts=questions.jsonl output=answers.jsonl
    tune run mdm_generate --config my.yaml prompts=… replay=replay.html   # a page that plays it
    cat prompts.txt | tune run mdm_generate --config my.yaml prompts=-
    tune run --nproc_per_node 8 mdm_generate --config my.yaml prompts=… output=…
    tune run mdm_generate --config my.yaml prompts=questions.jsonl decoding.temperature=0.7 \\
        samples=8 verifier._component_=my.verifier pairs=pairs.jsonl   # preferences for mdm_dpo
    tune run --nproc_per_node 8 mdm_generate --config my.yaml prompts=… data_parallel_shard_dim=-1

On a terminal the text is shown while it is being unmasked. Each rank holds the model and takes
its share of the batches; a text's noise is a function of ``seed`` and its number alone. A model
that one device cannot hold is sharded over data_parallel_shard_dim ranks: the same texts, slower.

Every option with its default: ``GenerateOptions`` in ``mdm_plugin/config/options.py``.
"""

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from mdm_plugin.config.components import first_line, instantiate
from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import GenerateOptions
from mdm_plugin.data.preferences import paired
from mdm_plugin.data.prompts import Prompt, read_prompts
from mdm_plugin.distributed.uneven import uneven_forwards
from mdm_plugin.distributed.world import World, distributed
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.inference import load_model, read_decoding
from mdm_plugin.evaluation.sharing import share
from mdm_plugin.generation import Step, generate
from mdm_plugin.generation.live import LiveText
from mdm_plugin.generation.replay import Recorder, Replay, write_replays
from mdm_plugin.noise import seed_of


class MDMGenerate:
    """Set up, generate, write."""

    def __init__(self, cfg: DictConfig, world: World) -> None:
        self.cfg, self.world = cfg, world

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        self.decoding = read_decoding(cfg)
        self.tokenizer = instantiate(cfg, "tokenizer")
        self.output, self.replay = file_to_write(cfg, "output"), file_to_write(cfg, "replay")
        self.pairs = file_to_write(cfg, "pairs")
        named = [x for x in (self.output, self.replay, self.pairs) if x]
        if len(set(named)) < len(named):
            raise UserError("output, replay, pairs: two of them are one file: name another")
        self._check_samples()
        self.verify, self.failed = instantiate(cfg, "verifier"), 0  # answers it failed at
        self.prompts = read_prompts(
            self.tokenizer, cfg.prompt, cfg.prompts, cfg.system_prompt, cfg.chat
        )
        self.model, _ = load_model(cfg, world, self.tokenizer, self.decoding, self.prompts)

    def _check_samples(self) -> None:
        cfg = self.cfg
        if cfg.samples < 1:
            raise UserError(f"samples: {cfg.samples}: use 1 or more")
        if cfg.samples > 1 and not self.decoding.temperature:
            raise UserError(
                f"samples: {cfg.samples} of a prompt would all be the same: set "
                "decoding.temperature, to 0.7 for example"
            )
        if self.pairs and (cfg.verifier is None or cfg.samples < 2 or not cfg.chat):
            raise UserError(
                "pairs: a right and a wrong answer to a prompt: give a verifier, samples of 2 or "
                "more, and leave chat as it is"
            )

    def run(self) -> None:
        cfg, world = self.cfg, self.world
        self.texts = [x for x in self.prompts for _ in range(cfg.samples)]
        mine = share([len(x.ids) for x in self.texts], cfg.batch_size, world)
        written: dict[int, dict[str, Any]] = {}
        self.replays: dict[int, Replay] = {}  # by the prompts' numbers, as what is written
        forwards, start = 0, time.perf_counter()
        shown = sys.stderr.isatty() if cfg.live is None else cfg.live
        live = LiveText(self.tokenizer) if shown and world.rank == 0 else None
        quiet = world.rank != 0 or live is not None or len(mine) < 2
        with uneven_forwards(self.model, world):
            for batch in tqdm(mine, desc="Generating", unit="batch", disable=quiet):
                lines, used = self.generate(batch, live)
                forwards += used
                written.update(zip(batch, lines, strict=True))
        for others, replays in world.gather((written, self.replays)):
            written |= others
            self.replays |= replays
        forwards = int(world.sum(torch.tensor(forwards)))
        if world.rank != 0:
            return
        seconds = time.perf_counter() - start
        lines = [written[i] for i in range(len(self.texts))]
        with self.writer() as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.replay:
            write_replays(self.replay, [self.replays[i] for i in range(len(lines))])
        told = self.write_pairs(lines) if self.pairs else ""
        tokens = sum(line["tokens"] for line in lines)
        where = "".join(f"; {file}" for file in (self.output, self.replay) if file)
        count = f"{len(self.prompts)} prompts"
        if cfg.samples > 1:
            count += f" x {cfg.samples} samples"
        print(
            f"{count}, {tokens} tokens, {forwards} forwards, {seconds:.1f} s, "
            f"{tokens / seconds:.1f} tokens/s{where}{told}",
            file=sys.stderr,
        )

    def write_pairs(self, lines: list[dict[str, Any]]) -> str:
        """Each prompt's right answers beside its wrong ones; how many there are."""
        assert self.pairs is not None
        rows = []
        for i, prompt in enumerate(self.prompts):
            own = lines[i * self.cfg.samples : (i + 1) * self.cfg.samples]
            own = [x for x in own if x["right"] is not None]
            answers, right = [x["completion"] for x in own], [x["right"] for x in own]
            rows += paired(prompt.turns, answers, right)
        with self.pairs.open("w") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        share = sum(bool(x["right"]) for x in lines) / len(lines)
        return f"; {share:.1%} right, {len(rows)} preferences: {self.pairs}"

    def generate(self, batch: list[int], live: LiveText | None) -> tuple[list[dict[str, Any]], int]:
        """Lines of output for some prompts, by their numbers, and the forwards that they took."""
        cfg, prompts = self.cfg, [self.texts[i] for i in batch]
        recorder = Recorder() if self.replay else None

        def on_step(step: Step) -> None:
            if live:
                live.show(step.response)
            if recorder:
                recorder.add(step)

        result = generate(
            self.model,
            [prompt.ids for prompt in prompts],
            self.decoding,
            special=self.tokenizer,
            max_new_tokens=cfg.max_new_tokens,
            seeds=[self.seed_of(i) for i in batch],
            on_step=on_step if live or recorder else None,
        )
        if live:
            live.end()
        if recorder:
            found = recorder.replays(self.tokenizer, [prompt.text for prompt in prompts])
            self.replays.update(zip(batch, found, strict=True))
        lines = []
        for i, prompt, ids in zip(batch, prompts, result.tokens.tolist(), strict=True):
            count = ids.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in ids else len(ids)
            text = self.tokenizer.decode(ids)
            line = {**prompt.row, "completion": text, "tokens": count}
            if cfg.samples > 1:
                line["sample"] = i % cfg.samples
            if self.verify:
                line["right"] = self.verified(text, prompt)
            lines.append(line)
        return lines, result.forwards

    def seed_of(self, number: int) -> int:
        """Of a text: a prompt's first sample has ``seed`` + its number."""
        prompt, sample = divmod(number, self.cfg.samples)
        seed = int(self.cfg.seed) + prompt
        return seed_of(seed, "sample", sample) if sample else seed

    def verified(self, text: str, prompt: Prompt) -> bool | None:
        """Whether a text is right; None, and a line, where the verifier fails at it."""
        try:
            return bool(self.verify(text, prompt.row))
        except Exception as error:  # a user's own; what has been written is not lost for it
            if not self.failed:
                tqdm.write(f"{prompt.place}: verifier: {first_line(error)}", file=sys.stderr)
            self.failed += 1
            return None

    def writer(self) -> Any:
        if self.output is None:
            return nullcontext(sys.stdout)
        return self.output.open("w")


def file_to_write(cfg: DictConfig, key: str) -> Path | None:
    """The file that a key names, if any; its directory is made.

    Raises:
        UserError: if it is there already, or cannot be written: now, and not after the last text.
    """
    if not cfg[key]:
        return None
    file = Path(cfg[key]).expanduser()
    if file.exists() and not cfg.overwrite:
        raise UserError(f"{key}: {file} exists: name another, or set overwrite=True")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=file.parent):
            pass
        if file.exists():
            file.open("a").close()
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be written: {error.strerror}") from error
    return file


@parse(GenerateOptions)
def main(cfg: DictConfig) -> None:
    """Write text with a masked diffusion model."""
    with distributed(cfg.device, cfg.data_parallel_shard_dim, replicate_dim=-1) as world:
        recipe = MDMGenerate(cfg, world)
        recipe.setup()
        recipe.run()


if __name__ == "__main__":
    main()
