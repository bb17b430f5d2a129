"""What a run leaves and goes on from: weights in Hugging Face's layout, state, manifests, export.

May import: errors, config, models, distributed.
"""

from mdm_plugin.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
