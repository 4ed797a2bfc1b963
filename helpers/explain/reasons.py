"""What `explain` and `rules` answer: why attention sites were not fused, as text and as JSON.

Nodes are named as they are in the input file, so that they can be searched for in Netron.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

    from helpers.parity import Candidate

# The cause classes of a reason, and what a reader is told.
CAUSES = {
    "extra_node": "a node that the pattern does not have",
    "missing_node": "a node of the pattern is not there",
    "other_operator": "another operator than the pattern has",
    "operand_order": "operands in another order",
    "constant": "a constant that is no initializer, or has another value",
    "missing_anchor": "the node that it starts from is not there",
    "used_elsewhere": "a node's output is used elsewhere",
    "symbolic_dimension": "a symbolic dimension that was not unified",
    "shape_inference": "shape inference failed",
    "unsupported_form": "a form of attention that it does not know",
    "packed_projection": "one product makes queries, keys and values together",
    "quantised": "a quantised product, which it does not read",
    "heads": "other heads, or another hidden size, than the graph has",
    "branch": "it is in a branch, and the optimizer does not read branches",
    "raised": "its own code failed",
    "other_check": "another check of its code",
}


SHOWN = 3  # reasons that the text tells
WIDTH = 100  # columns to which a message is wrapped


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class Node(NamedTuple):
    """A node as it was when a fusion looked at it. `name` is what to search for in the file: the
    node's, or, for one that the optimizer made itself, its first output's."""

    operator: str
    name: str
    output: str


@dataclass
class Attempt:
    """One path that a fusion asked for, from the node `start` up against the arrows.

    `expected[i]` is the operator wanted next, by input `inputs[i]` of the node before it (None: any
    input). `matched` are the nodes found so far. Where the path broke, `at` is the last node that
    matched and `found` the nodes that are there instead of ``expected[len(matched)]``: one, none
    (an initializer or an input of the graph is there), or two at the most where any input would do.
    """

    start: Node
    expected: list[str]
    inputs: list[int | None]
    variable: str | None = None  # what the fusion's code calls the result; of a rule, its name
    matched: list[Node] = field(default_factory=list)
    found: list[Node] = field(default_factory=list)
    down: bool = False  # the path goes along the arrows; `inputs` are then those of its nodes

    @property
    def broke(self) -> bool:
        return len(self.matched) < len(self.expected)

    @property
    def at(self) -> Node:
        return self.matched[-1] if self.matched else self.start

    def __str__(self) -> str:
        """The path from its start: one line for each step, and where it broke."""
        lines = [f"start      {self.start.operator:<12} {self.start.name}"]
        for i, (operator, index) in enumerate(zip(self.expected, self.inputs, strict=True)):
            edge = "any input" if index is None else f"input {index}"
            edge = f"↓ {edge}" if self.down else edge
            if i < len(self.matched):
                lines.append(f"{edge:<10} {operator:<12} {self.matched[i].name}")
                continue
            listed = " or ".join(f"{node.operator} {node.name}" for node in self.found)
            listed = listed or "no node: an initializer, or an input of the graph"
            lines.append(f"{edge:<10} {operator:<12} ✗ the graph has {listed}")
            break
        return "\n".join(lines)

    @property
    def brief(self) -> str:
        """The path in one line, from its start, with the variable that it was for."""
        for_, arrow = f"{self.variable}: " if self.variable else "", " → " if self.down else " ← "
        return f"{for_}{arrow.join([self.start.operator, *self.expected])} {self.inputs}"

    def to_json(self) -> dict[str, Any]:
        names, broke, reached = [node.name for node in self.found], self.broke, len(self.matched)
        operators = [node.operator for node in self.found]
        return {
            "variable": self.variable,
            "direction": "down" if self.down else "up",
            "start": self.start.name,
            "expected": self.expected,
            "inputs": self.inputs,
            "matched": reached,
            "at": self.at.name,
            "input": self.inputs[reached] if broke else None,
            "expected_op": self.expected[reached] if broke else None,
            "found_op": _single_or_all(operators),
            "found": _single_or_all(names),
        }


def _single_or_all(things: list[str]) -> str | list[str] | None:
    return (things[0] if len(things) == 1 else things) if things else None


@dataclass(frozen=True)
class ActualPath:
    """A path of the graph, from `start` up against the arrows: `nodes[i]` computes input
    ``inputs[i]`` of the node before it."""

    start: Node
    nodes: list[Node]
    inputs: list[int]

    @property
    def operators(self) -> list[str]:
        return [node.operator for node in self.nodes]

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start.name,
            "operators": self.operators,
            "inputs": self.inputs,
            "nodes": [node.name for node in self.nodes],
        }


@dataclass
class Check:
    """A test in a fusion's code that said no: its `source`, and the value of each of `operands`, by
    the expression that the code has for it. Nodes are written "Operator name (inputs) -> outputs".
    """

    source: str
    operands: dict[str, str]


@dataclass
class Reason:
    """Why sites were not fused; it is the same for all of `sites` (numbers in Explanation.sites).

    `kind` is "path" (the `attempt` did not match), "check" (another test said no), "raised" (the
    code failed with `message`) or "end" (`fuse` fell off its end).
    `file`, `line` and `source` are where the code gave up; `within` where a function that it had
    called did so before, innermost last. `actual` is the path that is there: operators and inputs.
    """

    fusion: str | None
    kind: str
    cause: str
    sites: list[int] = field(default_factory=list)
    file: str | None = None
    line: int | None = None
    source: str | None = None
    within: list[str] = field(default_factory=list)
    anchor: Node | None = None
    attempt: Attempt | None = None
    check: Check | None = None
    none: list[str] = field(default_factory=list)
    actual: ActualPath | None = None
    origin: str | None = None  # where the node that is there came from in PyTorch
    shape: str | None = None  # of what the node that is there computes
    message: str | None = None
    attempts: list[Attempt] = field(default_factory=list)  # all that were tried, best first
    earlier: Reason | None = None  # of a missing anchor: why what would have made it did not

    def marks(self) -> dict[str, Any]:
        """What to show of it: passed to `view.cut`, `view.save` or `view.show`."""
        if self.attempt is None:
            return {"along": (), "break_at": self.anchor.name if self.anchor else None}
        matched = [node.name for node in self.attempt.matched]
        broke = [*(node.name for node in self.attempt.found), self.attempt.at.name][0]
        return {"along": [name for name in matched if name != broke], "break_at": broke}

    def to_json(self, number: int | None = None) -> dict[str, Any]:
        broken = self.attempt.to_json() if self.attempt else {}
        fields = ("expected", "inputs", "matched", "at", "input", "expected_op", "found_op")
        return {
            "id": number,
            "sites": len(self.sites),
            "fusion": self.fusion,
            "kind": self.kind,
            "file": self.file,
            "line": self.line,
            "source": self.source,
            "within": self.within,
            "anchor": self.anchor.name if self.anchor else None,
            "cause": self.cause,
            **{name: broken.get(name) for name in (*fields, "found")},
            "none": self.none,
            "check": dataclasses.asdict(self.check) if self.check else None,
            "origin": self.origin,
            "shape": self.shape,
            "actual_path": self.actual.to_json() if self.actual else None,
            "message": self.message,
            "attempts": [attempt.to_json() for attempt in self.attempts],
            "earlier": self.earlier.to_json() if self.earlier else None,
        }

    def __str__(self) -> str:
        """What a terminal shows of it; at most 30 lines."""
        broken, where = self.attempt, f"{self.file}:{self.line}  {self.source}"
        parts = [("why", CAUSES[self.cause])]
        parts += [("", line) for line in _wrapped(self.message or "")]
        parts += [("code", where)] if self.file else []
        parts += [("called", called) for called in self.within[-2:]]
        parts += [("None", ", ".join(self.none))] if self.none else []
        if self.check:
            parts += [("test", _short(self.check.source))]
            nodes_first = sorted(
                self.check.operands.items(), key=lambda operand: "->" not in operand[1]
            )
            parts += [
                ("", f"  {_short(name)} = {_short(value)}") for name, value in nodes_first[:8]
            ]
        if broken:
            first, *rest = str(broken).split("\n")
            parts += [("path", first), *(("", line) for line in rest)]
        elif self.anchor:
            parts += [("anchor", f"{self.anchor.operator} {self.anchor.name}")]
        parts += [("shape", self.shape)] if self.shape and broken else []
        parts += [("PyTorch", self.origin)] if self.origin else []
        if self.actual:
            operators, inputs = json.dumps(self.actual.operators), json.dumps(self.actual.inputs)
            parts += [("there is", f"{operators}, {inputs}")]
            end = self.actual.nodes[-1]
            parts += [("", f"from {self.actual.start.name} to {end.operator} {end.name}")]
        others = [attempt for attempt in self.attempts if attempt is not broken][:4]
        parts += [
            (
                "tried" if i == 0 else "",
                f"{len(attempt.matched)} of {len(attempt.expected)} nodes: {attempt.brief}",
            )
            for i, attempt in enumerate(others)
        ]
        return "\n".join(f"   {label:<8} {text}".rstrip() for label, text in parts)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _short(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width]} …"


@dataclass
class Verdict:
    """What became of one attention site of the input file; `name` is that of its Softmax, or of the
    operator that it already was. `reason` is a number in Explanation.reasons, of an unfused one;
    `wanted` has a line for each thing that the operator of a wrong one wants, and what it got."""

    name: str
    layer: str | None
    fused: bool
    wrong: bool = False
    reason: int | None = None
    wanted: list[str] = field(default_factory=list)


@dataclass
class Explanation:
    """What became of each site of a graph, and why; ``str()`` of it is the text for a terminal.

    `parity` is that of the optimised model with the one that it came from, if asked for and told;
    `not_compared` why it could not be told. `watched` has the fusions that were applied, with the
    operators that they start from, and `notes` what else a reader should know of the file.
    """

    optimizer: str
    sites: list[Verdict]
    reasons: list[Reason]
    parity: Candidate | None = None
    not_compared: str | None = None
    written: str | None = None  # the file that holds the result
    watched: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    what_if: list[dict[str, Any]] | None = None  # the same at other levels, if asked, a row each

    @property
    def failed(self) -> bool:
        """Whether what was fused is not right, or could not be told to be."""
        if self.parity:
            return not self.parity.held
        return self.not_compared is not None and any(site.fused for site in self.sites)

    def __str__(self) -> str:
        fused, lines = sum(site.fused for site in self.sites), []
        notes = [f"note: {note}" for note in self.notes]
        if not self.sites:
            return "\n".join([f"{self.optimizer}: no attention site in this graph", *notes])
        verdict = f"{self.optimizer}: {count(len(self.sites), 'site')}, {fused} fused"
        lines.append(f"{verdict}, {count(len(self.reasons), 'reason')}")
        if self.parity:
            lines.append(str(self.parity))
            wrong = [site.name for site in self.sites if site.wrong]
            more = f" … {wrong[-1]}" if len(wrong) > 1 else ""
            lines += [f"{count(len(wrong), 'site')} fused wrong: {wrong[0]}{more}"] if wrong else []
            lines += [f"   {line}" for line in self._wanted()]
        lines += [f"{self.written}: written"] if self.written else []
        lines += notes
        for number, reason in enumerate(self.reasons[:SHOWN]):
            names = [self.sites[i].layer or self.sites[i].name for i in reason.sites]
            more = f" … {names[-1]}" if len(names) > 1 else ""
            who = reason.fusion or "the optimizer"
            lines += [
                "",
                f"{number}. {count(len(names), 'site')}, {who}: {reason.cause} ({reason.kind})",
                f"   sites    {names[0]}{more}",
                str(reason),
            ]
        if len(self.reasons) > SHOWN:
            lines += ["", f"{count(len(self.reasons) - SHOWN, 'reason')} more: see --json"]
        if self.not_compared:
            lines += ["", f"parity could not be told: {self.not_compared}"]
        if self.what_if:
            lines += ["", "what if: at another opt_level"]
            lines += [
                f"   {row['opt_level']:<3} {row['fused']} of {row['sites']} fused"
                + {True: ", right", False: ", WRONG", None: ""}[row["held"]]
                + (f": {row['causes']}" if row["causes"] else "")
                for row in self.what_if
            ]
        return "\n".join(lines)

    def _wanted(self) -> list[str]:
        """What the first wrong site wants and got, and how many others have got the same."""
        wanted = [site.wanted for site in self.sites if site.wrong]
        if not wanted or not wanted[0]:
            return []
        others = sum(lines != wanted[0] for lines in wanted)
        return wanted[0] + (
            [f"{count(others, 'other')} got something else: see --json"] * (others > 0)
        )

    def table(self, reason: int = 0) -> pd.DataFrame:
        """The paths that were tried for `reason` and did not match, best first, one a row."""
        import pandas as pd

        return pd.DataFrame(
            {
                "variable": attempt.variable,
                "start": attempt.start.operator,
                "expected": " ← ".join(attempt.expected),
                "inputs": attempt.inputs,
                "matched": f"{len(attempt.matched)} of {len(attempt.expected)}",
                "found": ", ".join(node.operator for node in attempt.found),
            }
            for attempt in self.reasons[reason].attempts
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "reasons": [reason.to_json(i) for i, reason in enumerate(self.reasons)],
            "parity": self.parity.to_json() if self.parity else None,
            "not_compared": self.not_compared,
            "written": self.written,
            "watched": self.watched,
            "notes": self.notes,
            "what_if": self.what_if,
        }
