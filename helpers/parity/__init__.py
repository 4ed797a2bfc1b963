"""Do two models compute the same? Compare their outputs over several inputs, padding included."""

from helpers.parity.comparing import Candidate, Report, compare
from helpers.parity.precision import TOLERANCE
from helpers.parity.runner import Model, Outputs

__all__ = ["TOLERANCE", "Candidate", "Model", "Outputs", "Report", "compare"]
