"""Keep what other code prints, logs and warns of away."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


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
