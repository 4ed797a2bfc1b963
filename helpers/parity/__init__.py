"""Do two models compute the same? Compare their outputs over several inputs, padding included."""

from helpers.parity.comparing import Candidate, Case, Report, cases_of, compare
from helpers.parity.precision import TOLERANCE
from helpers.parity.runner import Model, Outputs, Runner

__all__ = [
    "TOLERANCE",
    "Candidate",
    "Case",
    "Model",
    "Outputs",
    "Report",
    "Runner",
    "cases_of",
    "compare",
]
