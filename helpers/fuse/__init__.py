"""Every attention site of a graph as one operator, right or not at all."""

from helpers.fuse.pipeline import FUSING, OPSET, TARGETS, Fused, clean, convert, fuse

__all__ = ["FUSING", "OPSET", "TARGETS", "Fused", "clean", "convert", "fuse"]
