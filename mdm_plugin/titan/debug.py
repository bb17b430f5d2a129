"""What the configs of the debug models need: the quickstart's data, and the attention to use."""

import os
from pathlib import Path

import torch

from mdm_plugin.quickstart import prepare_data


def quickstart_data() -> Path:
    """The quickstart's directory, with its data and tokenizer made if missing."""
    place = os.environ.get("MDM_PLUGIN_HOME", "~/.cache/mdm_plugin")
    home = Path(place).expanduser() / "quickstart"
    prepare_data(str(home))
    return home


def attention_backend() -> str:
    """``flex``; ``sdpa`` where flex attention cannot be trained, without CUDA."""
    return "flex" if torch.cuda.is_available() else "sdpa"
