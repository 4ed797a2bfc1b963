"""8 and 4 bits for a provider, proven."""

from helpers.quantize.cpu import dynamic
from helpers.quantize.pipeline import BOUND, Quantized, quantize

__all__ = ["BOUND", "Quantized", "dynamic", "quantize"]
