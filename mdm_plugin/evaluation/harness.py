"""EleutherAI's lm-evaluation-harness on a masked diffusion model.

    python -m mdm_plugin.evaluation.harness --model mdm --model_args config=my.yaml --tasks gsm8k

is ``lm_eval`` with the model ``mdm`` registered; ``tune run mdm_eval tasks=[gsm8k]`` uses it too.
Needs the package lm-eval, which is not among this one's requirements.
"""

from hashlib import blake2b
from typing import Any, NamedTuple

import torch
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
from mdm_plugin.evaluation.sharing import Request, complete, in_shares, share
from mdm_plugin.generation import Decoding, check_lengths, is_greedy
from mdm_plugin.models import ChatTokenizer, MDMTransformer


class Pair(NamedTuple):
    """Token ids of a context and of what follows it, and the place of the noise of its bound."""

    context: list[int]
    continuation: list[int]
    place: int

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


@register_model("mdm")
class Harness(LM):
    """A masked diffusion model as the harness wants one.

    A log-likelihood is the bound of the continuation given the context (``bounds``). Those of one
    document, such as the choices of a question, share their draws of masks, so that what these add
    to all of them cancels in the differences. A continuation is "greedy" if filling it in one token
    at a time, the surest first, gives it (``is_greedy``).

    A request's result depends on its text, its document and the seed alone: not on the requests
    that are in its batch, nor on the ranks.

    Args:
        model: in eval mode; it may be sharded.
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
        if cfg.data_parallel_shard_dim not in (-1, 1):
            raise UserError(
                f"data_parallel_shard_dim: {cfg.data_parallel_shard_dim}: lm_eval's command is one "
                "process: use mdm_eval"
            )
        world = World(0, 1, torch.device(cfg.device), None)
        tokenizer = instantiate(cfg, "tokenizer")
        decoding = read_decoding(cfg)
        model, _ = load_model(cfg, world, tokenizer, decoding)
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
        pairs = [self.pair(x) for x in requests]
        return list(zip(self.bounds(pairs), self.greedy(pairs), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Bound on log p(text) in nats, in windows as long as the model takes."""
        windows, of = [], []
        for number, x in enumerate(requests):
            ids = self._encode(x.args[0])
            for start in range(0, len(ids), self.limit):
                windows.append(Pair([], ids[start : start + self.limit], _place(x, start)))
                of.append(number)
        found = [0.0] * len(requests)
        for number, nats in zip(of, self.bounds(windows), strict=True):
            found[number] += nats
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The model's text after each context, up to the first stop string."""
        asked = [self._request(*x.args) for x in requests]
        written = complete(
            self.model,
            self.tokenizer,
            asked,
            self.decoding,
            self.world,
            self.batch_size,
            progress="generate_until",
        )
        found = []
        for x, ids in zip(requests, written, strict=True):
            text, until = self.tokenizer.decode(ids), x.args[1].get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0]
            found.append(text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template."""
        return self.tokenizer.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return f"mdm-{self.tokenizer.vocab_size}"

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if self.tokenizer.mask_id in ids:
            raise UserError(f"tasks: a text holds the mask token itself: {text[:60]!r}")
        return ids

    def pair(self, request: Instance) -> Pair:
        """Tokens of a request's two texts; a space between them belongs to the continuation."""
        context, continuation = request.args
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped)
        whole = self._encode(stripped + continuation)
        after = whole[len(before) :] if whole[: len(before)] == before else None
        after = after or self._encode(continuation)
        before = before[max(0, len(before) + len(after) - self.limit) :]
        return Pair(before, after[: self.limit], _place(request))

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """What is to be written after a context; its last tokens, where it leaves no room."""
        length = min(int(settings.get("max_gen_toks", self.max_new_tokens)), self.limit - 1)
        if not self.model.block_length:
            block = self.decoding.block_length or 1
            length = max(block, length // block * block)
        try:
            check_lengths(self.model, self.decoding, length)
        except ValueError as error:
            raise UserError(f"decoding: a task asks for {length} tokens: {error}") from error
        ids = self._encode(context)[-(self.limit - length) :]
        return Request(ids or [self.tokenizer.eos_id], length, self.seed)

    def bounds(self, pairs: list[Pair]) -> list[float]:
        """Minus the bound of each, nats."""
        estimator = BoundEstimator(
            self.tokenizer, self.world.alone(), self.batch_size, self.draws, self.seed
        )

        def work(batch: list[int]) -> list[float]:
            own = [pairs[i] for i in batch]
            rows = Rows(
                (x.context + x.continuation, [i >= len(x.context) for i in range(x.length)])
                for x in own
            )
            places = torch.tensor([x.place for x in own])
            found = estimator.bounds(self.model, rows, torch.arange(len(own)), places)
            return (-found.nats).tolist()

        batches = share([x.length for x in pairs], self.batch_size, self.world)
        return in_shares(work, batches, self.model, self.world, "loglikelihood")

    def greedy(self, pairs: list[Pair]) -> list[bool]:
        """Whether each continuation is greedy; those as long as each other after one context are
        followed together."""
        together: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, x in enumerate(pairs):
            start = tuple(x.context) or (self.tokenizer.eos_id,)
            if len(start) + len(x.continuation) <= self.limit:
                together.setdefault((start, len(x.continuation)), []).append(i)
        asked = list(together.items())

        def work(batch: list[int]) -> list[list[bool]]:
            return is_greedy(
                self.model,
                [asked[k][0][0] for k in batch],
                [[pairs[i].continuation for i in asked[k][1]] for k in batch],
                self.tokenizer,
            )

        batches = share([len(start) + n for (start, n), _ in asked], self.batch_size, self.world)
        answers = in_shares(work, batches, self.model, self.world, "greedy")
        found = [False] * len(pairs)
        for (_, numbers), same in zip(asked, answers, strict=True):
            for i, answer in zip(numbers, same, strict=True):
                found[i] = answer
        return found


def _place(request: Instance, window: int = 0) -> int:
    """A place for the noise of a request: that of its document, or its context where it has none;
    and of its window, in a long text. The same in any batch, rank and order."""
    document = request.args[0] if request.doc_id is None else (request.task_name, request.doc_id)
    digest = blake2b(repr((document, window)).encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little")


def main() -> None:
    """lm_eval's own command line, with ``mdm`` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
