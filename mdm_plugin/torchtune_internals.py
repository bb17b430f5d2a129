"""The private names of torchtune 0.6.1 that this project uses: all of them, and nowhere else.

0.6.1 is torchtune's last release, so they will not change under us; a test holds the rest of the
code to its public names. If torchtune must go, this is what replaces each:

- ``command_line``, ``Config``, ``Recipe``, ``get_all_recipes`` (``mdm``, its recipes and configs
  by name): thirty lines of argparse, and ``torch.distributed.run`` for the launch.
- ``component_from_path`` and ``InstantiationError`` (a dotted path's object): ``importlib`` and
  ``getattr``; torchtitan's loader here does that already.
- ``attention_call``, ``wrap_attention_call`` (what a layer calls with q, k, v): an attention module
  of our own, of which ``models/transformer.py`` has the rotary part and the masks.
- ``summary_writer`` (TensorBoard's, behind torchtune's logger): ``SummaryWriter`` itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchtune._recipe_registry import Config, Recipe, get_all_recipes
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path as component_from_path
from torchtune.modules import MultiHeadAttention
from torchtune.training.metric_logging import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "Config",
    "InstantiationError",
    "Recipe",
    "attention_call",
    "command_line",
    "component_from_path",
    "get_all_recipes",
    "summary_writer",
    "wrap_attention_call",
]


def command_line(name: str) -> Any:
    """torchtune's command line, as the program ``name``: ``run(parse_args())``."""
    from torchtune._cli.tune import TuneCLIParser  # it takes a while, and recipes need none of it

    parser = TuneCLIParser()
    parser._parser.prog = name
    return parser


def wrap_attention_call(attention: MultiHeadAttention, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap(call)`` in the place of what a layer calls with q, k and v."""
    attention._attention_call = wrap(attention._attention_call)


def attention_call(attention: MultiHeadAttention) -> Callable[..., Any]:
    """What a layer calls with q, k and v."""
    call: Callable[..., Any] = attention._attention_call
    return call


def summary_writer(logger: TensorBoardLogger) -> "SummaryWriter | None":
    """A logger's writer; None on the ranks that write nothing."""
    return logger._writer
