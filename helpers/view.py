"""Netron, live in a notebook: one graph at a time, and small enough to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import IFrame


def show(path: str | Path, height: int = 500) -> IFrame:
    """A frame with Netron on the model file at `path`, `height` pixels high, for a notebook cell.

    Netron serves the file on this machine; the server before it, if any, is stopped first, since
    two in one process both show the last model. A large graph is unreadable: show a cut-out.
    """
    import netron
    from IPython.display import IFrame

    netron.stop()
    host, port = netron.start(str(path), browse=False)
    return IFrame(f"http://{host}:{port}", width="100%", height=height)
