"""Inputs for a model: read from a file, or inferred from its graph."""

from helpers.feeds.feed import Feed
from helpers.feeds.inferring import infer
from helpers.feeds.reading import load, read, save

__all__ = ["Feed", "infer", "load", "read", "save"]
