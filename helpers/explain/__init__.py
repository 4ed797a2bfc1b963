"""Why a fusion did not match: the optimizer's own, a reader's, or a rewrite rule."""

from helpers.explain.entry import LEVELS, explain, what_if
from helpers.explain.reasons import Attempt, Check, Explanation, Node, Reason, Verdict
from helpers.explain.suggest import Suggestion, suggest

__all__ = [
    "LEVELS",
    "Attempt",
    "Check",
    "Explanation",
    "Node",
    "Reason",
    "Suggestion",
    "Verdict",
    "explain",
    "suggest",
    "what_if",
]
