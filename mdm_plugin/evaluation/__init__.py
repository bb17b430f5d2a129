"""How good a model is: its NELBO, right answers, lm-eval's tasks, and its estimators' variance.

May import: everything but quickstart and titan.
"""

from mdm_plugin.evaluation.exact_match import ExactMatch, Questions, exact_match
from mdm_plugin.evaluation.nelbo import NELBO, BoundEstimator

__all__ = ["NELBO", "BoundEstimator", "ExactMatch", "Questions", "exact_match"]
