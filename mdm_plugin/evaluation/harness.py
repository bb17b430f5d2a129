"""EleutherAI's lm-evaluation-harness on a masked diffusion model.

    python -m mdm_plugin.evaluation.harness --model mdm --model_args config=my.yaml --tasks gsm8k

is ``lm_eval`` with the model ``mdm`` registered; ``tune run mdm_eval tasks=[gsm8k]`` uses it too.
Needs the package lm-eval, which is not among this one's requirements.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import EvalOptions
from mdm_plugin.data import Rows
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.evaluation.inference import load_model, read_decoding
from mdm_plugin.evaluation.nelbo import BoundEstimator
from mdm_plugin.generation import Decoding, TokenIds, generate
from mdm_plugin.models import ChatTokenizer, MDMTransformer

T = TypeVar("T")


@register_model("mdm")
class Harness(LM):
    """A masked diffusion model as the harness wants one.

    A log-likelihood is the bound of the continuation given the context (``bounds``), and a
    continuation is "greedy" if filling it in one token at a time, the surest first, gives it.

    Args:
        model: in eval mode, whole on every rank.
        tokenizer: its tokenizer.
        decoding: for generation.
        world: every rank takes its share of the requests.
        batch_size, draws, seed, max_new_tokens: as of ``EvalOptions``.
    """

    def __init__(
        self,
        model: MDMTransformer,
        tokenizer: ChatTokenizer,
        decoding: Decoding,
        world: World,
        *,
        batch_size: int,
        draws: int,
        seed: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.decoding, self.world = model, tokenizer, decoding, world
        self.batch_size, self.draws, self.seed = batch_size, draws, seed
        self.max_new_tokens = max_new_tokens
        self.limit = model.max_seq_len

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "Harness":
        """From ``--model_args config=NAME,key=value,…``: a config of mdm_eval, on one process.

        Device and batch size are the config's: the harness has defaults of its own, which cannot be
        told from what a user gave.
        """
        given = dict(arg_dict)
        if "config" not in given:
            raise UserError("model_args: give config=NAME, of mdm_eval")
        name = str(given.pop("config"))
        overrides = [f"{key}={value}" for key, value in given.items()]
        cfg = load_config(name, [*overrides, "output_dir=.", "tasks=[]"], EvalOptions)
        world = World(0, 1, torch.device(cfg.device), None)
        tokenizer = instantiate(cfg, "tokenizer")
        decoding = read_decoding(cfg)
        model, _ = load_model(cfg, world, tokenizer)
        return cls(
            model,
            tokenizer,
            decoding,
            world,
            batch_size=cfg.batch_size,
            draws=cfg.draws,
            seed=cfg.seed,
            max_new_tokens=cfg.max_new_tokens,
        )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "Harness":
        """As ``create_from_arg_obj``, from ``key=value,key=value``."""
        pairs = dict(item.split("=", 1) for item in arg_string.split(",") if item)
        return cls.create_from_arg_obj(pairs, additional_config)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(bound on log p(continuation | context) in nats, greedy) of each request."""
        return self._share([self._pair(*x.args) for x in requests], self._likelihoods)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Bound on log p(text) in nats, in windows as long as the model takes."""
        found = []
        for ids in [self.tokenizer.encode(x.args[0]) for x in requests]:
            windows = [ids[i : i + self.limit] for i in range(0, len(ids), self.limit)]
            nats = self._share([([], w) for w in windows], self._bounds)
            found.append(sum(nats))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The model's text after each context, up to the first stop string."""
        return self._share([x.args for x in requests], self._texts)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        return self.tokenizer.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return f"mdm-{self.tokenizer.vocab_size}"

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; a space between them belongs to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.tokenizer.encode(stripped)
        whole = self.tokenizer.encode(stripped + continuation)
        after = whole[len(before) :] if whole[: len(before)] == before else None
        after = after or self.tokenizer.encode(continuation)
        return before[max(0, len(before) + len(after) - self.limit) :], after[: self.limit]

    def _share(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[T]]) -> list[T]:
        """``work`` on this rank's items, and all ranks' results in the items' order."""
        mine = work(items[self.world.rank :: self.world.size])
        if self.world.size == 1:
            return mine
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        return [everyone[i % self.world.size][i // self.world.size] for i in range(len(items))]

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        if not pairs:
            return []
        rows = Rows((a + b, [False] * len(a) + [True] * len(b)) for a, b in pairs)
        estimator = BoundEstimator(
            self.tokenizer, self.world.alone(), self.batch_size, self.draws, self.seed
        )
        return (-estimator.bounds(self.model, rows, torch.arange(len(rows))).nats).tolist()

    def _likelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        greedy = []
        for context, continuation in pairs:
            start = context or [self.tokenizer.eos_id]
            room = self.limit - len(start)
            surest = generate(  # to the end: a continuation may go on after an EOS
                self.model,
                [start],
                special=TokenIds(self.tokenizer.mask_id, self.tokenizer.pad_id),
                max_new_tokens=min(len(continuation), room),
            )
            greedy.append(surest.tokens[0].tolist() == continuation)
        return list(zip(self._bounds(pairs), greedy, strict=True))

    def _texts(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        found = []
        for context, settings in requests:
            length = min(int(settings.get("max_gen_toks", self.max_new_tokens)), self.limit - 1)
            block = self.decoding.block_length or 1
            length = max(block, length // block * block)
            ids = self.tokenizer.encode(context)[-(self.limit - length) :]
            written = generate(
                self.model,
                [ids],
                self.decoding,
                special=self.tokenizer,
                max_new_tokens=length,
                seeds=[self.seed],
            )
            text = self.tokenizer.decode(written.tokens[0].tolist())
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0]
            found.append(text)
        return found


def main() -> None:
    """lm_eval's own command line, with ``mdm`` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
