"""What other packages say at the start that no user of this one can act upon."""

import logging
import sys
from pathlib import Path

LINE = "Skipping import of cpp extensions due to incompatible torch version"


def hide_torchao_line() -> None:
    """Leave out torchao's line about its C++ extensions, where a command of this project runs.

    Every torchao that torchtune 0.6.1 goes with says it beside this torch, and what is used of
    torchao here needs no extension. ``tune`` imports torchao before it looks for a recipe. So it
    is torch, which torchao itself imports first, that calls this: pyproject.toml,
    ``torch.backends``. torchao's other lines stay, and other programs' are theirs.
    """
    if any(Path(word).name.startswith("mdm") for word in sys.orig_argv):
        logging.getLogger("torchao").addFilter(lambda x: not x.getMessage().startswith(LINE))
