"""Training by comparison: preferences, and rewards, by bounds of whole responses.

May import: errors, the maths, and all rooms up to evaluation.
"""

from mdm_plugin.alignment.bounds import Drawn, Draws, add_gradient, bounds, drawn

__all__ = ["Drawn", "Draws", "add_gradient", "bounds", "drawn"]
