"""A plot that carries its text alternative, as wide as a notebook's text."""

import dataclasses
import io
from typing import TYPE_CHECKING, Any
from xml.dom import minidom

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.4  # inches, 806 pixels of an SVG: as wide as the text of a page


@dataclasses.dataclass(frozen=True)
class Plot:
    """What a notebook shows as a drawing, and says as `text` where nobody sees it."""

    figure: "Figure"
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"image/svg+xml": self.svg(), "text/plain": self.text}

    def svg(self) -> str:
        """The drawing, with `text` as its title; the same each time it is drawn."""
        import matplotlib

        drawn = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "plot"}):
            self.figure.savefig(drawn, format="svg", metadata={"Date": None})
        root = minidom.parseString(drawn.getvalue()).documentElement
        title = root.ownerDocument.createElement("title")
        title.appendChild(root.ownerDocument.createTextNode(self.text))
        root.insertBefore(title, root.firstChild)
        root.setAttribute("role", "img")
        root.setAttribute("aria-label", self.text)
        return root.toxml()
