"""Decoders with caches, run step by step."""

from helpers.generate.comparing import Generated, Report, compare
from helpers.generate.decoder import Cache, Decoder

__all__ = ["Cache", "Decoder", "Generated", "Report", "compare"]
