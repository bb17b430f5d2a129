"""How text is written: the options of a decoding."""

from dataclasses import dataclass, field
from typing import Literal

from mdm_plugin.generation.samplers import Remasking, Sampler

Cache = Literal["prefix", "dual"]


@dataclass(frozen=True)
class Decoding:
    """How text is written.

    Args:
        steps: number of steps, for samplers that take a number; None for one position a step.
        block_length: the response is written block by block, left to right; None for one block.
        sampler: which predictions stay at each step.
        temperature: 0 takes the likeliest token; else tokens are drawn, each by one number of fp64.
        top_p, top_k: draw from the likeliest tokens only, to a total probability or a number.
        cfg_scale: w of classifier-free guidance: (w + 1) · logits − w · logits without the prompt.
        eos_last: EOS is chosen where nothing else can be (LLaDA's confidence_eos_eot_inf).
        cache: after the first step of a block, forward only its positions (``dual``) or those from
            its start to the end (``prefix``), the others' keys and values being those of that
            first step: an approximation (Fast-dLLM, arXiv 2505.22618).
        refresh_every: with a cache, a whole forward every so many steps of a block; 1 is exact.

    Raises:
        ValueError: on a value out of range, or one that the others leave without effect.
    """

    steps: int | None = None
    block_length: int | None = None
    sampler: Sampler = field(default_factory=Remasking)
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    eos_last: bool = False
    cache: Cache | None = None
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("steps", self.steps),
            ("block_length", self.block_length),
            ("top_k", self.top_k),
            ("refresh_every", self.refresh_every),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: use 1 or more")
        if self.steps is not None and not self.sampler.needs_steps:
            raise ValueError(
                f"steps is {self.steps}: {type(self.sampler).__name__} takes as many as it needs: "
                "leave it out"
            )
        if self.temperature < 0 or self.cfg_scale < 0:
            raise ValueError(
                f"temperature is {self.temperature}, cfg_scale {self.cfg_scale}: use 0 or more"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use more than 0, to 1")
        if self.cache not in (None, "prefix", "dual"):
            raise ValueError(f"cache is {self.cache!r}: use prefix, dual or null")
        if self.refresh_every is not None and self.cache is None:
            raise ValueError("refresh_every: there is no cache to refresh: set cache")

    def steps_per_block(self, length: int) -> tuple[int, int]:
        """(length of a block, steps in it; 0 if the sampler decides) for ``length`` tokens.

        Raises:
            ValueError: if they do not fit each other.
        """
        block = self.block_length or length
        if length % block:
            raise ValueError(f"block_length {block} does not divide the response's {length} tokens")
        blocks, steps = length // block, self.steps or length
        if steps > length:
            raise ValueError(f"steps is {steps}: use 1 to the response's {length} tokens")
        if steps % blocks:
            raise ValueError(f"steps is {steps}: use a multiple of the {blocks} blocks")
        return block, steps // blocks if self.sampler.needs_steps else 0
