"""Rewrite rules for the attention sites of a file, as Python text to save and to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from helpers import files


@dataclasses.dataclass
class Suggestion:
    """`text` is a Python module with a rule for each form of attention in a file, ready to be saved
    and given to ``explain(…, rules="FILE.py:RULES")``; its last line is the command that does so.
    `left` has a line for each site whose rule is not finished: what is left to write."""

    text: str
    left: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"suggested": self.text, "left": self.left}


def suggest(path: str | Path | files.Opened) -> Suggestion:
    """Rules that fuse the attention sites of the model at `path`, as Python text.

    They match the graph as it is at opset 23, the first with Attention, and use operators of the
    standard alone. Sites of one form share a rule. Raises `files.BadInput` on a file that is no
    model.
    """
    from helpers.explain import rule_module  # onnxscript takes a second to import

    return Suggestion(*rule_module.written(files.Opened.of(path)))
