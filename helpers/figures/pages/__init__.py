"""The README, the notebooks and the notes of assets/ as pages to read in a browser."""

from helpers.figures.pages.building import Pages, build

__all__ = ["Pages", "build"]
