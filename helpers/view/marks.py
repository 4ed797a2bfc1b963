"""A graph drawn by Netron in headless Chromium, with marks that need no colour.

Nothing is served and nothing is sent: each request of the page is answered from Netron's package on
disk, or refused. The picture is Netron's own SVG export; a PNG is that SVG, rendered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.dom import minidom

from helpers.files import BadInput
from helpers.view import browser
from helpers.view.browser import FONT, Sizes

MONOSPACE = "'Liberation Mono', 'Courier New', monospace"
CHARACTER, LINE = 6.6, 20  # width of a character of the labels (11 px), height of a line
MARGIN = 16  # marks reach out of the picture that Netron drew
PATH_GAP, BREAK_GAP = 3, 7  # from a node's box to its outline


class Mark(NamedTuple):
    kind: str  # around, path or break
    number: str  # of a step of the path; empty for the others
    node: int  # its place among the nodes


def mark(
    svg: str,
    sizes: Sizes,
    nodes: Sequence[tuple[str, str]],
    text: str,
    *,
    around: int | None = None,
    along: Sequence[int] = (),
    break_at: int | None = None,
) -> str:
    """Netron's export `svg` with the marks, a line below for each of them, and a text alternative.

    `sizes` are those of `browser.sizes`; `nodes` has the operator and the name of each. A node of
    the path gets a solid outline and its number in a disc, the node asked for a thicker one and a
    triangle, the break a dashed one and a cross in a square. Each node gets its name as a tooltip.
    """
    # Netron writes shapes in brackets that only Chinese and Japanese fonts have.
    root = minidom.parseString(svg.replace("〈", " [").replace("〉", "]")).documentElement
    groups = _groups(root, nodes)
    marks = [Mark("path", str(number), node) for number, node in enumerate(along, 1)]
    if around is not None:
        marks.insert(0, Mark("around", "", around))
    if break_at is not None:
        marks.append(Mark("break", "", break_at))
    _place(groups, sizes, marks)
    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    width = max(width, _legend(root, nodes, marks))
    _frame(root, width, height + LINE * len(marks), text)
    return root.toxml() + "\n"


def _groups(root: Any, nodes: Sequence[tuple[str, str]]) -> list[Any]:
    """What is drawn of each node, with its name as a tooltip in place of its number."""
    drawn = {
        group.getAttribute("id"): group
        for group in root.getElementsByTagName("g")
        if group.parentNode.getAttribute("id") == "nodes"
    }
    groups = [drawn.get(f"node-name-{number}") for number in range(len(nodes))]
    named = [(group, name) for group, (_, name) in zip(groups, nodes, strict=True)]
    if missing := [name for group, name in named if group is None]:
        import netron

        raise BadInput(
            f"netron {netron.__version__}: expected a drawing of {len(nodes)} nodes, found none of"
            f" {', '.join(missing[:3])}; install the version in requirements.txt"
        )
    for number, (group, name) in enumerate(named):
        for title in group.getElementsByTagName("title"):
            if title.firstChild.data == str(number):
                title.parentNode.removeChild(title)
        _put(group, "title", _printable(name), first=True)
    return groups


def _place(groups: Sequence[Any], sizes: Sizes, marks: Sequence[Mark]) -> None:
    """Put the outlines around the nodes, then the badges above them all."""
    corners = []
    for kind, _, node in marks:
        width, height = sizes[groups[node].getAttribute("id")]
        corners.append(_outline(groups[node], kind, width, height))
    for (kind, number, node), corner in zip(marks, corners, strict=True):
        _badge(groups[node], kind, number, *corner)


def _legend(root: Any, nodes: Sequence[tuple[str, str]], marks: Sequence[Mark]) -> int:
    """Put a line for each mark below the drawing; returns the width that they take."""
    width, height = int(root.getAttribute("width")), int(root.getAttribute("height"))
    columns = max(44, int((width - 2 * LINE) / CHARACTER))
    longest = 0
    for line, (kind, number, node) in enumerate(marks):
        y = height + LINE * (line + 0.5)
        _badge(root, kind, number, 10, y)
        operator, name = nodes[node]
        label = f"{kind} {number}".strip() + f": {operator} "
        name, room = _printable(name), columns - len(label)
        label += name if len(name) <= room else f"…{name[1 - room :]}"
        style = {"font-family": MONOSPACE, "font-size": 11, "textLength": CHARACTER * len(label)}
        _put(root, "text", label, x=24, y=y + 4, **style)
        longest = max(longest, int(24 + CHARACTER * len(label)) + 1)
    return longest


def _frame(root: Any, width: int, height: int, text: str) -> None:
    """Make the picture `width` x `height` with a margin around it; `text` is its alternative."""
    box = (-MARGIN, -MARGIN, width + 2 * MARGIN, height + 2 * MARGIN)
    rectangles = root.getElementsByTagName("rect")
    background = next(each for each in rectangles if each.getAttribute("id") == "background")
    for name, value in zip(("x", "y", "width", "height"), box, strict=True):
        background.setAttribute(name, str(value))
    for name in ("id", "style"):
        root.removeAttribute(name)
    root.setAttribute("viewBox", " ".join(map(str, box)))
    for name, value in zip(("width", "height"), box[2:], strict=True):
        root.setAttribute(name, str(value))
    root.setAttribute("role", "img")
    root.setAttribute("aria-labelledby", "title")
    _put(root, "title", _printable(text), first=True, id="title")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in name)  # XML forbids the others


def _put(parent: Any, tag: str, text: str = "", first: bool = False, **attributes: Any) -> None:
    element = parent.ownerDocument.createElement(tag)
    for name, value in attributes.items():
        element.setAttribute(name, f"{value:g}" if isinstance(value, float) else str(value))
    if text:
        element.appendChild(parent.ownerDocument.createTextNode(text))
    parent.insertBefore(element, parent.firstChild if first else None)


def _outline(group: Any, kind: str, width: float, height: float) -> tuple[float, float]:
    """Mark a node of this size, in its own coordinates: its box begins at 0, 0.

    Returns where the badge goes.
    """
    gap = BREAK_GAP if kind == "break" else PATH_GAP
    stroke = {"path": "2px", "around": "4px", "break": "2.5px; stroke-dasharray: 7 4"}[kind]
    box = {"x": -gap, "y": -gap, "width": width + 2 * gap, "height": height + 2 * gap}
    style = f"fill: none; stroke: #000; stroke-width: {stroke}"
    _put(group, "rect", **box, rx=gap + 4, style=style)
    right, bottom = width + gap, height + gap
    return {"path": (-gap, -gap), "around": (right, -gap), "break": (right, bottom)}[kind]


def _badge(parent: Any, kind: str, number: str, x: float, y: float) -> None:
    """The sign of a mark, at most 16 pixels across, around `x`, `y`."""
    if kind == "path":
        _put(parent, "circle", cx=x, cy=y, r=8, style="fill: #000; stroke: #fff")
        style = f"font-family: {FONT}; font-size: 11px; font-weight: bold; fill: #fff"
        _put(parent, "text", number, x=x, y=y + 4, style=f"{style}; text-anchor: middle")
    elif kind == "around":
        triangle = f"M{x - 8:g},{y - 7:g}h16l-8,14z"
        _put(parent, "path", d=triangle, style="fill: #000; stroke: #fff")
    else:
        style = "fill: #fff; stroke: #000; stroke-width: 1.5px"
        _put(parent, "rect", x=x - 7, y=y - 7, width=14, height=14, style=style)
        cross = f"M{x - 4:g},{y - 4:g}l8,8m0,-8l-8,8"
        _put(parent, "path", d=cross, style="fill: none; stroke: #000; stroke-width: 2px")


def draw(
    model: bytes,
    save_as: Path,
    opened: browser.Browser,
    *,
    nodes: Sequence[tuple[str, str]],
    around: int | None,
    along: Sequence[int],
    break_at: int | None,
    text: str,
) -> None:
    """Draw an ONNX model whose nodes are named 0, 1, …, and mark some of them.

    `nodes` has the operator and the name of each; `text` is the text alternative.
    """
    svg, sizes = opened.run(browser.exported, model)
    marked = mark(svg, sizes, nodes, text, around=around, along=along, break_at=break_at)
    if save_as.suffix == ".svg":
        save_as.write_text(marked, encoding="utf-8")
    else:
        save_as.write_bytes(opened.run(browser.rendered, marked))
