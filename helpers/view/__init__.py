"""Netron on the part of a graph that matters: live in a notebook, or as a picture for a page."""

from helpers.view.serving import wait
from helpers.view.showing import View, cut, drawing, save, serve, show

__all__ = ["View", "cut", "drawing", "save", "serve", "show", "wait"]
