"""Training by comparison: preferences, and rewards, by bounds of whole responses.

May import: errors, the maths, and all rooms up to evaluation.
"""

from mdm_plugin.alignment.bounds import Drawn, DrawPlan, add_gradient, bounds, drawn

__all__ = ["DrawPlan", "Drawn", "add_gradient", "bounds", "drawn"]
