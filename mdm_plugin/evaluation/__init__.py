"""How good a model is: its NELBO, and the share of its answers that are right."""

from mdm_plugin.evaluation.exact_match import ExactMatch, exact_match
from mdm_plugin.evaluation.nelbo import NELBO, nelbo

__all__ = ["NELBO", "ExactMatch", "exact_match", "nelbo"]
