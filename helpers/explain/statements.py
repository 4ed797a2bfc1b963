"""Nodes of a graph as lines of Python, as a rewrite rule has them: formatted as ruff does it.

    scores = op.MatMul(query, keys)
    scores = op.Add(scores, mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)

A name is bound again as soon as what it held is not needed any more.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from helpers import graph

WIDTH = 100  # columns
INDENT = 8  # of the lines of a method
_PLAIN = {
    getattr(ir.AttributeType, f"{kind}{s}")
    for kind in ("INT", "FLOAT", "STRING")
    for s in ("", "S")
}


@dataclass(frozen=True)
class Call:
    """``name(arguments)``; each argument is text, or a call."""

    name: str
    arguments: Sequence[Call | str]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})"


def lines(call: Call, before: str = "", after: str = "", *, indent: int = INDENT) -> list[str]:
    """`call` between `before` and `after`, on one line, on three, or with a line an argument."""
    space = " " * indent
    whole = f"{space}{before}{call}{after}"
    if len(whole) <= WIDTH:
        return [whole]
    first, last = f"{space}{before}{call.name}(", f"{space}){after}"
    inside = f"{space}    {', '.join(map(str, call.arguments))}"
    if len(inside) <= WIDTH:
        return [first, inside, last]
    body: list[str] = []
    for argument in call.arguments:
        if isinstance(argument, Call):
            body += lines(argument, after=",", indent=indent + 4)
        else:
            body.append(f"{space}    {argument},")
    return [first, *body, last]


def literal(value: Any) -> str:
    """A number, a text, a type, or a list of them, as Python has it."""
    if isinstance(value, ir.DataType):
        return f"ir.DataType.{value.name}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    return repr(value).replace("e+", "e")


def printable(text: str) -> str:
    """What has names of a file in it, as a docstring, a comment or a message may have it."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text)
    return shown.replace("\\", "/").replace('"', "'")


def attribute(attribute: ir.Attr) -> str:
    """An attribute as a keyword; one that holds a tensor as the tensor's number, of its type."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        number = literal(tensor.numpy().tolist())
        return f"{attribute.name}=ir.tensor({number}, dtype={literal(tensor.dtype)})"
    return f"{attribute.name}={literal(attribute.value)}"


@dataclass
class Writer:
    """Writes nodes as statements. `names` are those of the values that are there before.

    `label` gives the name that a node's result should have, `keywords` those that stand in place
    of a node's attributes, `inline` says which nodes are written where their result is read, and
    `remark` what is said behind a statement.
    """

    names: Mapping[ir.Value, str]
    label: Callable[[ir.Node], str]
    keywords: Mapping[ir.Node, Sequence[str]] = field(default_factory=dict)
    inline: Callable[[ir.Node], bool] = lambda node: False
    remark: Callable[[ir.Node], str] = lambda node: ""

    def write(self, nodes: Sequence[ir.Node], result: ir.Value) -> list[str]:
        """`nodes`, in order, and that `result`, what the last of them computes, is returned."""
        names = dict(self.names)
        written = [node for node in nodes if not self.inline(node)]
        reads = {node: {*self._reads(node)} for node in written}
        needed = Counter(value for values in reads.values() for value in values)
        text: list[str] = []
        for node in written:
            call = self._call(node, names)
            needed -= Counter(reads[node])
            if node.outputs[0] is result:
                text += self._line(node, call, "return ")
                return text
            taken = {names[value] for value in needed if value in names}
            name = unused(self.label(node), taken)
            names = {value: other for value, other in names.items() if other != name}
            names[node.outputs[0]] = name
            text += self._line(node, call, f"{name} = ")
        return [*text, f"{' ' * INDENT}return {names[result]}"]

    def _line(self, node: ir.Node, call: Call, before: str) -> list[str]:
        written = lines(call, before)
        remark = self.remark(node)
        if remark and len(written) == 1 and len(f"{written[0]}  # {remark}") <= WIDTH:
            written[0] += f"  # {remark}"
        elif remark:
            written.insert(0, f"{' ' * INDENT}# {remark}")
        return written

    def _reads(self, node: ir.Node) -> Iterator[ir.Value]:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and value not in self.names and self.inline(producer):
                yield from self._reads(producer)
            elif value is not None:
                yield value

    def _call(self, node: ir.Node, names: Mapping[ir.Value, str]) -> Call:
        arguments: list[Call | str] = []
        for value in node.inputs:
            if value is None:
                arguments.append("None")
            elif value in names:
                arguments.append(names[value])
            else:
                arguments.append(self._call(value.producer(), names))
        if node in self.keywords:
            arguments += self.keywords[node]
        else:
            arguments += map(attribute, filter(_is_shown, node.attributes.values()))
        if node.domain not in graph.STANDARD:
            arguments.append(f"_domain={literal(node.domain)}")
        plain = node.op_type.isidentifier()
        operator = f"op.{node.op_type}" if plain else f"getattr(op, {literal(node.op_type)})"
        return Call(operator, arguments)


def _is_shown(given: ir.Attr) -> bool:
    """Whether an attribute is written: one that a pattern can match, and that says something."""
    plain = given.type in _PLAIN and not given.is_ref() and given.name.isidentifier()
    noise = given.name == "allowzero" and not given.value  # which exporters write everywhere
    return plain and not noise


def unused(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number behind it, so that it is not one of those `taken`."""
    number, given = 2, name
    while given in taken:
        given, number = f"{name}_{number}", number + 1
    return given
