"""Do two models compute the same? Compare their outputs over several inputs, padding included."""

from helpers.parity.cases import Case, cases_of
from helpers.parity.comparing import compare
from helpers.parity.precision import TOLERANCE
from helpers.parity.reports import Candidate, Report
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
