"""Other people's chatter kept away, and the helpers' own progress shown."""

import contextlib
import io
import logging
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


@contextlib.contextmanager
def progress_on(stream: TextIO) -> Iterator[None]:
    """Show the helpers' progress on `stream`, and nothing that others log."""
    logger = logging.getLogger("helpers")
    before, propagates = logger.level, logger.propagate
    nowhere = logging.NullHandler()  # else Python writes warnings that nobody handles to stderr
    logging.root.addHandler(nowhere)
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logging.root.removeHandler(nowhere)
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagates


class OneLine(logging.Handler):
    """Progress in a notebook: a line that ends in "…" is overwritten by the next of its cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.line = None, None  # where the line is that is to be overwritten

    def emit(self, record: logging.LogRecord) -> None:
        from IPython import display, get_ipython

        text, cell = self.format(record), get_ipython().execution_count
        shown = {"text/plain": text}
        if self.line is None or cell != self.cell:
            self.cell, self.line = cell, display.display(shown, raw=True, display_id=True)
        else:
            self.line.update(shown, raw=True)
        if not text.endswith("…"):
            self.line = None


def notebook() -> None:
    """For a notebook's first cell: show the helpers' progress from then on, and keep what exporters
    and optimizers log and warn of away."""
    logger = logging.getLogger("helpers")
    logger.handlers = [OneLine()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.root.addHandler(logging.NullHandler())
    logging.getLogger("torch.onnx._internal").setLevel(logging.ERROR)  # torch has a handler for it
    warnings.simplefilter("ignore")
