"""A rewrite rule for an attention site, as Python text: a class of onnxscript's rewriter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from helpers import graph
from helpers.explain.skeleton import Skeleton
from helpers.explain.statements import WIDTH, Call, Writer, attribute, lines, literal, printable
from helpers.explain.twins import OPERANDS
from helpers.graph import walks
from helpers.graph.values import NOTHING, number, rank

_INNER = " " * 8


class RuleText:
    """The text of one rule. `left` says what is left to write, if the operator cannot do it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self.twin, self.names = skeleton, skeleton.twin, skeleton.names
        self.left = printable(skeleton.twin.left) if skeleton.twin.left else None

    def name(self) -> str:
        """A name of the class that says what the site does to its scores."""
        reading = self.twin.reading
        if reading is None:
            return "UnfinishedAttention"
        capped = "Capped" if reading.softcap is not None else ""
        chosen = any(node.op_type == "Where" for node in reading.before)
        masked = "" if reading.bias is None else "Masked" if chosen else "Biased"
        return f"{capped}{masked or ('' if capped else 'Plain')}Attention"

    def form(self) -> str:
        """The same for all sites that the rule serves."""
        return "\n".join(self._pattern()) if self.left else self.body()

    def body(self) -> str:
        """All of the class but its first line and docstring."""
        methods = [self._init(), self._pattern(), self._check(), self._rewrite()]
        return "\n\n".join("\n".join(method) for method in methods if method)

    def formula(self) -> str:
        """What the site computes, in a line."""
        reading = self.twin.reading
        if reading is None:
            return "An attention that the standard's operator does not express as it is."
        scaled = reading.factors or reading.row_scales
        scores = "scale · query · keyᵀ" if scaled else "query · keyᵀ"
        scores = scores if reading.softcap is None else f"cap · tanh({scores} / cap)"
        scores = scores if reading.bias is None else f"{scores} + bias"
        return f"softmax({scores}) · value as one Attention."

    def tests(self) -> list[tuple[str, str, list[str]]]:
        """What the pattern cannot say, and `check` tests: what fails, its message, names read."""
        if self.left:
            return []
        return [*self._ranks(), *self._rows(), *self._numbers(), *self._masks()]

    # ── Methods ─────────────────────────────────────────────────────────────────────────────────

    def _init(self) -> list[str]:
        readers = self.skeleton.outside_readers()
        if not readers:
            return []
        kinds = dict.fromkeys(
            graph.operator(reader) if isinstance(reader, ir.Node) else "an output of the graph"
            for reader in readers
        )
        remark = f"Read from outside of the pattern too ({', '.join(kinds)}): that much stays."
        return [
            "    def __init__(self):",
            *_comment(remark.split()),
            f"{_INNER}super().__init__(remove_nodes=False)",
        ]

    def _pattern(self) -> list[str]:
        skeleton = self.skeleton
        shapes = [
            f"{name} {_shape(skeleton.axes[value])}"
            for value, name in self.names.items()
            if value in skeleton.axes
        ]
        writer = Writer(self.names, skeleton.label, remark=self._remark_on_pattern)
        return [
            *_signature("pattern", ["op", *self.names.values()]),
            *_comment(shapes, ", "),
            *writer.write(skeleton.nodes, self.twin.site.context.outputs[0]),
        ]

    def _remark_on_pattern(self, node: ir.Node) -> str:
        """A remark on a node of the pattern: the shape, where it changes; what is left to write."""
        if self.left and printable(f"{node.op_type} {graph.name(node)} ") in f"{self.left} ":
            return "left to write"
        axes = self.skeleton.axes.get(node.outputs[0], ())
        changed = node is self.twin.site.scores or node.op_type == "Transpose"
        return _shape(axes) if axes and changed else ""

    def _check(self) -> list[str]:
        if self.left:
            message = f"left to write: {self.left}"
            failed = Call("return pattern.MatchResult().fail", [literal(message)])
            return [*_signature("check", ["context", "**_"]), *lines(failed)]
        tests = self.tests()
        if not tests:
            return []
        used = {name for _, _, names in tests for name in names}
        text = self._method("check", "context", used)
        text.append(f"{_INNER}match = pattern.MatchResult()")
        for condition, message, _ in tests:
            text.append(f"{_INNER}if {condition}:")
            text += lines(Call("return match.fail", [literal(message)]), indent=12)
        return [*text, f"{_INNER}return match"]

    def _ranks(self) -> Iterator[tuple[str, str, list[str]]]:
        """Tests that operands have the axes that they were written for; not stated, they pass."""
        by_rank: dict[int, list[str]] = {}
        for i in range(len(OPERANDS)):
            copy, _ = self.twin.operand(i)
            axes, name = rank(copy), self.names[self.twin.own[copy]]
            if axes is not None and name not in by_rank.setdefault(axes, []):
                by_rank[axes].append(name)
        for axes, names in by_rank.items():
            ranks = ", ".join(f"rank({name})" for name in names)
            if len(names) == 1:
                yield f"{ranks} not in ({axes}, None)", f"{names[0]}: expected {axes} axes", names
            elif names:
                condition = f"not {{{ranks}}} <= {{{axes}, None}}"
                yield condition, f"{_listed(names)}: expected {axes} axes", names

    def _rows(self) -> Iterator[tuple[str, str, list[str]]]:
        """A test that the bias has a row for each query, where nothing makes them."""
        for value in self.twin.operator.inputs[3:4]:
            if value in self.twin.own:
                name = self.names[self.twin.own[value]]
                yield f"dim({name}, -2) == 1", f"{name}: expected a row for each query", [name]

    def _numbers(self) -> Iterator[tuple[str, str, list[str]]]:
        """Tests that constants are what they were read as."""
        taken, reading = self.twin.taken, self.twin.reading
        factors = {self.twin.own.get(value) for _, value in reading.factors}
        scales = [name for value, name in self.names.items() if value in factors]
        if len(scales) == 1:
            yield f"not number({scales[0]})", f"{scales[0]}: expected a constant", scales
        elif scales:
            condition = f"not all(map(number, ({', '.join(scales)})))"
            yield condition, f"{_listed(scales)}: expected constants", scales
        lows = {self.twin.own.get(value) for value in reading.numbers.values()}
        for value, name in self.names.items():
            given = number(self.twin.copies[value])
            if given is None or value in factors or value in self.skeleton.settings:
                continue
            if value in lows:
                condition = f"(number({name}) or 0.0) > {NOTHING}"
                yield condition, f"{name}: expected a constant as low as {NOTHING}", [name]
            elif value not in taken:
                condition = f"number({name}) != {literal(given)}"
                yield condition, f"{name}: expected the constant {literal(given)}", [name]

    def _masks(self) -> Iterator[tuple[str, str, list[str]]]:
        """Tests of what is done to the weights: a mask, that of the scores; one number a row."""
        reading, keys = self.twin.reading, -2 if self.twin.reading.flipped else -1
        for value in reading.by_rows:
            name = self.names.get(self.twin.own.get(value))
            if name is not None and number(value) is None:
                condition = f"dim({name}, {keys}) not in (1, None)"
                yield condition, f"{name}: expected one number for all keys", [name]
        before = [self._step(step) for step in reading.masked_by]
        for step in reading.masked_again:
            after, name = self._step(step), self.names[self.twin.own[step[1]]]
            if number(step[1]) is None and after not in before:
                names = [
                    self.names[self.twin.own[value]] for _, value in (step, *reading.masked_by)
                ]
                condition = f"not once_more({', '.join([after, *before])})"
                yield condition, f"{name}: expected what masks the scores", names

    def _step(self, step: tuple[str, ir.Value]) -> str:
        """What masks scores or weights, as `once_more` takes it."""
        return f'("{step[0]}", {self.names[self.twin.own[step[1]]]})'

    def _rewrite(self) -> list[str]:
        if self.left:
            return self._unfinished()
        twin, new_nodes = self.twin, self.twin.new_nodes
        names = {twin.copies[value]: name for value, name in self.names.items()}
        names |= {
            constant: names[value]
            for constant, value in twin.reading.numbers.items()
            if value in names
        }
        users = [value for node in new_nodes for value in node.inputs]

        def inline(node: ir.Node) -> bool:
            once = users.count(node.outputs[0]) == 1
            return node.op_type == "Constant" or (node.op_type == "Shape" and once)

        roles = self._roles()
        keywords = {twin.operator: self._keywords(names)}
        keywords |= {node: [_constant(node)] for node in new_nodes if node.op_type == "Constant"}
        new_nodes = [node for node in new_nodes if node.outputs[0] not in names]
        writer = Writer(
            names, lambda node: roles.get(node, "result"), keywords, inline, self._remark_on_rewrite
        )
        text = writer.write(new_nodes, twin.result)
        used = {name for name in self.names.values() if _mentions(text, name)}
        return [*self._method("rewrite", "op", used), *text]

    def _method(self, method: str, first: str, used: set[str]) -> list[str]:
        """The `def` of a method that gets all parameters, and reads those `used`."""
        read = [name for name in self.names.values() if name in used]
        return _signature(method, [first, *read, *(["**_"] if len(read) < len(self.names) else [])])

    def _roles(self) -> dict[ir.Node, str]:
        """Names of what new nodes compute: by the operator's input that they are for."""
        roles, new = {self.twin.operator: "attention"}, {*self.twin.new_nodes}
        for node in new:
            if _is_of_shapes(node):
                roles[node] = "shape"
            elif node.op_type == "Shape":
                roles[node] = "size"
            elif _is_zeros(node):
                roles[node] = "zeros"
        for value, role in zip(self.twin.operator.inputs, (*OPERANDS, "bias"), strict=False):
            starts = {value.producer()} & new if value is not None else ()
            for node in walks.walk(starts, lambda node: {*walks.producers(node)} & new):
                roles.setdefault(node, role)
        return roles

    def _remark_on_rewrite(self, node: ir.Node) -> str:
        """What is said behind a new node."""
        operands = self.twin.operator.inputs
        if node is self.twin.operator and "softmax_precision" in node.attributes:
            return "softmax_precision 1: float32"
        if node.op_type == "Expand" and operands[3:] and self._is_for(node, operands[3]):
            return "a row for each query, which ONNX Runtime asks for"
        for value, axes in zip(operands, OPERANDS.values(), strict=False):
            if node.outputs[0] is value and node.op_type in ("Transpose", "Unsqueeze", "Reshape"):
                heads = ("1", "…") if self.twin.reading.axes == 3 else axes[:2]
                return _shape((*heads, *axes[2:]))
        return ""

    @staticmethod
    def _is_for(node: ir.Node, operand: ir.Value) -> bool:
        """Whether it is the last node, casts apart, that makes `operand`."""
        last = operand.producer()
        return node is last or (last.op_type == "CastLike" and node is last.inputs[0].producer())

    def _keywords(self, names: dict[ir.Value, str]) -> list[str]:
        """The operator's attributes, scale and softcap as the rule reads them."""
        reading = self.twin.reading
        texts = []
        for given in self.twin.operator.attributes.values():
            if given.name == "scale":
                texts.append(f"scale={_product(reading.factors, names)}")
            elif given.name == "softcap" and reading.cap in names:
                texts.append(f"softcap=number({names[reading.cap]})")
            else:
                texts.append(attribute(given))
        return texts

    def _unfinished(self) -> list[str]:
        operands = [name for name in OPERANDS if name in self.names.values()]
        takes = [f"{name} {_shape(axes)}," for name, axes in OPERANDS.items()]
        rest = "What must hold for it is for check to test, in place of the refusal."
        return [
            *_signature("rewrite", ["op", *operands, "**_"]),
            *_comment(f"left to write: {self.left}".split()),
            *_comment(
                ["The operator takes", *takes, "a bias or mask (B, N, S, T),", "and a scale."]
            ),
            *_comment(rest.split()),
            f"{_INNER}return op.Attention({', '.join(operands)})",
        ]


def _product(factors: Sequence[tuple[str, ir.Value]], names: dict[ir.Value, str]) -> str:
    """The scale: the product of its factors, each a name or a number."""

    def text(value: ir.Value) -> str:
        return f"number({names[value]})" if value in names else literal(number(value))

    times = [text(value) for kind, value in factors if kind == "Mul"]
    divisors = [text(value) for kind, value in factors if kind == "Div"]
    for both in {*times} & {*divisors}:  # as in cap · tanh(x / cap)
        times.remove(both)
        divisors.remove(both)
    times = [
        f"{text} ** {times.count(text)}" if times.count(text) > 1 else text
        for text in dict.fromkeys(times)
    ]
    if not times:
        times = ["1" if divisors else "1.0"]
    return " / ".join([" * ".join(times), *divisors])


def _constant(node: ir.Node) -> str:
    """A Constant's attribute; a float32 as plain number."""
    tensor = node.attributes.get_tensor("value", None)
    if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
        return f"value_float={literal(tensor.numpy().item())}"
    return attribute(next(iter(node.attributes.values())))


def _signature(method: str, parameters: Sequence[str]) -> list[str]:
    return lines(Call(f"def {method}", ["self", *parameters]), after=":", indent=4)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _shape(axes: Sequence[str]) -> str:
    return f"({', '.join(axes)})"


def _comment(parts: Sequence[str], between: str = " ") -> list[str]:
    """A comment of `parts`, none of which is broken."""
    wrapped = [""]
    for i, part in enumerate(parts):
        part += between.rstrip() if i < len(parts) - 1 else ""
        if len(f"{_INNER}# {wrapped[-1]} {part}") > WIDTH:
            wrapped.append("")
        wrapped[-1] += f" {part}" if wrapped[-1] else part
    return [f"{_INNER}# {line}" for line in wrapped if line]


def _is_of_shapes(node: ir.Node) -> bool:
    """Whether a new node puts a shape together: Concat(Shape, Constant, …)."""
    parts = [value.producer() for value in node.inputs if value is not None]
    known = all(part is not None and part.op_type in ("Constant", "Shape") for part in parts)
    return node.op_type == "Concat" and known


def _is_zeros(node: ir.Node) -> bool:
    """Whether a new node makes zeros: Expand(CastLike(0, x), shape)."""
    while node is not None and node.op_type in ("CastLike", "Expand"):
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Constant"


def _mentions(text: Sequence[str], name: str) -> bool:
    return any(re.search(rf"\b{name}\b", line) for line in text)
