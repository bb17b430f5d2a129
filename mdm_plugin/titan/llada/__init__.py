"""LLaDA in torchtitan: ``--module mdm_plugin.titan.llada``."""

from typing import Any

from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.model_spec import ModelSpec

from mdm_plugin.models.llada import LLADA_8B
from mdm_plugin.titan.model import HuggingFaceNames, decoder, spec

FLAVORS: dict[str, dict[str, Any]] = {
    "debugmodel": {  # the quickstart's
        "vocab_size": 320,
        "num_layers": 3,
        "num_heads": 4,
        "embed_dim": 64,
        "intermediate_dim": 256,
    },
    "1B": {
        "vocab_size": 126_464,
        "num_layers": 22,
        "num_heads": 32,
        "num_kv_heads": 4,
        "embed_dim": 2048,
        "intermediate_dim": 5634,
    },
    "8B": LLADA_8B,
}


class LLaDANames(HuggingFaceNames):
    """The names of LLaDA's checkpoints."""

    family = "llada"


def model_registry(
    flavor: str,
    attn_backend: str = "flex",
    converters: list[ModelConfigConverter.Config] | None = None,
) -> ModelSpec:
    """A flavor: debugmodel, 1B or 8B; arguments as of ``mdm_plugin.titan.model``."""
    config = decoder(**FLAVORS[flavor], attn_backend=attn_backend)
    return spec("llada", flavor, config, LLaDANames, converters)
