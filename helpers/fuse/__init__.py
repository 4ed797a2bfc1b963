"""Every attention site of a graph as one operator, right or not at all."""

from helpers.fuse.pipeline import CACHES, FUSING, OPSET, TARGETS, Fused, clean, convert, fuse

__all__ = ["CACHES", "FUSING", "OPSET", "TARGETS", "Fused", "clean", "convert", "fuse"]
