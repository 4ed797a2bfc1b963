"""Other people's chatter kept away, and the helpers' own progress shown."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters and optimizers print, log and warn of away. Errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, before)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def show_progress(stream: TextIO) -> logging.Handler:
    """Show what the helpers log, their progress, on `stream` from now on; returns its handler."""
    logger, handler = logging.getLogger("helpers"), logging.StreamHandler(stream)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


@contextlib.contextmanager
def progress_on(stream: TextIO) -> Iterator[None]:
    """Show the helpers' progress on `stream`, and nothing that others log."""
    logger = logging.getLogger("helpers")
    before, propagates = logger.level, logger.propagate
    nowhere = logging.NullHandler()  # else Python writes warnings that nobody handles to stderr
    logging.root.addHandler(nowhere)
    handler = show_progress(stream)
    logger.propagate = False
    try:
        yield
    finally:
        logging.root.removeHandler(nowhere)
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagates


def notebook() -> None:
    """For a notebook's first cell: show the helpers' progress on standard output from then on, and
    keep what exporters and optimizers log and warn of away."""
    show_progress(sys.stdout)
    logging.getLogger("helpers").propagate = False
    logging.root.addHandler(logging.NullHandler())
    logging.getLogger("torch.onnx._internal").setLevel(logging.ERROR)  # torch has a handler for it
    warnings.simplefilter("ignore")
